"""The examples run as a user runs them, into a folder of the test, and leave what their README says. Quality is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r1mega.data.problems import Problem
from r1mega.rl.ledger import History
from r1mega.rl.sandbox import why_not
from r1mega.testing.contracts import check_reward

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, *arguments: Path) -> str:
    """Run ``examples/NAME/run.sh`` from the repository's root; returns its standard output."""
    env = {**os.environ, "R1MEGA": f"{sys.executable} -m r1mega", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    script = ROOT / "examples" / name / "run.sh"
    done = subprocess.run([str(script), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_pretrain_your_text_leaves_a_model_that_stock_transformers_loads(tmp_path) -> None:
    said = run_example("pretrain_your_text", tmp_path / "out")
    lines = metrics(tmp_path / "out" / "pretrain")
    assert lines[-1]["step"] == 100 and lines[-1]["lm_loss"] < 0.5 * lines[0]["lm_loss"]
    assert [line["step"] for line in lines if "valid_loss" in line] == [20, 40, 60, 80, 100]
    assert (tmp_path / "out" / "pretrain" / "checkpoints" / "step-00000100" / "manifest.json").is_file()
    assert said.strip().splitlines()[-1].startswith("(cut off after 40 tokens")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    ids = tokenizer("The bread", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], 400)


@pytest.fixture(scope="module")
def rl_your_jsonl(tmp_path_factory) -> Path:
    """The output of examples/rl_your_jsonl, which examples/add_a_reward starts from."""
    out = tmp_path_factory.mktemp("rl_your_jsonl") / "out"
    run_example("rl_your_jsonl", out)
    return out


@pytest.mark.slow
def test_rl_your_jsonl_trains_on_the_files_problems_and_judges_the_held_out_ones(rl_your_jsonl) -> None:
    given = (ROOT / "examples" / "rl_your_jsonl" / "problems.jsonl").read_text().splitlines()
    parts = {
        part: [json.loads(line)["question"] for line in (rl_your_jsonl / "data" / "problems" / f"{part}.jsonl").open()]
        for part in ("train", "test")
    }
    assert len(parts["test"]) == 20 and not set(parts["test"]) & set(parts["train"])
    assert sorted(parts["train"] + parts["test"]) == sorted(json.loads(line)["question"] for line in given)

    rollouts = metrics(rl_your_jsonl / "rl")
    assert [line["rollout"] for line in rollouts] == list(range(1, 11))
    assert all(line["rollout_diff_max"] < 1e-4 for line in rollouts)
    assert max(line["reward_std"] for line in rollouts) > 0, "no group differed: there was nothing to learn from"

    judged = json.loads((rl_your_jsonl / "eval" / "eval.json").read_text())
    assert (judged["num_problems"], judged["samples"]) == (20, 4)
    assert {example["question"] for example in judged["examples"]} == set(parts["test"])


@pytest.mark.slow
def test_code_rewards_get_what_they_should() -> None:
    reason = why_not()
    if reason:
        assert "R1MEGA_CI" not in os.environ, reason
        pytest.skip(f"no sandbox on this machine: {reason}")
    script = ROOT / "examples" / "code_rewards" / "score.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 13


def test_python_tool_trains_with_the_tool(tmp_path) -> None:
    reason = why_not()
    if reason:
        assert "R1MEGA_CI" not in os.environ, reason
    script, weaker = ROOT / "examples" / "python_tool" / "run.py", ["environment.sandbox=process"] if reason else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(script), str(tmp_path / "out"), *weaker]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    names = ["cold start without the tool", "cold start with the tool", "after GRPO"]
    said = [line.partition(":")[0] for line in done.stdout.splitlines()[-3:]]
    assert said == names, done.stdout
    without, with_tool, after = (
        json.loads((tmp_path / "out" / name / "eval.json").read_text()) for name in ("eval_without", "eval_sft", "eval_rl")
    )
    assert without["pass_at_1"] < 0.1 < min(with_tool["pass_at_1"], after["pass_at_1"])
    assert with_tool["turns"] > 1.5 and without["turns"] == 1 and after["environment_failed"] == 0
    lines = metrics(tmp_path / "out" / "rl")
    assert [line["rollout"] for line in lines] == list(range(1, 7)) and max(line["reward_std"] for line in lines) > 0
    for line in lines:
        assert line["accuracy"] > without["pass_at_1"] and line["turns"] > 1.5 and line["environment_failed"] == 0
        assert line["rollout_diff_max"] < 1e-4, "the trainer rescores the turns as they were drawn"
    history = History(tmp_path / "out" / "rl" / "ledger")
    assert history.audit() == []
    frames = [frame for frame in history.samples().values() if frame.values["turns"] > 1]
    assert len(frames) > 0.75 * 6 * 64 and not any(frame.arrays()["own"].all() for frame in frames)


@pytest.mark.slow
def test_add_a_reward_counts_a_reward_from_outside_the_package(rl_your_jsonl, tmp_path, monkeypatch) -> None:
    run_example("add_a_reward", tmp_path / "out", rl_your_jsonl)
    lines = metrics(tmp_path / "out" / "rl")
    assert [line["rollout"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 0 < line["my_reward.Brief"] < line["format"], "a share for responses of the asked-for form"
        assert abs(line["reward"] - (line["accuracy"] + line["format"] + 0.5 * line["my_reward.Brief"])) < 1e-4
        assert line["reward_failed"] == 0
    assert not (tmp_path / "out" / "rl" / "reward_failures.jsonl").exists()

    folder = ROOT / "examples" / "add_a_reward"
    monkeypatch.syspath_prepend(folder)
    from my_reward import Brief

    check_reward(Brief())
    code = (folder / "my_reward.py").read_text().partition("\n\n")[2].strip()
    assert code in (folder / "README.md").read_text(), "the README shows the file"


def test_countdowns_reward_wants_each_number_once_and_the_target(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "r1_zero"))
    from countdown import Countdown

    check_reward(Countdown())
    problem, score = Problem("0", "Use 5, 5, 12 to make 65.", "65", "countdown"), Countdown().build()
    said = "5*12=60 60+5=65 65? yes</think><answer>{}</answer>"
    assert [score(problem, said.format(answer)) for answer in ("(5*12)+5", "5+5*12", "(12*5)+5")] == [1.0] * 3
    for answer in (
        "(5*12)+5+0",
        "65",
        "5*13",
        "(5*12)-5",
        "5*12+5*1",
        "12+5",
        "",
        "print(65)",
        "5**2",
        "(" * 500,
        "-(5*12)-5",
        "12*5.0+5",
    ):
        assert score(problem, said.format(answer)) == 0.0, answer
    assert score(problem, "(5*12)+5") == 0.0, "no answer tags"


@pytest.mark.slow
def test_r1_zero_runs_from_text_to_the_page_and_goes_on(tmp_path) -> None:
    out = tmp_path / "out"
    run_example("r1_zero", out, "smoke")
    problems = {part: {line for line in (out / "problems" / f"{part}.jsonl").open()} for part in ("train", "test")}
    assert len(problems["test"]) == 200 and not problems["test"] & problems["train"]
    lines = metrics(out / "rl")
    assert [line["rollout"] for line in lines if "valid_pass_at_1" in line] == [0, 1]
    page = (out / "rl" / "report.html").read_text()
    assert "Held-out problems: pass@1" in page and "Held-out problems: response length" in page
    run_example("r1_zero", out, "smoke")
    assert metrics(out / "rl") == lines, "all was done"
