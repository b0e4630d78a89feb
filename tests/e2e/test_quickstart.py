"""The main job itself, about a quarter of an hour on two cores: what the README's table promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``make quickstart`` into a folder of its own; R1MEGA_QUICKSTART names a finished run to look at instead."""
    if "R1MEGA_QUICKSTART" in os.environ:
        return Path(os.environ["R1MEGA_QUICKSTART"])
    out = tmp_path_factory.mktemp("quickstart") / "run"
    subprocess.run([sys.executable, "-m", "r1mega", "recipe", "recipe=quickstart", "launch.processes=2", f"out={out}"], check=True)
    return out


@pytest.fixture(scope="module")
def rows(run_folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((run_folder / "summary.json").read_text())["stages"]}


def test_cold_start_has_the_format_and_room_to_learn(rows: dict[str, dict]) -> None:
    assert rows["cold_start"]["format_rate"] >= 0.8
    assert 0.15 <= rows["cold_start"]["pass_at_1"] <= 0.60


def test_grpo_gains_and_shuffled_rewards_do_not(rows: dict[str, dict]) -> None:
    start = rows["cold_start"]["pass_at_1"]
    assert rows["grpo_1"]["pass_at_1"] - start >= 0.20
    assert rows["control"]["pass_at_1"] - start < 0.05


def test_the_second_grpo_does_not_end_below_the_first(rows: dict[str, dict]) -> None:
    assert rows["grpo_2"]["pass_at_1"] >= rows["grpo_1"]["pass_at_1"] - rows["grpo_2"]["standard_error"]


def test_held_out_problems_are_held_out(run_folder: Path) -> None:
    from r1mega.data.problems import load_problems
    from r1mega.data.split import normal_text

    folder = run_folder / "stages" / "data" / "problems"
    texts = {
        name: {normal_text(problem.question) for problem in load_problems(folder / f"{name}.jsonl")} for name in ("train", "test")
    }
    assert len(texts["test"]) == 500 and not texts["test"] & texts["train"]


def test_trainer_and_engine_agree_at_every_step(run_folder: Path) -> None:
    for stage in ("grpo_1", "control", "grpo_2"):
        lines = [json.loads(line) for line in (run_folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines and max(line["rollout_diff_mean"] for line in lines) < 1e-5
        # router scores within rounding of a tie send a token to another expert in the other program: rare, and by much; one such
        # outlier was traced to a gap of 5e-8 (docs/LOG.md), about one rollout in fifty
        assert sum(line["rollout_diff_max"] >= 1e-4 for line in lines) <= len(lines) // 10


def test_the_export_loads_in_transformers_and_answers(run_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_folder / "export")
    model = AutoModelForCausalLM.from_pretrained(run_folder / "export", dtype=torch.float32)
    right = 0
    sums = {
        "3 + 4 - 5 + 1": 3,
        "9 + 8 + 7 - 4": 20,
        "1 - 6 + 2 + 2": -1,
        "5 + 5 + 5 + 5": 20,
        "8 - 3 - 1 + 6 + 2": 12,
        "0 + 7 - 9 - 4": -6,
    }
    for question, answer in sums.items():
        text = f"State the final answer to the following arithmetic problem: {question} ="
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        drawn = model.generate(ids, max_new_tokens=64, do_sample=False)
        right += f"<answer>{answer}</answer>" in tokenizer.decode(drawn[0, ids.shape[1] :])
    assert right >= 4
