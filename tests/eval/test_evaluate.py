"""Evaluation: the numbers by hand, what is kept, and that asking twice gives the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.config.rl import ChatConfig, EvalConfig, ProblemDataConfig
from r1mega.config.run import SamplingConfig
from r1mega.data.problems import Problem
from r1mega.eval.chat import _shown, chat
from r1mega.eval.evaluate import evaluate, keep_correct, summarise
from r1mega.rl.engine import LocalEngine
from r1mega.train.pretrain import pretrain
from tests.train.cases import CPU, pretrain_config, write_data


def response(text: str, correct: bool, well_formed: bool = True, tokens: int = 10, truncated: bool = False) -> dict:
    return {"text": text, "correct": correct, "well_formed": well_formed, "tokens": tokens, "truncated": truncated, "failed": False}


ENTRIES = [
    {
        "index": 0,
        "responses": [
            response("a", True),
            response("b", True),
            response("a", True),
            response("c", False, tokens=30, truncated=True),
        ],
    },
    {"index": 1, "responses": [response("d", False, well_formed=False)] * 4},
    {"index": 2, "responses": [response("e", True, well_formed=False), response("f", True)] * 2},
]


def test_summary_by_hand() -> None:
    config = EvalConfig(samples=4, sampling=SamplingConfig(temperature=0.6))
    got = summarise(ENTRIES, config)
    # shares 3/4, 0, 1: mean 7/12, squared deviations 1/36, 49/144, 25/144, variance 39/144
    assert got["pass_at_1"] == pytest.approx(7 / 12)
    assert got["standard_error"] == pytest.approx((39 / 144 / 3) ** 0.5)
    assert got["format_rate"] == pytest.approx(6 / 12)
    assert got["response_length"] == pytest.approx(140 / 12) and got["tokens"] == 140
    assert got["truncated"] == pytest.approx(1 / 12) and got["reward_failed"] == 0
    assert (got["num_problems"], got["samples"], got["temperature"]) == (3, 4, 0.6)
    assert summarise(ENTRIES[:1], config)["standard_error"] == 0.0


def test_only_correct_well_formed_and_distinct_responses_are_kept(tmp_path: Path) -> None:
    problems = [Problem(str(number), f"q{number}", f"a{number}", "here") for number in range(3)]
    target = tmp_path / "new/kept.jsonl"

    def kept(per_problem: int, seed: int = 1) -> list[tuple[str, str]]:
        count = keep_correct(ENTRIES, problems, target, per_problem, seed)
        records = [json.loads(line) for line in target.read_text().splitlines()]
        assert count == len(records)
        assert all(record["question"] == f"q{record['id']}" and record["answer"] == f"a{record['id']}" for record in records)
        return [(record["id"], record["response"]) for record in records]

    assert sorted(kept(5)) == [("0", "a"), ("0", "b"), ("2", "f")]
    one = kept(1)
    assert [number for number, _ in one] == ["0", "2"] and one == kept(1)
    assert {kept(1, seed)[0][1] for seed in range(12)} == {"a", "b"}, "which one is kept is drawn"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("eval"))
    problems = [{"question": f"{left}+1", "answer": str(left + 1)} for left in range(5)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    pretrain(pretrain_config(folder, folder / "seed", 1))
    return folder


def ask(place: Path, out: Path, **changes) -> EvalConfig:
    usual = {
        "out": str(out),
        "device": CPU,
        "checkpoint": str(place / "seed"),
        "data": ProblemDataConfig(problems=str(place / "problems.jsonl"), limit=4),
        "samples": 3,
        "batch_prompts": 2,
        "sampling": SamplingConfig(temperature=0.6, max_new_tokens=5),
        "engine": LocalEngine(),
    }
    return EvalConfig(**{**usual, **changes})


def test_asking_twice_gives_the_same_and_another_seed_another(place: Path, tmp_path: Path) -> None:
    first = evaluate(ask(place, tmp_path / "one", keep=str(tmp_path / "kept.jsonl")))
    told = json.loads((tmp_path / "one/eval.json").read_text())
    evaluate(ask(place, tmp_path / "two"))
    again = json.loads((tmp_path / "two/eval.json").read_text())
    assert {**told, "seconds": 0, "kept": 0} == {**again, "seconds": 0, "kept": 0}
    assert (first["num_problems"], first["samples"], first["kept"]) == (4, 3, 0) and 0 <= first["pass_at_1"] <= 1
    assert [len(entry["responses"]) for entry in told["examples"]] == [3] * 4
    assert [entry["question"] for entry in told["examples"]] == ["0+1", "1+1", "2+1", "3+1"]
    assert first["tokens"] == sum(item["tokens"] for entry in told["examples"] for item in entry["responses"])
    evaluate(ask(place, tmp_path / "three", seed=2))
    other = json.loads((tmp_path / "three/eval.json").read_text())
    assert other["examples"] != told["examples"]


def test_chat_answers_one_question(place: Path, capsys) -> None:
    config = ChatConfig(
        device=CPU, checkpoint=str(place / "seed"), sampling=SamplingConfig(max_new_tokens=4), engine=LocalEngine(), prompt="1+1"
    )
    answer = chat(config)
    said = capsys.readouterr().out
    assert answer == chat(config) and _shown(answer["text"], False) in said


def test_thinking_is_dimmed_on_a_terminal_alone() -> None:
    text = " so 2 </think><answer>2</answer>"
    assert _shown(text, True) == "\033[2mso 2\033[0m\n<answer>2</answer>"
    assert _shown(text, False) == "<think> so 2 </think>\n<answer>2</answer>"
    assert _shown("no end", True) == "no end"
