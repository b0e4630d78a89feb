"""The command line: help, exit statuses, one-line errors, and nothing heavy before the config is right."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from r1mega import api
from r1mega.cli import main
from r1mega.config.errors import UserError
from r1mega.config.schema import SCHEMAS, keys

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "megatron", "transformers", "tokenizers")


@pytest.fixture
def stub(monkeypatch):
    """``report`` runs a function of this test instead; returns the list of configs it was called with."""
    calls: list = []
    module = types.ModuleType("r1mega_stub")
    module.act = lambda config: calls.append(config) or {"page": config.target}
    monkeypatch.setitem(sys.modules, "r1mega_stub", module)
    monkeypatch.setitem(api.COMMANDS, "report", api.Command("r1mega_stub:act", "a stub", all_ranks=False))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return calls


def r1mega(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """``python -m r1mega`` in a process of its own, which says at its end which heavy packages it imported."""
    code = (
        "import sys; sys.argv[0] = 'r1mega'; from r1mega.cli import main; status = main(); "
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules]); sys.exit(status)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, env=env)


def test_no_arguments_and_help_list_the_commands(capsys) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == bare
    assert all(f"\n  {name}" in bare for name in SCHEMAS) and "r1mega COMMAND [group=choice] [key=value] ..." in bare
    assert set(api.COMMANDS) == set(SCHEMAS)


@pytest.mark.parametrize("command", SCHEMAS)
def test_help_of_a_command_lists_every_key_with_doc_and_unit(command, capsys) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for key in keys(SCHEMAS[command]):
        if key.cls is None and key.entry is None and key.unit != "choice":
            assert any(
                line.startswith(f"  {key.path}=") and key.doc in line and line.endswith(f"[{key.unit}]")
                for line in text.splitlines()
            )


def test_help_shows_groups_choices_and_the_defaults_in_force(capsys) -> None:
    main(["rl", "--help"])
    text = capsys.readouterr().out
    assert "  engine=local | sglang (now local)" in text and "  optim.lr=3e-06 " in text and "  rl.rollouts=(required)" in text
    assert "  advantage.scale_by_std=true" in text and "  reward.weights={accuracy:1.0,format:1.0}" in text
    main(["pretrain", "model=deepseek_v3", "--help"])
    text = capsys.readouterr().out
    assert "  model.num_experts=256 " in text and "(now deepseek_v3)" in text
    main(["prepare", "--help"])
    assert "  problems.NAME.dataset=chain_sum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pretrian"], "command: no such command; got 'pretrian'; did you mean pretrain? use one of "),
        (["pretrian", "--help"], "command: no such command"),
        (["report", "run=x", "targett=y"], "targett: no such key of report; got 'targett=y'; did you mean target?"),
        (["report"], "run: a value is needed (folder of the run, unit path); got none; give run=VALUE"),
        (["report", "run=no/such"], "run: a run's folder; got no such path no/such; check the path or make it first"),
        (["report", "run=x", "--verbose"], "arguments: group=choice or key=value; got '--verbose'"),
        (["report", "--config-dir"], "--config-dir: a flag with a value; got none"),
        (["report", "--config-dir", "no/such"], "--config-dir: a folder of YAML files; got 'no/such'"),
        (["report", "--cfg", "hydra"], "--cfg: job, the config of the command; got 'hydra'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, line, capsys) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(line) and shown.err.count("\n") == 1


def test_debug_shows_the_traceback(capsys) -> None:
    assert main(["report", "run=no/such", "debug=true"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_user_error_of_the_command_is_status_2_too_and_a_defect_is_not_hidden(stub, tmp_path, capsys) -> None:
    (tmp_path / "x").write_text("")

    def refuse(config):
        raise UserError("run: a rule; got a value; a way out")

    sys.modules["r1mega_stub"].act = refuse
    overrides = ["report", f"run={tmp_path}", f"out={tmp_path}/out"]
    assert main(overrides) == 2
    assert capsys.readouterr().err == "run: a rule; got a value; a way out\n"
    sys.modules["r1mega_stub"].act = lambda config: 1 / 0
    with pytest.raises(ZeroDivisionError):
        main(overrides)

    def interrupt(config):
        raise KeyboardInterrupt

    sys.modules["r1mega_stub"].act = interrupt
    assert main(overrides) == 130


def test_a_good_line_runs_the_command_and_saves_its_config(stub, tmp_path) -> None:
    from r1mega.config.compose import load_config

    (tmp_path / "x").write_text("")
    assert main(["report", f"run={tmp_path}", f"out={tmp_path}/out", "seed=7"]) == 0
    assert stub[0].seed == 7 and load_config(tmp_path / "out") == stub[0]


def test_config_dir_adds_choices_of_ones_own(tmp_path, capsys) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nnum_layers: 3\n")
    line = ["pretrain", "--config-dir", str(tmp_path), "trainer.steps=2000", "data.train={a:1}", "--cfg", "job"]
    assert main([*line, "model=mine"]) == 0
    assert "num_layers: 3" in capsys.readouterr().out
    assert main([*line, "model=min"]) == 2 and "did you mean mine?" in capsys.readouterr().err
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nnum_layrs: 3\n")
    assert main([*line, "model=mine"]) == 2 and "did you mean model.num_layers?" in capsys.readouterr().err


def test_the_whole_check_comes_before_anything_heavy() -> None:
    done = r1mega("pretrain", "trainer.steps=5", "data.train={no/such:1}", "data.sequence_length=64", "optim.warmup_steps=0")
    assert done.returncode == 2 and done.stdout.split() == ["HEAVY"]
    assert done.stderr.startswith("data.train: a token file: ") and done.stderr.count("\n") == 1
    done = r1mega("rl", "init=no/such", "data.problems=no", "rl.rollouts=1", "reward.weights.accuracy=2")
    assert done.returncode == 2 and done.stdout.split() == ["HEAVY"] and done.stderr.count("\n") == 2


def test_help_is_light() -> None:
    done = r1mega("--help")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "HEAVY"


def test_python_minus_m_reaches_the_same_main_and_finds_classes_beside_the_caller(tmp_path) -> None:
    (tmp_path / "beside.py").write_text(
        "from dataclasses import dataclass\nfrom r1mega.config.knob import knob\n"
        "@dataclass(frozen=True)\nclass Adv:\n    power: float = knob(2.0, 'an exponent', '1')\n"
    )
    line = ["rl", "init=a", "data.problems=p", "rl.rollouts=1", "advantage=beside.Adv", "--cfg", "job"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "r1mega", *line], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "power: 2.0" in done.stdout
    done = r1mega(*line, cwd=tmp_path)
    assert done.returncode == 0 and "power: 2.0" in done.stdout
