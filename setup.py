"""What pyproject.toml cannot say: ``configs/`` lies beside the package in a checkout and inside it in a wheel; the kernels.

The kernels (``csrc/``) are optional. They are built where torch can be imported while this runs: by

    python setup.py build_ext --inplace

in a checkout, and by ``pip install --no-build-isolation``. Under pip's build isolation there is no torch, and the package is
installed without them. The library is named after the torch that it was built for, ``r1mega/_C.torch-VERSION.so``; another torch
leaves it alone. Where that torch is a CUDA build and nvcc is found, the library has the GPU's kernels too. Two variables:

    R1MEGA_CUDA_ARCH   compute capabilities of the GPUs, "9.0a" (Hopper) by default, several as "9.0a,10.0a"
    R1MEGA_DEBUG       1: debug symbols, no optimisation
"""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import find_namespace_packages, setup

ASKED = "build_ext" in sys.argv
"""Asked for by name, a failure is one; otherwise the package goes on without kernels."""

HEADER = Path("build/r1mega/r1mega_build.h")
"""What csrc/library.cpp records of its build; only that file is compiled again when it changes."""

# torch switches these operators of half and bf16 off for the extensions that it builds; our kernels use them
OPERATORS = [
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
]


@dataclass(frozen=True)
class Plan:
    """How the library is built. ``architectures``: of the GPU kernels, () without any; ``cxx``, ``nvcc``: the compilers' flags."""

    architectures: tuple[str, ...]
    cxx: list[str]
    nvcc: list[str]
    record: str


def plan(torch_version: str, cuda: str | None, nvcc: str | None, environ) -> Plan:
    """From torch's version, the CUDA that it was built for, nvcc's path and the environment.

    Raises ValueError for a variable with another value than those of the first lines of this file.
    """
    debug = environ.get("R1MEGA_DEBUG", "0") or "0"
    if debug not in ("0", "1"):
        raise ValueError(f"R1MEGA_DEBUG: 0 or 1; got {debug!r}; use R1MEGA_DEBUG=1")
    named = architectures(environ.get("R1MEGA_CUDA_ARCH") or "9.0a")
    wanted = named if cuda and nvcc else ()
    codes = [one.replace(".", "") for one in wanted]
    flags = ["-O0", "-g"] if debug == "1" else ["-O3"]
    record = f"torch={torch_version} cuda={cuda if wanted else ''} arch={','.join(wanted)} debug={debug}"
    return Plan(
        wanted,
        # loops with sqrt or a choice between two floats are vectorised where neither errno nor traps have to be right; products and
        # sums are not fused, so that every processor gives the same bits
        [*flags, "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
        [
            *([*flags, "-G"] if debug == "1" else [*flags, "-lineinfo"]),
            *["-std=c++20", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-diag-suppress", "20012", *OPERATORS],
            *[f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes],
        ],
        record,
    )


def architectures(text: str) -> tuple[str, ...]:
    """Compute capabilities of a list with commas."""
    found = tuple(part.strip() for part in text.split(","))
    for one in found:
        if not re.fullmatch(r"\d{1,2}\.\d[af]?", one) or one == "9.0":  # Hopper's own instructions are 9.0a's
            raise ValueError(
                f"R1MEGA_CUDA_ARCH: compute capabilities with commas between them, as 9.0a or 9.0a,10.0a; got {one!r}; "
                "use R1MEGA_CUDA_ARCH=9.0a"
            )
    return tuple(dict.fromkeys(found))


def kernels() -> dict:
    """The arguments of ``setup`` that build ``r1mega/_C...so``, or none where torch is not there."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except Exception as error:  # no torch, or one that cannot be loaded here: a missing library of its own
        if ASKED:
            sys.exit(f"build_ext: torch can be imported; got {type(error).__name__}: {error}; run it with the environment's python")
        return {}

    nvcc = shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) if CUDA_HOME else None
    try:
        made = plan(torch.__version__, torch.version.cuda, nvcc, os.environ)
    except ValueError as error:
        sys.exit(str(error))

    class Build(BuildExtension):
        def get_ext_filename(self, name: str) -> str:
            return f"{name.replace('.', '/')}.torch-{torch.__version__}.so"

        def build_extensions(self) -> None:
            try:
                write_header(made.record)
                super().build_extensions()
            except Exception as error:  # no compiler, one that torch refuses, or one that fails
                if ASKED:
                    raise
                print(f"setup.py: r1mega is installed without its C++ kernels: {error}", file=sys.stderr)
                self.extensions = []

    suffixes = ("cpp", "cu") if made.architectures else ("cpp",)
    library = (CUDAExtension if made.architectures else CppExtension)(
        "r1mega._C",
        sources("csrc", *suffixes),
        depends=sources("csrc", "h", "cuh"),
        include_dirs=[str(Path("csrc").resolve()), str(HEADER.parent.resolve())],
        extra_compile_args={"cxx": made.cxx, "nvcc": made.nvcc},
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build}}


def sources(folder: str, *suffixes: str) -> list[str]:
    """Files of these kinds below ``folder``. Of one op cpu.cpp and cuda.cu have objects of two names."""
    return sorted(str(path) for suffix in suffixes for path in Path(folder).rglob(f"*.{suffix}"))


def write_header(record: str) -> None:
    """Only where it changes, so that an unchanged build compiles nothing."""
    text = f'#define R1MEGA_BUILD "{record}"\n'
    if not HEADER.is_file() or HEADER.read_text() != text:
        HEADER.parent.mkdir(parents=True, exist_ok=True)
        HEADER.write_text(text)


if __name__ == "__main__":
    setup(
        packages=[*find_namespace_packages(include=["r1mega", "r1mega.*"], exclude=["*__pycache__*"]), "r1mega.configs"],
        package_dir={"r1mega.configs": "configs"},
        package_data={"r1mega.configs": ["*.yaml", "*/*.yaml"], "r1mega.compat.sglang_cpu": ["requirements.txt"]},
        include_package_data=False,
        **kernels(),
    )
