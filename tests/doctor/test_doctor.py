"""doctor: every package really tried, apart and under a limit; what is off and what adds it; works without torch, Hydra or YAML."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from r1mega import api
from r1mega.cli import main
from r1mega.config.tools import DoctorConfig
from r1mega.doctor import checks as checks_module
from r1mega.doctor.checks import EXTRAS, PARTS, Check, checks, examine, run_probe
from r1mega.doctor.report import WIDTH, row, verdict
from r1mega.doctor.requirements import Requirement, parse, requirements

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of made-up packages that probes see: ``site("name", "source")``."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def add(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)

    return add


def without(*names: str) -> str:
    """Code in which importing any of ``names`` fails, as in a Python that lacks them."""
    return (
        "import sys\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {names!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )


def test_a_package_is_tried_and_not_looked_up(site) -> None:
    site("r1_good", "__version__ = '1.2.3'\nprint('noise on standard output')")
    site("r1_raises", "raise RuntimeError('needs a newer libfoo\\nsecond line')")
    site("r1_lacks", "import r1_nowhere")
    site("r1_exits", "import sys; sys.exit(3)")
    site("r1_crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = {
        name: run_probe(("package", name, name), 60) for name in ("r1_good", "r1_raises", "r1_lacks", "r1_exits", "r1_crashes")
    }
    assert found["r1_good"] == {"state": "ok", "found": "1.2.3", "detail": ""}
    assert {name: result["state"] for name, result in found.items() if name != "r1_good"} == dict.fromkeys(
        ("r1_raises", "r1_lacks", "r1_exits", "r1_crashes"), "fault"
    )
    assert found["r1_raises"]["detail"] == "RuntimeError: needs a newer libfoo"
    assert found["r1_lacks"]["detail"] == "ModuleNotFoundError: No module named 'r1_nowhere'"
    assert found["r1_crashes"]["detail"] == "ended by SIGSEGV"
    assert run_probe(("package", "r1_absent", "r1-absent"), 60)["state"] == "missing"
    assert run_probe(("package", "r1_good:Absent", "r1_good"), 60)["detail"].startswith("AttributeError: ")


def test_a_package_that_hangs_is_ended_with_all_that_it_started(site, tmp_path) -> None:
    site(
        "r1_hangs",
        "import pathlib, subprocess, sys, time\nchild = subprocess.Popen(['sleep', '300'])\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(child.pid))\ntime.sleep(300)",
    )
    result = run_probe(("package", "r1_hangs", "r1_hangs"), 2)
    assert result == {"state": "fault", "found": "", "detail": "no answer in 2 s"}
    child = Path("/proc") / (tmp_path / "pid").read_text() / "cmdline"
    for _ in range(100):  # the kernel takes a moment; a zombie has no command line
        if not child.exists() or not child.read_bytes():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_ctrl_c_ends_doctor_and_its_probes(site, tmp_path) -> None:
    site("r1_hangs", f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'ready').touch()\ntime.sleep(300)")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import r1mega.doctor.report as report\nfrom r1mega.doctor.checks import Check\n"
        "report.checks = lambda folder: [Check(name, True, 'x', 'y', ('package', 'r1_hangs', name)) for name in 'abcdefghijkl']\n"
        "from r1mega.cli import main\nsys.exit(main(['doctor']))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)  # the probes' own limit is longer
    finally:
        process.kill()
    assert process.returncode == 130 and error == "interrupted\n"


def test_a_folder_of_the_users_is_not_the_package_of_its_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "r1_wandb").mkdir()
    (tmp_path / "r1_wandb" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert run_probe(("package", "r1_wandb", "r1_wandb"), 60)["state"] == "missing"


def test_a_version_outside_the_limits_is_a_fault(site) -> None:
    site("r1_core", "__version__ = '0.17.0'")
    asked = Check("core", True, "models", "pip install", ("package", "r1_core", "r1_core"), requirement=parse("r1-core==0.16.1"))
    result = examine(asked, 60)
    assert (result["state"], result["found"], result["off"]) == ("fault", "0.17.0", "models")
    assert result["detail"] == "r1mega needs r1-core==0.16.1" and result["add"] == "pip install"


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("torch>=2.11", ["2.11", "2.13.0+cpu", "3.0"], ["2.10.9", "2.9.1+cu130"]),
        ("transformers>=5.17,<5.24", ["5.17.0", "5.23.9"], ["5.24", "5.24.0.dev0", "4.57"]),
        ("megatron-core==0.16.1", ["0.16.1", "0.16.1+local"], ["0.16.0", "0.17.0rc1", "0.16.1.1"]),
        ("a!=2", ["2.0.1", "1"], ["2", "2.0"]),
        ("a", ["0.1", "of unknown version"], []),
    ],
)
def test_limits(text, good, bad) -> None:
    asked = parse(text)
    assert all(asked.admits(version) for version in good) and not any(asked.admits(version) for version in bad)


def test_requirements_are_the_project_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    assert [asked.text for asked in requirements()] == [text.replace(" ", "") for text in texts]
    assert parse('ray>=2; extra == "ray"') == Requirement("ray>=2", "ray", ">=2", "ray")
    assert parse("math-verify[antlr4-9-3]").name == "math-verify"


def test_every_requirement_has_a_check_that_says_what_is_off() -> None:
    asked = {item.name for item in requirements() if item.name != "r1mega"}
    assert asked <= set(PARTS), f"add to doctor.checks.PARTS: {asked - set(PARTS)}"
    assert set(EXTRAS) <= set(PARTS)
    found = checks(ROOT / "runs")
    assert [check.required for check in found] == sorted((check.required for check in found), reverse=True)
    assert all(check.off and check.add for check in found) and len({check.name for check in found}) == len(found)
    names = {check.name for check in found}
    assert {"Python", "C++ compiler", "torch", "GPU", "Transformer Engine", "DeepGEMM", "SGLang", "Ray"} <= names
    required = {check.name for check in found if check.required}
    assert {item.name for item in requirements() if not item.extra} <= required and "pytest" in required


def test_the_compiler_compiles_and_a_broken_one_is_a_fault(tmp_path, monkeypatch) -> None:
    fake = tmp_path / "cxx"
    fake.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'cxx 1.2.3' && exit 0\necho 'fatal error: no headers' >&2\nexit 4\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    result = run_probe(("compiler",), 60)
    assert result["state"] == "fault" and result["detail"] == "RuntimeError: cxx ends with status 4: fatal error: no headers"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_probe(("compiler",), 60)["state"] == "missing"
    (tmp_path / "g++").symlink_to(fake)
    assert run_probe(("compiler",), 60)["state"] == "fault"


def test_here_the_compiler_torch_and_the_grammars_work() -> None:
    for probe in (("compiler",), ("hydra_grammar",), ("math_answer",), ("torch_product",)):
        if probe != ("compiler",) or any((Path(folder) / "g++").exists() for folder in os.environ["PATH"].split(":")):
            assert run_probe(probe, 120)["state"] == "ok"


@pytest.fixture
def few(monkeypatch):
    """doctor with three checks of this test; the list may be changed."""
    good = Check("good", True, "x", "y", here=lambda: {"state": "ok", "found": "1.0", "detail": "fine"}, note="noted")
    lost = Check("lost", True, "a thing", "pip install lost", here=lambda: {"state": "missing", "found": "", "detail": ""})
    odd = Check("odd", False, "another", "pip install odd", here=lambda: {"state": "fault", "found": "", "detail": "it broke"})
    found = [good, lost, odd]
    monkeypatch.setattr("r1mega.doctor.report.checks", lambda folder: found)
    return found


def test_the_table_says_state_off_and_add_and_the_status_follows_the_required_ones(few, capsys) -> None:
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "  ok       good  1.0               fine; noted\n" in text
    assert "  MISSING  lost\n           off: a thing\n           add: pip install lost\n" in text
    assert "  FAULT    odd                     it broke\n           off: another\n" in text
    assert text.index("needed by make quickstart and make test") < text.index("good") < text.index("optional") < text.index("odd")
    assert text.splitlines()[-1].startswith(
        "verdict: not ready for make quickstart and make test: lost; the lines above say what adds it"
    )
    del few[1]
    assert main(["doctor"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "verdict: ready for make quickstart and make test, on the CPU; optional and not well: odd"


def test_json_is_one_object(few, capsys) -> None:
    assert main(["doctor", "json=true"]) == 1
    body = json.loads(capsys.readouterr().out)
    assert body["usable"] is False and [one["state"] for one in body["checks"]] == ["ok", "missing", "fault"]
    assert body["checks"][1] == {
        "name": "lost", "required": True, "state": "missing", "found": "", "detail": "", "off": "a thing", "add": "pip install lost",
    }  # fmt: skip


def test_from_python(few, capsys) -> None:
    assert api.doctor(DoctorConfig(json=True))["usable"] is False
    assert json.loads(capsys.readouterr().out)["checks"][0]["name"] == "good"


def test_rows_stay_within_the_width() -> None:
    found = checks(Path("runs"))
    for check in found:
        off = {"name": check.name, "required": False, "state": "missing", "found": "", "detail": "", "off": check.off, "add": "x"}
        assert max(map(len, row(off, found).splitlines())) <= WIDTH


def test_the_verdict_names_the_gpu_where_it_works() -> None:
    gpu = {"name": "GPU", "required": False, "state": "ok"}
    assert verdict([gpu]) == "verdict: ready for make quickstart and make test, on the GPU and the CPU"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["doctor", "jsn=true"], "jsn: no such key of doctor; got 'jsn=true'; did you mean json?"),
        (["doctor", "json=perhaps"], "json: true or false; got 'perhaps'; write json=true or json=false"),
        (["doctor", "timeout_seconds=0"], "timeout_seconds: at least 1; got 0"),
        (["doctor", "-m", "seed=1,2"], "-m: a command whose runs have a folder; got doctor; leave -m out"),
    ],
)
def test_wrong_input_is_one_line(arguments, line, capsys) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(line) and shown.err.count("\n") == 1


def test_it_runs_in_a_python_without_torch_hydra_and_yaml(tmp_path) -> None:
    """The checks run in processes that do have them: only doctor's own process is poor, so that the test takes a second."""
    code = without("torch", "hydra", "omegaconf", "yaml", "numpy", "antlr4") + (
        "import r1mega.doctor.checks as module, r1mega.doctor.report as report\n"
        "kept = {'Python', 'hydra-core', 'C++ compiler'}\n"
        "report.checks = lambda folder: [check for check in module.checks(folder) if check.name in kept]\n"
        "from r1mega.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def doctor(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, "doctor", *arguments], capture_output=True, text=True, cwd=tmp_path, env=env
        )

    done = doctor("json=true", "timeout_seconds=60")
    assert done.returncode == 0, done.stderr
    assert [one["name"] for one in json.loads(done.stdout)["checks"]] == ["Python", "hydra-core", "C++ compiler"]
    assert done.stderr.startswith("doctor: overrides are read without Hydra") and done.stderr.count("\n") == 1
    done = doctor("seed=3")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "seed: without Hydra doctor takes json and timeout_seconds;"
    )


def test_a_required_package_that_is_gone_is_status_1(tmp_path) -> None:
    """A real Python without torch: the probes' interpreter starts with torch hidden."""
    (tmp_path / "sitecustomize.py").write_text(without("torch", "hydra"))
    code = (
        "import sys, r1mega.doctor.checks as module, r1mega.doctor.report as report\n"
        "kept = {'Python', 'torch', 'hydra-core', 'GPU'}\n"
        "report.checks = lambda folder: [check for check in module.checks(folder) if check.name in kept]\n"
        "from r1mega.cli import main\nsys.exit(main(['doctor']))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("verdict: not ready for make quickstart and make test: torch, hydra-core; ")
    assert verdict.endswith(" -m pip install 'torch>=2.11' 'hydra-core>=1.3'")
    assert "FAULT    torch" in done.stdout and "off: every command that runs a model" in done.stdout
    assert "-m pip install 'torch>=2.11'" in done.stdout


def test_disk_memory_and_limits_have_their_faults(tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 100 << 20, "total": 64 << 20})
    monkeypatch.setattr(checks_module.shutil, "disk_usage", lambda folder: usage)
    assert checks_module._disk(tmp_path / "runs" / "x")["detail"] == "make quickstart wants 1 GiB"
    assert checks_module._shared_memory()["state"] in ("fault", "missing")
    monkeypatch.setattr(checks_module.resource, "getrlimit", lambda which: (256, 1024))
    assert checks_module._open_files() == {"state": "fault", "found": "256 a process", "detail": "fewer than 4096"}
    monkeypatch.setattr(checks_module.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 262144}[name])
    assert checks_module._memory()["state"] == "fault"
    monkeypatch.setattr(checks_module.sys, "version_info", (3, 10, 4))
    assert checks_module._python()["detail"] == "r1mega needs 3.11 to 3.12"
