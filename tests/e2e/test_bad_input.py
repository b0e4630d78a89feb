"""Wrong input through the command line, as a user meets it: one line, status 2, no traceback, nothing heavy imported first."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from r1mega import cli
from r1mega.config.compose import preset
from r1mega.data.tokenfile import TokenFileWriter

GOOD = {"question": "What is 1 plus 1?", "answer": "2"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Token files, a folder that passes for a checkpoint until torch is there, and a few problem files."""
    for kind, mask in (("text", None), ("samples", [0] * 30 + [1] * 30)):
        with TokenFileWriter(tmp_path / kind, vocab_size=512, eos_id=1, tokenizer_hash="0" * 64, kind=kind) as writer:
            for _ in range(20):
                writer.add(list(range(2, 62)), mask)
    model = dataclasses.asdict(preset("model", "tiny"))
    for name, command, changes in (("checkpoint", "sft", {}), ("run/checkpoints/step-00000001", "pretrain", {"num_experts": 32})):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text('{"files": {}}')
        (tmp_path / name / "state.json").write_text(json.dumps({"command": command, "model": {**model, **changes}}))
    (tmp_path / "folder_with_files").mkdir()
    (tmp_path / "folder_with_files" / "thesis.txt").write_text("all of it")
    lines = {
        "good": json.dumps(GOOD),
        "not_json": json.dumps(GOOD) + "\n{half",
        "no_answer": json.dumps(GOOD) + "\n" + json.dumps({"question": "And now?"}),
        "no_question": json.dumps({"answer": "2"}),
        "empty": "",
    }
    for name, text in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def run(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The error text of a command that must end with status 2 and without a traceback."""
    status = cli.main(list(arguments))
    shown = capsys.readouterr()
    assert status == 2, shown
    assert "Traceback" not in shown.err + shown.out
    return shown.err


PRETRAIN = (
    "pretrain",
    "out={folder}/new",
    "data.train={{{folder}/text:1}}",
    "data.sequence_length=32",
    "trainer.steps=2",
    "optim.warmup_steps=0",
    "trainer.micro_batch_size=4",
)
RL = ("rl", "out={folder}/new", "init={folder}/checkpoint", "rl.rollouts=2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("pretrane",), ["command", "did you mean pretrain"]),
        ((*PRETRAIN, "optim.weight_decy=1"), ["optim.weight_decy", "did you mean optim.weight_decay"]),
        ((*PRETRAIN, "model=tini"), ["model", "did you mean tiny"]),
        ((*PRETRAIN, "trainer.global_batch_size=many"), ["trainer.global_batch_size", "whole number", "many"]),
        (
            (*PRETRAIN, "model.num_heads=6", "parallel.tensor=4", "launch.processes=4"),
            ["model.num_heads", "parallel.tensor 4", "6"],
        ),
        ((*PRETRAIN, "model.top_k=20"), ["model.top_k", "model.num_experts 16", "20"]),
        ((*PRETRAIN, "model.num_groups=3"), ["model.num_groups", "divides", "2, 4 or 8"]),
        ((*PRETRAIN, "model.vocab_size=100"), ["model.vocab_size", "512", "100"]),
        ((*PRETRAIN, "trainer.global_batch_size=6"), ["trainer.global_batch_size", "6"]),
        ((*PRETRAIN, "optim.min_lr=1"), ["optim.min_lr", "optim.lr"]),
        ((*PRETRAIN, "device=gpu"), ["device", "cuda"]),
        ((*PRETRAIN, "data.train={{{folder}/none:1}}"), ["data.train", "none"]),
        ((*RL, "data.problems={folder}/not_json.jsonl"), ["not_json.jsonl line 2", "JSON"]),
        ((*RL, "data.problems={folder}/no_answer.jsonl"), ["no_answer.jsonl line 2", "answer"]),
        ((*RL, "data.problems={folder}/no_question.jsonl"), ["no_question.jsonl line 1", "question"]),
        ((*RL, "data.problems={folder}/empty.jsonl"), ["empty"]),
        ((*RL, "data.problems={folder}/good.jsonl", "advantage=grop"), ["advantage", "grpo"]),
        ((*RL, "data.problems={folder}/good.jsonl", "reward.weights.acuracy=1"), ["acuracy", "accuracy"]),
        ((*RL, "data.problems={folder}/good.jsonl", "rl.group_size=1"), ["rl.group_size", "at least 2"]),
        (("prepare", "out={folder}/p", "text=[{folder}/nothing.txt]"), ["text", "nothing.txt"]),
        (("prepare", "out={folder}/p", "problems={{a: {{kind: jsonl, path: {folder}/gone.jsonl}}}}"), ["gone.jsonl"]),
        (("recipe", "recipe=quickstrat"), ["recipe", "quickstart"]),
        (("report", "run={folder}/nothing"), ["nothing"]),
        (("eval", "data.problems={folder}/good.jsonl"), ["checkpoint", "needed"]),
        ((*PRETRAIN, "out={folder}/run"), ["step-00000001", "num_experts 32 (model.num_experts=16)"]),
        (
            ("sft", "out={folder}/run", "init={folder}/checkpoint", "data.train={{{folder}/samples:1}}", "trainer.steps=2"),
            ["sft", "pretrain wrote"],
        ),
        (("chat", "checkpoint={folder}/folder_with_files"), ["checkpoint", "manifest.json"]),
        (("export", "checkpoint={folder}/checkpoint", "target={folder}/folder_with_files"), ["target", "other files"]),
        ((*PRETRAIN, "parallel.pipeline=8", "launch.processes=8"), ["parallel.pipeline", "model.num_layers 4", "8"]),
        ((*PRETRAIN, "out={folder}/good.jsonl/run"), ["good.jsonl"]),
    ],
)
def test_a_wrong_input_is_one_clear_line(
    folder: Path, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], says: list[str]
) -> None:
    error = run(capsys, *(argument.format(folder=folder) for argument in arguments))
    for text in says:
        assert text in error
    for line in error.strip().splitlines():
        assert line.count(";") >= 2 and "got" in line, f"where: rule; got value; way out: {line}"


@pytest.mark.parametrize(("cut", "name"), [(10, "bin"), (0, "bin"), (5, "idx")])
def test_a_truncated_token_file_is_named(folder: Path, capsys: pytest.CaptureFixture, cut: int, name: str) -> None:
    path = folder / f"text.{name}"
    path.write_bytes(path.read_bytes()[:cut])
    error = run(capsys, *(argument.format(folder=folder) for argument in PRETRAIN))
    assert f"text.{name}" in error and f"got {cut} bytes" in error


def test_debug_shows_the_traceback(folder: Path, capsys: pytest.CaptureFixture) -> None:
    status = cli.main([argument.format(folder=folder) for argument in (*PRETRAIN, "model.top_k=20", "debug=true")])
    assert status == 2
    assert "Traceback" in capsys.readouterr().err


def test_bad_problems_are_told_before_torch(folder: Path) -> None:
    import subprocess

    code = (
        "import sys; from r1mega import cli; status = cli.main(sys.argv[1:]); "
        "print(status, [name for name in ('torch', 'transformers', 'megatron') if name in sys.modules])"
    )
    arguments = [argument.format(folder=folder) for argument in (*RL, "data.problems={folder}/no_answer.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
