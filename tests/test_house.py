"""The test of the house: rooms import downwards only, foreign packages and device names stay in their rooms, every knob is explained."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega import registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "r1mega"
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS = (
    ("__init__", "config", "registry", "files"),
    ("device", "provenance"),
    ("compat", "ops"),
    ("mesh",),
    ("model", "data"),
    ("train",),
    ("rl",),
    ("eval", "plan", "recipe", "launch", "report", "doctor"),
    ("api", "cli", "__main__", "testing"),
)
"""Rooms from the ground up: a room imports from its own floor and below."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
APART = (("model", "data"),)
"""Rooms of one floor that do not see each other."""

MEGATRON_ROOMS = {"compat", "mesh", "model", "train"}
# provenance: names of environment variables; doctor: asks of them in processes that have nothing of r1mega
DEVICE_ROOMS = {"device", "compat", "config", "provenance", "doctor"}
DEVICE_WORDS = re.compile(r"(?<![A-Za-z0-9])(cuda|nccl|gloo)(?![A-Za-z0-9])", re.IGNORECASE)
LONGEST_FILE = 450
LIGHT = (
    "r1mega.cli",
    "r1mega.api",
    "r1mega.config.compose",
    "r1mega.config.help",
    "r1mega.launch.local",
    "r1mega.launch.slurm",
    "r1mega.launch.start",
    "r1mega.launch.torchrun",
    "r1mega.launch.sweep",
    "r1mega.config.completion",
    "r1mega.doctor.report",
    "r1mega.report.timeline",
    "r1mega.train.pipeline.simulate",
    *sorted(registry.KINDS.values()),
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module, those inside functions too; relative ones made absolute.

    ``from r1mega.a import b`` counts as ``r1mega.a.b``: what matters are the first parts. Imports for type checking count.
    """
    here = ("r1mega", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def arrow_fault(room: str, target: str) -> str | None:
    """Why ``room`` may not import ``target`` (a dotted name), or None."""
    parts = target.split(".")
    if parts[0] == "megatron" and room not in MEGATRON_ROOMS:
        return f"megatron is imported in {', '.join(sorted(MEGATRON_ROOMS))} only"
    if parts[0] != "r1mega" or len(parts) == 1 or parts[1] not in FLOOR_OF:
        return None
    other = parts[1]
    if FLOOR_OF[other] > FLOOR_OF[room]:
        return f"{other} is above {room}"
    if any({room, other} == set(pair) for pair in APART):
        return f"{room} and {other} do not see each other"
    return None


def device_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, word) of every device name in code: text that is no docstring, and attributes such as ``torch.cuda``."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from ((node.lineno, word) for word in DEVICE_WORDS.findall(node.value))
        elif isinstance(node, ast.Attribute) and DEVICE_WORDS.fullmatch(node.attr):
            yield node.lineno, node.attr


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def test_the_walk_sees_arrows_of_every_form() -> None:
    source = "import r1mega.cli\nfrom r1mega import api\ndef f():\n    from ..rl.loss import x\n    from . import y\n"
    names = [name for _, name in imported(ast.parse(source), PACKAGE / "mesh" / "here.py")]
    assert names == ["r1mega.cli", "r1mega.api", "r1mega.rl.loss.x", "r1mega.mesh.y"]
    assert [arrow_fault("mesh", name) is not None for name in names] == [True, True, True, False]
    assert arrow_fault("rl", "megatron.core") and not arrow_fault("train", "megatron.core.optimizer")
    assert (
        arrow_fault("model", "r1mega.data.text") and arrow_fault("data", "r1mega.model") and not arrow_fault("train", "r1mega.data")
    )


def test_device_words_are_found_in_code_and_not_in_docstrings() -> None:
    source = '"""On cuda."""\ndef f():\n    """nccl"""\n    g("cuda:0", "barracuda")\n    torch.cuda.synchronize()\n'
    assert sorted(word for _, word in device_words(ast.parse(source))) == ["cuda", "cuda"]


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in MODULES} <= set(FLOOR_OF)


def test_imports_go_down_only(trees) -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}; {fault}"
        for path, tree in trees.items()
        for line, name in imported(tree, path)
        if (fault := arrow_fault(room_of(path), name))
    ]
    assert not faults, "\n".join(faults)


def test_only_the_device_room_names_devices(trees) -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: says {word}; ask r1mega.device"
        for path, tree in trees.items()
        if room_of(path) not in DEVICE_ROOMS
        for line, word in device_words(tree)
    ]
    assert not faults, "\n".join(faults)


def test_every_module_says_what_it_is(trees) -> None:
    faults = [str(path.relative_to(ROOT)) for path, tree in trees.items() if not (ast.get_docstring(tree) or "").strip()]
    assert not faults, f"no docstring: {', '.join(faults)}"


def test_no_file_is_too_long_to_read() -> None:
    faults = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for path in [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    ]
    assert not faults, f"at most {LONGEST_FILE} lines a file: {'; '.join(faults)}"


def config_classes() -> list[type]:
    """Every dataclass with knobs: all of config/ and every registered choice."""
    found = [cls for kind in registry.KINDS for cls in registry.choices(kind).values() if cls.__module__.startswith("r1mega.")]
    for path in sorted((PACKAGE / "config").glob("*.py")):
        module = importlib.import_module(f"r1mega.config.{path.stem}")
        local = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
        found += [cls for cls in local if dataclasses.is_dataclass(cls) and cls.__name__.endswith("Config")]
    return found


def test_every_knob_has_a_doc_string_and_a_unit() -> None:
    classes = config_classes()
    assert {"ModelConfig", "RlConfig", "StageConfig", "GroupAdvantage"} <= {cls.__name__ for cls in classes}
    faults = [
        f"{cls.__qualname__}.{field.name}"
        for cls in classes
        for field in dataclasses.fields(cls)
        if not field.metadata.get("doc") or not field.metadata.get("unit")
    ]
    assert not faults, f"declare with knob(default, doc, unit): {', '.join(faults)}"


def test_the_command_line_and_all_choices_import_nothing_heavy() -> None:
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {LIGHT!r}]; "
        "print(*sorted({'torch', 'megatron', 'transformers', 'tokenizers', 'reasoning_gym', 'matplotlib', "
        "'fsspec', 'huggingface_hub', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
