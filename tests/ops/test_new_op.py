"""tools/new_op.py in a copy of the tree: the new op is collected and passes the test of all ops, and its own test says what is next."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def tree(tmp_path) -> Path:
    """What an op's pieces live in, without a built library."""
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in (
        "csrc",
        "r1mega",
        "configs",
        "tests/ops",
        "tests/conftest.py",
        "setup.py",
        "pyproject.toml",
        "tools/new_op.py",
        "MANIFEST.in",
    ):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=skip)
        else:
            shutil.copy(ROOT / name, target)
    return tmp_path


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MAX_JOBS": "1"}
    return subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)


def listed(tree: Path) -> dict[str, str]:
    return {
        str(path.relative_to(tree)): path.read_text(errors="replace")
        for path in tree.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }


@pytest.mark.slow
def test_a_new_op_passes_the_test_of_all_ops_and_its_own_test_fails_first(tree) -> None:
    before = listed(tree)
    made = run(tree, "tools/new_op.py", "scale_rows")
    assert made.returncode == 0, made.stderr
    after = listed(tree)
    new = {name for name, text in after.items() if before.get(name) != text}
    assert new == {
        "csrc/library.cpp", "csrc/scale_rows/op.h", "csrc/scale_rows/cpu.cpp", "csrc/scale_rows/cuda.cu", "r1mega/ops/scale_rows.py",
        "r1mega/testing/bench/scale_rows.py", "tests/ops/test_scale_rows.py",
    }  # fmt: skip
    assert made.stdout.splitlines()[:-1] == sorted(new, key=made.stdout.index) and not any("@" in after[name] for name in new)
    generic = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_ops.py", "-k", "scale_rows or schemas")
    assert generic.returncode == 0 and "passed" in generic.stdout and "failed" not in generic.stdout, generic.stdout
    own = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_scale_rows.py")
    assert own.returncode == 1 and "build the library: python setup.py build_ext --inplace" in own.stdout
    benched = run(tree, "-c", "from r1mega.testing.bench import all_benches; print(*[b.op for b in all_benches('scale_rows')])")
    assert benched.stdout == "scale_rows\n", benched.stderr
    styled = run(tree, "-m", "ruff", "check", "--no-cache", *[name for name in new if name.endswith(".py")])
    assert styled.returncode == 0, styled.stdout
    again = run(tree, "tools/new_op.py", "scale_rows")
    assert again.returncode == 2 and again.stderr.startswith(
        "NAME: a name that no op has; got scale_rows, which is in csrc/scale_rows/op.h"
    )
    assert listed(tree) == after


@pytest.mark.slow
def test_the_new_op_builds_and_asks_for_its_kernel(tree) -> None:
    assert run(tree, "tools/new_op.py", "scale_rows").returncode == 0
    built = run(tree, "setup.py", "-q", "build_ext", "--inplace")
    assert built.returncode == 0, built.stderr
    own = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_scale_rows.py")
    assert own.returncode == 1 and "write csrc/scale_rows/cpu.cpp, register the kernel there" in own.stdout
    generic = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_ops.py", "-k", "scale_rows")
    assert generic.returncode == 0, generic.stdout


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Scale",), "NAME: small letters, digits and single underscores, as a Python name; got 'Scale'"),
        (("a-b",), "NAME: small letters"),
        (("lambda",), "NAME: small letters"),
        (("../x",), "NAME: small letters"),
        (("permute",), "NAME: a name that no op has; got permute, which is in csrc/permute/op.h"),
        (("unpermute",), "NAME: a name that no op has; got unpermute, which is in csrc/library.cpp"),
        (("common",), "NAME: a name that no op has; got common, which is in csrc/common"),
        (("library",), "NAME: a name that no op has; got library, which is in r1mega/ops/library.py"),
        ((), "NAME: one name of an op; got 0"),
        (("a", "b"), "NAME: one name of an op; got 2"),
    ],
)
def test_a_bad_or_taken_name_is_refused_and_nothing_written(names, said) -> None:
    done = subprocess.run([sys.executable, "tools/new_op.py", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1 and done.stdout == ""
