"""A made-up recipe run on disk, as the stages would leave it, for the tests of the report."""

import json
import math
import random

import pytest

MODEL_STAGES = ("pretrain", "cold_start", "grpo_1", "control", "sft_2", "grpo_2")
PASS = {"pretrain": 0.012, "cold_start": 0.314, "grpo_1": 0.683, "control": 0.327, "sft_2": 0.641, "grpo_2": 0.702}


def _loads(rng, layers, experts, skew):
    rows = []
    for _ in range(layers):
        row = [math.exp(rng.gauss(0, skew)) for _ in range(experts)]
        rows.append([round(value / sum(row), 5) for value in row])
    return rows


def _training(rng, steps, start, end, every):
    lines = []
    for step in range(every, steps + 1, every):
        loss = end + (start - end) * math.exp(-4 * step / steps) + rng.gauss(0, 0.02)
        line = {
            "step": step,
            "tokens": step * 4096,
            "loss": loss + 0.1,
            "lm_loss": loss,
            "mtp_loss": loss * 1.2,
            "aux_loss": 1e-3,
            "grad_norm": abs(rng.gauss(1, 0.2)),
            "lr": 1e-3 * min(step / 50, 1) * (1 - step / steps * 0.9),
            "tokens_per_second": 21000 + rng.gauss(0, 500),
            "mfu": 0.31,
            "step_seconds": 0.19,
            "expert_load": _loads(rng, 3, 8, 0.6 * math.exp(-3 * step / steps) + 0.08),
            "peak_gib": 1.9,
        }
        if step % (5 * every) == 0:
            line["valid_loss"] = loss + 0.05
        lines.append(line)
    return lines


def _reinforcement(rng, updates, start, end):
    lines = []
    for update in range(1, updates + 1):
        accuracy = min(max(start + (end - start) * (1 - math.exp(-3 * update / updates)) + rng.gauss(0, 0.02), 0), 1)
        form = min(0.88 + 0.1 * update / updates, 1)
        lines.append(
            {
                "update": update,
                "rollout": (update + 1) // 2,
                "reward": accuracy + form,
                "reward_std": 0.4,
                "accuracy": accuracy,
                "format": form,
                "response_length": 42 + 18 * (end - start) * update / updates + rng.gauss(0, 1),
                "truncated": 0.02,
                "kl": 0.004 * update / updates + 1e-4,
                "clip_share": abs(rng.gauss(0.01, 0.004)),
                "entropy": 0.5 - 0.3 * update / updates,
                "rollout_diff_max": 10 ** rng.gauss(-5, 0.2),
                "rollout_diff_mean": 10 ** rng.gauss(-6.6, 0.1),
                "loss": 0.01,
                "grad_norm": 0.4,
                "lr": 3e-5,
                "flat_groups": 0.3,
                "seconds_rollout": 2.1,
                "seconds_reward": 0.2,
                "seconds_score": 0.6,
                "seconds_train": 1.4,
                "seconds_push": 0.05,
                "tokens": 51200,
                "expert_load": _loads(rng, 3, 8, 0.15),
            }
        )
    return lines


def _evaluation(rng, rate):
    questions = [
        f"Calculate {a} + {b} - {c} & show <steps>." for a, b, c in ((12, 30, 5), (7, 81, 44), (3, 9, 1), (55, 2, 8), (91, 6, 70))
    ]
    examples = []
    for question in questions:
        responses = [
            {"text": f"12 + 30 = 42\n42 - 5 = 37</think><answer>{37 if right else 36}</answer>", "correct": right}
            for right in (rng.random() < rate for _ in range(4))
        ]
        examples.append({"question": question, "answer": "37", "responses": responses})
    return {
        "pass_at_1": rate,
        "standard_error": 0.0117,
        "format_rate": min(rate + 0.3, 0.99),
        "response_length": 47.3,
        "truncated": 0.01,
        "num_problems": 500,
        "samples": 8,
        "temperature": 0.6,
        "seconds": 24.0,
        "tokens": 189200,
        "examples": examples,
    }


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_recipe(folder, seed=7):
    """A whole recipe in ``folder``: seven model stages with their evaluations, rejection sampling, export."""
    rng = random.Random(seed)
    seconds = {
        "prepare": 31.0,
        "pretrain": 402.5,
        "cold_start": 61.2,
        "grpo_1": 185.0,
        "control": 180.3,
        "sft_2": 48.9,
        "grpo_2": 121.0,
    }
    commands = {
        "prepare": "prepare",
        "pretrain": "pretrain",
        "cold_start": "sft",
        "sft_2": "sft",
        "reject": "eval",
        "export": "export",
    }
    order = ["prepare"]
    for name in MODEL_STAGES:
        order += ["reject", name, f"eval_{name}"] if name == "sft_2" else [name, f"eval_{name}"]
    order.append("export")
    rows = []
    for name in order:
        command = commands.get(name, "eval" if name.startswith("eval_") else "rl")
        home = folder / "stages" / name
        home.mkdir(parents=True)
        overrides = [f"name={name}", "optim.lr=1e-3"] + (["rl.shuffle_rewards=true"] if name == "control" else [])
        row = {
            "name": name,
            "command": command,
            "seconds": seconds.get(name, 24.0),
            "tokens": 1234567 if command != "prepare" else None,
        }
        if name == "pretrain":
            write_lines(home / "metrics.jsonl", _training(rng, 2000, 6.9, 1.4, 10))
        elif command == "sft":
            write_lines(home / "metrics.jsonl", _training(rng, 200, 1.5, 0.35, 5))
        elif command == "rl":
            write_lines(home / "metrics.jsonl", _reinforcement(rng, 80, 0.33, 0.34 if name == "control" else 0.7))
        elif command == "eval":
            result = _evaluation(rng, PASS.get(name.removeprefix("eval_"), 0.5))
            (home / "eval.json").write_text(json.dumps(result), encoding="utf-8")
        if name in PASS:
            row |= {
                "pass_at_1": PASS[name],
                "standard_error": 0.0117,
                "format_rate": 0.93,
                "response_length": 47.3,
                "num_problems": 500,
            }
        (home / "config.yaml").write_text(
            f"command: {command}\nchoices: {{}}\nconfig:\n  seed: {seed}\n  model:\n    hidden_size: 128\n", encoding="utf-8"
        )
        record = {
            "name": name,
            "command": command,
            "key": "0" * 64,
            "seconds": row["seconds"],
            "overrides": overrides,
            "result": {},
        }
        (home / "stage.json").write_text(json.dumps(record), encoding="utf-8")
        rows.append(row)
    machine = {
        "processor": "Example CPU @ 2.10GHz",
        "cores": 2,
        "memory_gib": 23.9,
        "gpus": [],
        "system": "Linux x86_64",
        "python": "3.11.4",
        "versions": {"r1mega": "0.1.0", "torch": "2.13.0"},
    }
    summary = {"recipe": "quickstart", "seed": seed, "seconds": 1247.3, "machine": machine, "stages": rows}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "export").mkdir()
    return folder


@pytest.fixture
def recipe_folder(tmp_path):
    """A made-up recipe run."""
    return write_recipe(tmp_path / "quickstart")
