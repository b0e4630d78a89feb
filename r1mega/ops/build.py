"""What a built C++ library says of itself, and whether it fits: for which torch, which CUDA, which GPUs. Loads no library.

``csrc/library.cpp`` holds the record as text, which is read from the file: loading a library of another torch ends in a missing
symbol. Imports no torch.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

COMMAND = "python setup.py build_ext --inplace"
_RECORD = re.compile(rb"r1mega-build:torch=(\S*) cuda=(\S*) arch=(\S*) debug=(\S*);")


@dataclass(frozen=True)
class Build:
    """``torch``: its version; ``toolkit``: nvcc's, "" without GPU kernels; ``architectures``: compute capabilities of those."""

    torch: str
    toolkit: str
    architectures: tuple[str, ...]
    debug: bool

    def __str__(self) -> str:
        kernels = f"GPU kernels of toolkit {self.toolkit} for {', '.join(self.architectures)}" if self.architectures else "CPU only"
        return f"torch {self.torch}, {kernels}{', with debug symbols' if self.debug else ''}"

    def serves(self, capability: str) -> bool:
        """Has it kernels for a GPU of this compute capability ("9.0")?"""
        major, minor = map(int, capability.split("."))
        for one in self.architectures:
            own_major, own_minor = map(int, one.rstrip("af").split("."))
            if own_major == major and (own_minor == minor or (own_minor < minor and not one.endswith("a"))):
                return True
        return False


def read_build(path: Path) -> Build | None:
    """The record of the library at ``path``; None where it has none: linked by hand, or no library."""
    if not path.is_file() or path.stat().st_size == 0:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = _RECORD.search(text)
        if found is None:
            return None
        torch, toolkit, architectures, debug = (part.decode() for part in found.groups())
    return Build(torch, toolkit, tuple(filter(None, architectures.split(","))), debug == "1")


def library_path(torch_version: str) -> Path:
    """Where the library for this torch lies, built or not."""
    return Path(__file__).resolve().parent.parent / f"_C.torch-{torch_version}.so"


def others(path: Path) -> list[str]:
    """Versions of torch that libraries beside ``path`` are for."""
    return sorted(other.stem.removeprefix("_C.torch-") for other in path.parent.glob("_C.torch-*.so") if other != path)


def fault(path: Path, torch_version: str, toolkit: str | None) -> str | None:
    """Why the library at ``path`` is not one of this torch and its toolkit, naming both; None where it is, or says nothing."""
    found = read_build(path)
    if found is None or (found.torch == torch_version and found.toolkit in ("", toolkit)):
        return None
    here = f"torch {torch_version}{f' with toolkit {toolkit}' if toolkit else ''}"
    return f"ops: a C++ library of {here}; got one built for {found} in {path}; run {COMMAND}"


def gpu_fault(build: Build, capability: str, variable: str) -> str | None:
    """Why its GPU kernels cannot run on the GPU that is here; None where they can, or there are none.

    ``variable``: which names the architectures of a build.
    """
    if not build.architectures or build.serves(capability):
        return None
    wanted = f"{capability}a" if int(capability.partition(".")[0]) >= 9 else capability
    return (
        f"ops: GPU kernels for compute capability {capability}; got a library built for {', '.join(build.architectures)}; "
        f"run {variable}={wanted} {COMMAND}"
    )
