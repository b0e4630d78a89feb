"""What pyproject.toml cannot say: ``configs/`` lies beside the package in a checkout and inside it in a wheel; the C++ kernels.

The kernels (``csrc/``) are optional. They are built where torch can be imported while this runs: by

    python setup.py build_ext --inplace

in a checkout, and by ``pip install --no-build-isolation``. Under pip's build isolation there is no torch, and the package is
installed without them. The library is named after the torch that it was built for, ``r1mega/_C.torch-VERSION.so``; another torch
leaves it alone.
"""

import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

ASKED = "build_ext" in sys.argv
"""Asked for by name, a failure is one; otherwise the package goes on without kernels."""


def kernels() -> dict:
    """The arguments of ``setup`` that build ``r1mega/_C...so``, or none where torch is not there."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # no torch, or one that cannot be loaded here: a missing library of its own
        if ASKED:
            sys.exit(f"build_ext: torch can be imported; got {type(error).__name__}: {error}; run it with the environment's python")
        return {}

    class Build(BuildExtension):
        def get_ext_filename(self, name: str) -> str:
            return f"{name.replace('.', '/')}.torch-{torch.__version__}.so"

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # no compiler, one that torch refuses, or one that fails
                if ASKED:
                    raise
                print(f"setup.py: r1mega is installed without its C++ kernels: {error}", file=sys.stderr)
                self.extensions = []

    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    library = CppExtension(
        "r1mega._C",
        sources,
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        # loops with sqrt or a choice between two floats are vectorised where neither errno nor traps have to be right
        extra_compile_args=["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math"],
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build}}


setup(
    packages=[*find_namespace_packages(include=["r1mega", "r1mega.*"], exclude=["*__pycache__*"]), "r1mega.configs"],
    package_dir={"r1mega.configs": "configs"},
    package_data={"r1mega.configs": ["*.yaml", "*/*.yaml"]},
    include_package_data=False,
    **kernels(),
)
