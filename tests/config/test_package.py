"""The YAML files ship with the package, and an installed package finds its own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_installed_package_holds_every_yaml_file_and_composes_from_it(tmp_path) -> None:
    lib = tmp_path / "lib"
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    shipped = {path.relative_to(lib / "r1mega" / "configs") for path in (lib / "r1mega" / "configs").rglob("*.yaml")}
    assert shipped == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")} and len(shipped) > 15
    assert {path.relative_to(lib) for path in lib.rglob("*.py")} == {
        path.relative_to(ROOT) for path in (ROOT / "r1mega").rglob("*.py")
    }
    code = (
        "from r1mega.config.compose import compose, config_dir; print(config_dir()); "
        "print(compose('pretrain', ['model=small', 'trainer.steps=2000', 'data.train={a:1}']).model.num_experts)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(lib)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(lib / "r1mega" / "configs"), "32"]


def test_the_version_is_said_once() -> None:
    from r1mega import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
