"""Runs when a process of SGLang's server starts on a CPU: packages that are not there can be imported, and fail where they are used.

| bend | symptom without it | remove when |
|---|---|---|
| IPython, soundfile, torchvision, xgrammar can be imported | ``import sglang`` ends in ModuleNotFoundError, for notebooks, audio, pictures and grammars | they are optional there |
| sgl_kernel can be imported, and has ``assign_req_to_token_pool_cpu`` | the first request ends in ModuleNotFoundError: the package has no wheel for a CPU without AMX on pip's index | it has one |
| triton is what SGLang brings for macOS | kernels' decorators end in ModuleNotFoundError | SGLang takes its own stand-in wherever triton is missing |

A package that is installed wins over its stand-in. Versions: sglang 0.5.16, 0.5.23.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

STUBS = ("_triton_stub.py", "_platform_stubs.py")
"""Files of SGLang's that stand in for triton: up to 0.5.17, and from 0.5.18 on."""
ABSENT = ("IPython", "sgl_kernel", "soundfile", "torchvision", "xgrammar")


class _Never(type):
    """A class for a name of an absent package: may be named, subclassed and looked into; ends what calls it."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _never(f"{cls.__module__}.{cls.__qualname__}", name)

    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"{cls.__module__}.{cls.__qualname__}: the package is not installed here (r1mega's stand-in)")

    def __get_pydantic_core_schema__(cls, source, handler):  # a field may have it as its type
        from pydantic_core import core_schema

        return core_schema.any_schema()


def _never(module: str, name: str) -> type:
    return _Never(name, (), {"__module__": module})


class _Absent(ModuleType):
    """A module that has every name."""

    __version__ = "0.0.0"
    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        found = _never(self.__name__, name)
        setattr(self, name, found)
        return found


class _Finder:
    """Asked last: finds the absent packages and everything below them."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder, is_package=True) if name.split(".")[0] in ABSENT else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        if module.__name__ == "sgl_kernel":
            module.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu


def assign_req_to_token_pool_cpu(rows_B, table_RS, starts_B, ends_B, slots_T, *rest) -> None:
    """Write cache slots into the table of who owns which: row ``rows_B[b]``, columns from start to end, slots in order of b."""
    taken = 0
    for row, start, end in zip(rows_B.tolist(), starts_B.tolist(), ends_B.tolist(), strict=True):
        table_RS[row, start:end] = slots_T[taken : taken + end - start].to(table_RS.dtype)
        taken += end - start


def _install_triton() -> None:
    """The stand-in that SGLang carries; loaded by its path, since importing the package is what needs it.

    It uses ``importlib.machinery`` and does not import it: this module does. From 0.5.18 on it is installed on macOS alone, together
    with torch's MPS: the block that is triton's is run by itself.
    """
    found = PathFinder.find_spec("sglang")
    folder = Path(found.submodule_search_locations[0]) if found else None
    file = next((folder / name for name in STUBS if (folder / name).is_file()), None) if folder else None
    if file is None:
        return
    spec = importlib.util.spec_from_file_location("_r1mega_triton", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "install"):
        module.install()
        return
    parts = (one for one in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(one, ast.If))
    block = next((one for one in parts if ast.unparse(one.test).startswith("'triton' not in sys.modules")), None)
    if block is None:
        raise ImportError(f"{file}: has a block that stands in for triton, as up to SGLang 0.5.23; got none; use 0.5.16 to 0.5.23")
    exec(compile(ast.Module(block.body, []), str(file), "exec"), vars(module))


sys.meta_path.append(_Finder)
if PathFinder.find_spec("triton") is None:
    _install_triton()
