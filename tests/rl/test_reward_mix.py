"""Which rewards count for which source: the rules of the config, the runner that it opens, and a real RL loop with hostile rewards."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.config.rl import RewardConfig
from r1mega.rl.loop import rl
from r1mega.rl.reward.mix import FAILURES, by_reward, names_of, weights_of, write_failures
from r1mega.rl.setup import open_rewards
from r1mega.rl.types import RewardRecord
from tests.rl.test_loop import config, place  # noqa: F401 (a fixture)
from tests.train.cases import lines

RL = ["init=runs/x", "data.problems=p.jsonl", "rl.rollouts=1"]


def test_the_first_pattern_that_matches_decides_alone():
    by_source = {"reasoning_gym:chain_*": {"a": 1.0}, "reasoning_gym:*": {"b": 1.0}, "gsm8k": {"c": 1.0}}
    usual = {"d": 1.0}
    sources = ["reasoning_gym:chain_sum", "reasoning_gym:maze", "gsm8k", "GSM8K", "gsm8k2"]
    assert [next(iter(weights_of(source, usual, by_source))) for source in sources] == ["a", "b", "c", "d", "d"]
    assert names_of(usual, by_source) == ["d", "a", "b", "c"]


def test_weights_by_source_on_the_command_line():
    reward = compose("rl", [*RL, "reward.by_source={reasoning_gym*: {accuracy: 1, format: 0.2}, gsm8k: {length: 1}}"]).reward
    assert reward.by_source == {"reasoning_gym*": {"accuracy": 1, "format": 0.2}, "gsm8k": {"length": 1}}
    assert reward.weights == {"accuracy": 1.0, "format": 1.0}
    assert compose("rl", [*RL, "reward.weights={json.dumps: 1}"]).reward.weights["json.dumps"] == 1
    escaped = compose(
        "rl", [*RL, "reward.by_source={reasoning_gym\\:*: {accuracy: 1}}", "reward.options.language.target=zh"]
    ).reward
    assert list(escaped.by_source) == ["reasoning_gym:*"] and escaped.options == {"language": {"target": "zh"}}
    assert compose("rl", [*RL, "reward=r1_language"]).reward.weights == {"accuracy": 1.0, "format": 1.0, "language": 1.0}


@pytest.mark.parametrize("override, line", [
    ("reward.by_source={gsm8k: {acuracy: 1}}", "reward.by_source[gsm8k]: a registered reward; got 'acuracy'; did you mean accuracy? use one of accuracy, code, format, judge, language, length, repetition"),
    ("reward.by_source={gsm8k: {}}", "reward.by_source[gsm8k]: at least one reward with its weight; got none; give reward.by_source={PATTERN:{accuracy:1}}"),
    ("reward.by_source={gsm8k: 1}", "reward.by_source[gsm8k]: at least one reward with its weight; got 1; give reward.by_source={PATTERN:{accuracy:1}}"),
    ("reward.by_source={gsm8k: {accuracy: x}}", "reward.by_source[gsm8k]: a finite number as the weight of accuracy; got 'x'; give reward.by_source={PATTERN:{accuracy:1}}"),
    ("reward.by_source={gsm8k: {accuracy: true}}", "reward.by_source[gsm8k]: a finite number as the weight of accuracy; got True; give reward.by_source={PATTERN:{accuracy:1}}"),
    ("reward.weights.accuracy=inf", "reward.weights: a finite number as the weight of accuracy; got inf; give reward.weights={accuracy:1}"),
    ("reward.weights={json.JSONDecoder: 1}", "reward.weights: a reward is a frozen dataclass with build(), or a function of a problem and a response; got 'json.JSONDecoder'; add @dataclass(frozen=True) and build"),
    ("reward.options={lenght: {longest: 1}}", "reward.options: a registered reward; got 'lenght'; did you mean length? use one of accuracy, code, format, judge, language, length, repetition"),
    ("reward.options.length.longst=5", "reward.options.length: a knob of the reward; got 'longst'; did you mean longest? use one of longest, margin"),
    ("reward.options.length.longest=0", "reward.options.length.longest: at least 1; got 0; use reward.options.length.longest=81920"),
    ("reward.options.length.longest=far", "reward.options.length.longest: at least 1; got 'far'; use reward.options.length.longest=81920"),
    ("reward.options={json.dumps: {indent: 1}}", "reward.options.json.dumps: a knob of the reward; got 'indent'; it has none, leave reward.options.json.dumps out"),
    ("reward.options.code.sandbox=none", "reward.options.code.sandbox: one of namespaces, process; got 'none'; use reward.options.code.sandbox=namespaces"),
    ("reward.options.format.strict=true", "reward.options.format: a knob of the reward; got 'strict'; it has none, leave reward.options.format out"),
])  # fmt: skip
def test_rules_of_the_rewards(override, line):
    with pytest.raises(UserError) as error:
        compose("rl", [*RL, override])
    assert str(error.value) == line
    if "options" in override:
        with pytest.raises(UserError, match="reward.options"):
            compose("eval", ["checkpoint=runs/x", "data.problems=p.jsonl", override])


def test_failures_come_before_notes(tmp_path):
    given = [SimpleNamespace(id=str(idx)) for idx in range(30)]
    records = [
        {"code": RewardRecord(0.0, 0.1, "crash" if idx > 24 else "", "" if idx > 24 else "test 1: wrong")} for idx in range(30)
    ]
    write_failures(tmp_path / FAILURES, 1, given, ["x"] * 30, records)
    lines = [json.loads(line) for line in (tmp_path / FAILURES).read_text().splitlines()]
    assert [line["failure"] for line in lines] == ["crash"] * 5 + [""] * 15
    assert lines[0]["problem"] == "25" and lines[5]["note"] == "test 1: wrong" and lines[5]["problem"] == "0"


def test_rl_opens_the_configs_mix_and_eval_its_own_two():
    settings = RewardConfig(weights={"accuracy": 1.0}, by_source={"a*": {"length": 1.0}}, options={"length": {"longest": 7}})
    with open_rewards(settings, settings.weights) as runner:
        assert runner.names == ["accuracy", "length"] and runner._specs[1][2] == {"longest": 7, "margin": 16384}
    with open_rewards(settings, {"accuracy": 1.0, "format": 1.0}, by_source={}) as runner:
        assert runner.names == ["accuracy", "format"]


def test_a_rewards_mean_is_over_the_responses_that_it_ran_on():
    def record(**values):
        return {name: RewardRecord(value, 0.0) for name, value in values.items()}

    ours, theirs = [record(a=1.0), record(a=0.0, b=0.5)], [record(b=1.0), record(a=0.5)]

    def sums(records):  # what a rank hands to the others
        sent = []
        by_reward(records, ["a", "b", "c"], lambda mine: sent.append(mine) or [mine])
        return sent[0]

    def gather(_):
        return [sums(ours), sums(theirs)]

    got = [by_reward(records, ["a", "b", "c"], gather) for records in (ours, theirs)]
    assert got == [{"a": [1.0, 0.0], "b": [0.75, 0.5]}, {"a": [0.5, 0.5], "b": [1.0, 0.75]}], "who has none holds the mean"


HOSTILE = """
    import os, sys, time
    from dataclasses import dataclass


    @dataclass(frozen=True)
    class Hostile:
        value_range = (0.0, 1.0)

        def build(self):
            def score(problem, response):
                kind = ["hang", "raise", "fork", "nan", "exit", "good"][int(problem.question[0])]
                if kind == "hang":
                    time.sleep(1000)
                if kind == "raise":
                    raise KeyError("no")
                if kind == "fork" and os.fork() == 0:
                    time.sleep(1000)
                if kind == "exit":
                    os._exit(3)
                return float("nan") if kind == "nan" else len(response) % 5 / 4

            return score
"""


def test_hostile_rewards_do_not_stop_the_loop(place: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    (tmp_path / "hostile_in_loop.py").write_text(textwrap.dedent(HOSTILE))
    monkeypatch.syspath_prepend(tmp_path)
    settings = config(place, tmp_path / "run", rollouts=3, updates_per_rollout=1, save_every=0)
    name = "hostile_in_loop.Hostile"
    settings.reward = RewardConfig(weights={"accuracy": 1.0}, by_source={"prob*": {name: 0.5, "format": 1.0}}, timeout_seconds=0.3)
    assert rl(settings)["updates"] == 3
    told = lines(tmp_path / "run")
    failed = [line["reward_failed"] for line in told]
    assert sum(failed) == pytest.approx(3 * 5 / 6), "each of the six questions once, five of them hostile"
    assert all("accuracy" not in line and line["reward"] == pytest.approx(0.5 * line[name] + line["format"]) for line in told)
    written = [json.loads(line) for line in (tmp_path / "run" / "reward_failures.jsonl").open()]
    assert len(written) == 20 and {entry["reward"] for entry in written} == {name}
    assert {entry["rollout"] for entry in written} == {number for number, share in enumerate(failed, 1) if share}
    texts = " ".join(entry["failure"] for entry in written)
    for text in ("time limit of 0.3 s", "KeyError: 'no'", "left a process behind", "got nan", "ended with status 3"):
        assert texts.count(text) == 4, texts
