"""Evaluation: the numbers by hand, what is kept, and that asking twice gives the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.config.rl import ChatConfig, EvalConfig, ProblemDataConfig, RewardConfig
from r1mega.config.rules import check
from r1mega.config.run import SamplingConfig
from r1mega.data.problems import Problem
from r1mega.eval.chat import _shown, chat
from r1mega.eval.evaluate import evaluate, keep_correct, summarise
from r1mega.registry import lookup
from r1mega.rl.engine import LocalEngine
from r1mega.rl.engine.inprocess import InProcessEngine
from r1mega.rl.environment import Step
from r1mega.rl.environment.play import Played
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


def test_a_push_to_servers_wants_servers(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="push: servers that are there"):
        evaluate(ask(place, tmp_path / "none", push=lookup("push", "disk")()))
    assert not (tmp_path / "none/pushes").exists()


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


@dataclass(frozen=True)
class Again:
    """One more turn for all; breaks where the question has a 3."""

    def build(self):
        """The environment."""
        return SimpleNamespace(max_turns=2, begin=self.begin)

    @staticmethod
    def begin(problem):
        def step(said: str) -> Step:
            if "3" in problem.question:
                raise OSError("no tool")
            return Step("!")

        return SimpleNamespace(reset=lambda: problem.question, step=step, close=lambda: None)


@dataclass(frozen=True)
class Even:
    """Correct is what ends in an even number of characters."""

    value_range = (0.0, 1.0)

    def build(self):
        """The reward."""
        return lambda problem, response: float(len(response) % 2 == 0)


@pytest.fixture
def ending(monkeypatch) -> None:
    """A random model draws no end of its turns: each is three tokens long."""
    true = InProcessEngine.generate

    def short(self, prompts, sampling, seed, limits):
        made = true(self, prompts, sampling, seed, [min(limit, 3) for limit in limits])
        return [replace(one, finish_reason="stop") for one in made]

    monkeypatch.setattr(InProcessEngine, "generate", short)


@pytest.mark.slow
def test_episodes_with_turns_and_another_verifier(place: Path, tmp_path: Path, ending, capsys) -> None:
    verifier = f"{__name__}.Even"
    config = ask(
        place,
        tmp_path / "one",
        environment=Again(),
        verifier=verifier,
        verifier_by_source={"problems": verifier, "other*": "accuracy"},
        sampling=SamplingConfig(temperature=0.6, max_new_tokens=30),
    )
    told = evaluate(config)
    assert told["turns"] == 1.75 and told["environment_failed"] == 0.25 and told["verifier"] == verifier
    assert "environment failed in 25.0% of the episodes: environment=" in capsys.readouterr().err
    entries = json.loads((tmp_path / "one/eval.json").read_text())["examples"]
    for entry in entries:
        for made in entry["responses"]:
            assert made["correct"] == (len(made["text"]) % 2 == 0) and made["text"] == "".join(made["turns"][::2])
            assert made["turns"][1:2] == ([] if "3" in entry["question"] else ["!"])
            assert ("OSError: no tool" in made["environment_failure"]) == ("3" in entry["question"])
    assert 0 < told["pass_at_1"] < 1
    again = evaluate(replace(config, out=str(tmp_path / "two")))
    assert {**told, "seconds": 0} == {**again, "seconds": 0}


def test_code_problems_are_judged_by_the_code_reward(place: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "code.jsonl").write_text(json.dumps({"question": "Add.", "inputs": ["1 2"], "outputs": ["3"]}) + "\n")
    told = "Thus.</think><answer>```python\nprint(sum(map(int, input().split())))\n```</answer>"
    monkeypatch.setattr(Played, "said", told)
    options = RewardConfig(options={"code": {"sandbox": "process"}})
    data = ProblemDataConfig(problems=str(tmp_path / "code.jsonl"))
    for verifier, share in (("code", 1.0), ("accuracy", 0.0)):
        found = evaluate(ask(place, tmp_path / verifier, data=data, verifier=verifier, reward=options, samples=1))
        assert (found["pass_at_1"], found["format_rate"]) == (share, 1.0)


def test_a_verifier_that_is_no_reward_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"verifier: a registered reward; got 'acuracy'; did you mean accuracy"):
        check(ask(place, tmp_path, verifier="acuracy"))
    with pytest.raises(UserError, match=r"verifier_by_source\[a\*\]: a registered reward; got 'cod'"):
        check(ask(place, tmp_path, verifier_by_source={"a*": "cod"}))


def test_kept_turns_can_be_learnt_from(tmp_path: Path) -> None:
    turns = ["<tool>1</tool>", "<result>1</result>", "so</think><answer>1</answer>"]
    made = response(turns[0] + turns[2], True) | {"turns": turns, "environment_failure": ""}
    failed = response("x</think>", True) | {"turns": ["x</think>"], "environment_failure": "gone"}
    entries = [{"index": 0, "responses": [made, failed, made]}]
    assert keep_correct(entries, [Problem("0", "q", "1", "here")], tmp_path / "kept.jsonl", 5, 1) == 1
    assert json.loads((tmp_path / "kept.jsonl").read_text())["turns"] == turns


def test_chat_shows_what_the_environment_said(place: Path, ending, capsys) -> None:
    usual = {"device": CPU, "checkpoint": str(place / "seed"), "engine": LocalEngine(), "environment": Again()}
    for prompt in ("1+1", "3"):
        chat(ChatConfig(sampling=SamplingConfig(max_new_tokens=30), prompt=prompt, **usual))
    first, _, second = capsys.readouterr().out.partition("environment=")
    assert first.count("!") >= 1 and "OSError: no tool" in second


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
