"""The quickstart's own graph with few steps, without its repetitions, from text to the page; a second run does nothing; a change reruns its part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r1mega.config.compose import config_dir

FEWER = {
    "data": ["text_bytes=60000", "tokenizer.vocab_size=400", "worked=600", "sft=200"],
    "pretrain": ["trainer.steps=4", "trainer.valid_every=2", "optim.warmup_steps=1"],
    "cold_start": ["trainer.steps=3", "optim.warmup_steps=1"],
    "sft": ["trainer.steps=3", "optim.warmup_steps=1"],
    "grpo_1": ["rl.rollouts=1"],
    "grpo_2": ["rl.rollouts=1"],
    "rejection_sampling": ["data.limit=8"],
}
PROBLEMS = (
    "problems={sums: {dataset: chain_sum, options: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}, "
    "num_train: 100, num_valid: 4, num_test: 8}}"
)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``recipe/mini.yaml``: the quickstart with FEWER's values in place of its own."""
    recipe = yaml.safe_load((config_dir() / "recipe" / "quickstart.yaml").read_text())
    stages = recipe["stages"]
    FEWER["data"][2:] = ["worked=60", "sft=40", PROBLEMS]
    for name, stage in stages.items():
        changes = list(FEWER.get(name, []))
        if stage["command"] == "rl":
            changes += ["rl.prompts_per_rollout=4", "rl.group_size=4", "rl.sampling.max_new_tokens=8", "optim.warmup_steps=0"]
        if stage["command"] == "eval":
            changes += ["sampling.max_new_tokens=8", "samples=2"]
        keys = {change.partition("=")[0] for change in changes}
        kept = [override for override in stage["overrides"] if override.partition("=")[0] not in keys]
        stage["overrides"] = kept + changes
    # What an untrained model answers is never right, so rejection sampling would keep nothing: teach sft from the cold-start data.
    stages["sft"]["needs"] = ["data", "pretrain"]
    stages["sft"]["overrides"] = [o.replace("sft_data", "data") for o in stages["sft"]["overrides"]]
    for name in ("sft_data", "control", "eval_control", "eval_sft"):  # the last three are of kinds that others show
        del stages[name]
    stages["report"]["needs"] = [name for name in stages["report"]["needs"] if name in stages]
    folder = tmp_path_factory.mktemp("configs")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "mini.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def run(configs: Path, out: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "r1mega", "recipe", "recipe=mini", f"out={out}", "launch.processes=1", *overrides]
    command += ["--config-dir", str(configs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_stage_then_nothing_then_what_changed(configs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(configs, out)
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["stages"]}
    for name in ("cold_start", "grpo_1", "grpo_2"):
        assert 0.0 <= rows[name]["pass_at_1"] <= 1.0 and rows[name]["seconds"] > 0 and rows[name]["tokens"] > 0
        assert rows[name]["standard_error"] >= 0
    page = (out / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "grpo_1" in page
    assert (out / "export" / "config.json").is_file() and (out / "export" / "model.safetensors").is_file()

    before = written(out)
    said = run(configs, out)
    assert said.count("kept") >= len(rows) - 1
    assert written(out) == before

    mini = configs / "recipe" / "mini.yaml"
    text = mini.read_text()
    changed = yaml.safe_load(text)
    changed["stages"]["eval_grpo_2"]["overrides"].append("seed=2")
    mini.write_text(yaml.safe_dump(changed, sort_keys=False))
    run(configs, out)
    mini.write_text(text)
    after = written(out)
    assert {path for path in before if after[path] != before[path]} == {out / "stages" / "eval_grpo_2" / "eval.json"}


def written(out: Path) -> dict[Path, int]:
    """When each checkpoint's and verdict's file was written."""
    files = (path for pattern in ("*.distcp", "eval.json") for path in out.rglob(pattern) if "replaced" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in files}
