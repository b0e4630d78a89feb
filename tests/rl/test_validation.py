"""Held-out problems during a run: when, the same questions each time, what is counted; the training does not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.config.rl import ValidConfig
from r1mega.rl.loop import rl
from r1mega.rl.types import RewardRecord
from r1mega.rl.validation import Answer, valid_line
from r1mega.train.checkpoint import latest
from tests.rl.test_loop import Digits, config, place, same  # noqa: F401  place is a fixture
from tests.train.cases import lines, stored

KEYS = ("valid_pass_at_1", "valid_standard_error", "valid_response_length", "valid_truncated")


class Noted(Digits):
    """Right are responses of an odd number of characters; ``asked``: of held-out problems, in order."""

    asked: list[tuple[str, str]] = []

    def score(self, problems, texts):
        self.asked += [(problem.question, text) for problem, text in zip(problems, texts, strict=True) if "+2" in problem.question]
        return [{"accuracy": RewardRecord(float(len(text) % 2), 0.0), "format": RewardRecord(0.0, 0.0)} for text in texts]


@pytest.fixture
def noted(monkeypatch) -> list[tuple[str, str]]:
    monkeypatch.setattr("r1mega.rl.setup.RewardRunner", Noted)
    monkeypatch.setattr(Noted, "asked", [])
    return Noted.asked


def with_valid(place: Path, out: Path, lag: int = 0, **valid):  # noqa: F811
    file = place / "held_out.jsonl"
    file.write_text("".join(json.dumps({"question": f"{left}+2", "answer": str(left + 2)}) + "\n" for left in range(5)))
    return config(place, out, rollouts=3, valid=ValidConfig(problems=str(file), **valid), lag=lag)


@pytest.mark.parametrize("lag", [0, 1])
def test_when_and_what(place: Path, tmp_path: Path, noted, lag: int) -> None:  # noqa: F811
    rl(with_valid(place, tmp_path / "run", lag, every=2, limit=4, samples=3))
    told = [line for line in lines(tmp_path / "run") if "event" not in line]
    assert [line["rollout"] for line in told] == [0, 1, 2, 3]
    assert [[key in line for key in KEYS] for line in told] == [[True] * 4, [False] * 4, [True] * 4, [True] * 4]
    assert told[2]["seconds_valid"] > 0
    asked = [noted[start : start + 12] for start in (0, 12, 24)]
    for line, part in zip((told[0], told[2], told[3]), asked, strict=True):
        by_question = {question: [text for other, text in part if other == question] for question, _ in part}
        assert sorted(by_question) == ["0+2", "1+2", "2+2", "3+2"] and {len(texts) for texts in by_question.values()} == {3}
        assert line["valid_pass_at_1"] == pytest.approx(sum(len(text) % 2 for _, text in part) / 12, abs=1e-5)
        assert 1 <= line["valid_response_length"] <= 6 and 0 <= line["valid_truncated"] <= 1


def test_the_training_does_not_notice_and_the_same_weights_answer_alike(place: Path, tmp_path: Path, noted) -> None:  # noqa: F811
    for name, valid in (("with", {"every": 1}), ("again", {"every": 1}), ("without", {})):
        rl(with_valid(place, tmp_path / name, **valid))
    assert same(*(stored(latest(tmp_path / name / "checkpoints")) for name in ("with", "without")))
    assert len(noted) == 2 * 4 * 5 and noted[:20] == noted[20:]


def test_the_line() -> None:
    answers = [Answer(0, True, 4, False), Answer(0, False, 6, True), Answer(1, True, 2, False), Answer(1, True, 4, False)]
    assert valid_line(answers) == {
        "valid_pass_at_1": 0.75,
        "valid_standard_error": pytest.approx(0.25),
        "valid_response_length": 4.0,
        "valid_truncated": 0.25,
    }
    assert valid_line(answers[:1])["valid_standard_error"] == 0.0
