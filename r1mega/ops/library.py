"""Our ops in torch's dispatcher: the C++ library where it is built for this torch, the plain-torch references elsewhere.

An op is an :class:`Op`: schema, reference, fake, backward, cases. :func:`load` registers all ops once a process, on first use.
Where the library ``r1mega/_C.torch-VERSION.so`` is there, its kernels serve their device; the reference serves every device without
a kernel of its own. Where it is not there, rank 0 says so once on stderr. One that was built for something else is refused by name.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1mega import device
from r1mega.config.errors import UserError
from r1mega.ops import build

NAMESPACE = "r1mega"
BUILD = build.COMMAND
FP32_BF16 = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Arguments of an op for tests. ``make(dtype, device)`` gives them, the same ones each time; tensors of a floating type are
    differentiated, but for fp8 ones."""

    name: str
    make: Callable[[torch.dtype, torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Op:
    """One op, complete.

    ``schema``: as in ``csrc/library.cpp``; arguments that it changes are marked ``(a!)``. ``reference``: plain torch, the values
    that every kernel is tested against, on any device and without a wait for it. ``fake``: shapes, strides and dtypes.
    ``setup_context`` and ``backward``: of ``torch.library.register_autograd``; None: the op has no gradient. ``dtypes``: what its
    cases are made of. ``exact``: kernels give the reference's bits; otherwise their error against the reference in fp64 is at most
    twice the reference's own in the case's dtype, of values and of gradients (those that autograd finds through the reference).
    ``tensor_core_error``: what a GPU's may be above that, of the norm of the values: FP8 products are summed with fewer bits there.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    cases: tuple[Case, ...] = field(default=())
    dtypes: tuple[torch.dtype, ...] = (*FP32_BF16, torch.float64)
    exact: bool = True
    tensor_core_error: float = 0.0

    @property
    def name(self) -> str:
        """The name in ``torch.ops.r1mega``."""
        return self.schema.partition("(")[0]

    @property
    def packet(self) -> Any:
        """What ``torch.ops.r1mega.NAME`` is, all ops loaded."""
        load()
        found = getattr(torch.ops.r1mega, self.name)
        return found if _open_range is None else _named(found, self.name)


_open_range: Callable[[str], Callable[[], None]] | None = None


def name_ranges(open_range: Callable[[str], Callable[[], None]] | None) -> None:
    """From now on each call of an op, of its backward's too, is a named range of a profiler; None: no longer.

    ``open_range``: see :meth:`r1mega.device.Device.open_range`.
    """
    global _open_range
    _open_range = open_range


def _named(packet: Any, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        close = _open_range(f"{NAMESPACE}::{name}") if _open_range else None
        try:
            return packet(*args, **kwargs)
        finally:
            if close:
                close()

    return call


def library_path() -> Path:
    """Where the C++ library for this torch lies, built or not."""
    return build.library_path(torch.__version__)


@functools.cache
def load() -> bool:
    """Register all ops; True where the C++ library serves them.

    Raises UserError for a library whose schemas are not these, or that was built for another torch or for other GPUs.
    """
    built = _load_library()
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for op in all_ops():
        if not built:
            library.define(op.schema)
        elif (fault := _stale(op)) is not None:
            raise UserError(f"ops: the C++ library is of this source; got {fault} in {library_path()}; run {BUILD}")
        library.impl(op.name, op.reference, "CompositeExplicitAutograd")
        name = f"{NAMESPACE}::{op.name}"
        torch.library.register_fake(name, op.fake, lib=library)
        if op.backward is not None:
            torch.library.register_autograd(name, op.backward, setup_context=op.setup_context, lib=library)
    _keep.append(library)
    return built


_keep: list[torch.library.Library] = []
"""A torch.library.Library takes its registrations back when it is freed."""


def all_ops() -> tuple[Op, ...]:
    """Every op: those that a module of this folder lists as ``OPS``, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = (importlib.import_module(f"r1mega.ops.{name}") for name in names)
    return tuple(op for module in modules for op in getattr(module, "OPS", ()))


def _load_library() -> bool:
    path, why = library_path(), "it is not built"
    if path.is_file():
        _refuse_others(path)
        try:
            torch.ops.load_library(str(path))
            return True
        except (OSError, RuntimeError) as error:  # another compiler's runtime, or a torch of the same version built in another way
            told = error.__cause__ or error  # torch's own words name the file alone, the loader's the reason
            why = (str(told).splitlines() or [type(told).__name__])[0]
    elif found := build.others(path):
        why = f"the library is built for torch {', '.join(found)}, this is {torch.__version__}"
    _tell(f"no C++ kernels for torch {torch.__version__} ({why}), plain torch does their work")
    return False


def _refuse_others(path: Path) -> None:
    """Raise UserError for a library of another torch, or without kernels for this process's GPU among those it has."""
    fault, found, capability = (
        build.fault(path, torch.__version__, device.gpu_toolkit()),
        build.read_build(path),
        device.gpu_capability(),
    )
    if fault is None and found is not None and capability is not None:
        fault = build.gpu_fault(found, capability, device.ARCHITECTURES)
        if not found.architectures:
            _tell("the C++ library was built without nvcc and has no GPU kernels, plain torch does their work there")
    if fault is not None:
        raise UserError(fault)


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"ops: {text}; to build them: {BUILD}", file=sys.stderr)


def _stale(op: Op) -> str | None:
    packet = getattr(torch.ops.r1mega, op.name, None)
    if packet is None:
        return f"no {op.name}"
    found, wanted = packet.default._schema, torch._C.parse_schema(f"{NAMESPACE}::{op.schema}")
    return None if str(found) == str(wanted) else f"{found}"
