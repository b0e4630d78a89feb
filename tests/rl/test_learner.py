"""What the learner does with a rollout: minibatches, the reference, advantages, shuffled rewards; tokens of an environment."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.run import SamplingConfig
from r1mega.rl.engine.inprocess import InProcessEngine
from r1mega.rl.environment import Step
from r1mega.rl.ledger import History
from r1mega.rl.loop import rl
from tests.rl.test_loop import config, digits, loop, place, same, taken, weights  # noqa: F401  fixtures
from tests.train.cases import lines


def test_the_reference_is_refreshed_every_so_many_updates(loop) -> None:
    run = loop()
    start = weights(run)
    rows, _ = taken(run)
    learner = run.learner
    learner.score(rows)
    assert same(run.policy._reference, start) and same(weights(run), start), (
        "scoring with the reference leaves the policy as it was"
    )
    assert all(torch.equal(row.old, row.ref) for row in rows), "at first the policy is the reference"
    learner.train(rows, 0)  # updates 1 and 2
    assert same(run.policy._reference, start) and not same(weights(run), start)
    learner.update(rows[:4])  # update 3
    assert same(run.policy._reference, weights(run))
    learner.update(rows[4:])
    assert not same(run.policy._reference, weights(run))


def test_never_refreshed_and_scored_apart(loop) -> None:
    run = loop(ref_refresh_updates=0)
    start = weights(run)
    rows, _ = taken(run)
    run.learner.score(rows)
    for rollout in range(3):
        run.learner.train(rows, rollout)
    assert same(run.policy._reference, start)
    run.learner.score(rows)
    assert any((row.old - row.ref).abs().max() > 1e-4 for row in rows)


def test_a_rollout_is_cut_into_its_updates(loop, monkeypatch) -> None:
    for updates, sizes in ((1, [8]), (2, [4, 4]), (4, [2, 2, 2, 2])):
        run = loop(updates_per_rollout=updates)
        rows, _ = taken(run)
        seen = []
        monkeypatch.setattr(run.learner, "update", lambda part, seen=seen: seen.append(part))
        run.learner.train(rows, 0)
        assert [len(part) for part in seen] == sizes
        assert Counter(id(row) for part in seen for row in part) == Counter(map(id, rows)), "each row once"
        assert updates == 1 or [row for part in seen for row in part] != rows, "in random order"


def test_rows_carry_their_groups_advantage(loop) -> None:
    run = loop()
    rows, told = taken(run)
    assert len(rows) == 8
    assert all(row.prompt == rows[0].prompt for row in rows[:4]) and rows[4].prompt != rows[0].prompt
    rewards = torch.tensor(told["reward"]).view(2, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    for got, want in zip(torch.tensor([row.advantage for row in rows]).view(2, 4), centred, strict=True):
        assert got.sum().abs() < 1e-5 and torch.equal(got.sign(), want.sign())


def test_shuffled_rewards_are_the_same_ones_elsewhere(loop) -> None:
    run, control = loop(), loop(shuffle_rewards=True)
    made = run.take()
    plain, shuffled = run.value(made)[1], control.value(made)[1]
    assert shuffled["accuracy"] == plain["accuracy"], "what was earned is still told"
    assert Counter(shuffled["reward"]) == Counter(plain["reward"]) and len(set(plain["reward"])) > 1
    values = [float(number) for number in range(64)]
    assert sorted(control.shuffled(values)) == values != control.shuffled(values)
    first = control.shuffled(values)
    control.state.extra["rollouts"] = 1
    assert control.shuffled(values) != first, "another order in each rollout"


class Nagging:
    """Asks on, twice; fails in one episode of four, in its second turn. ``max_turns``: of the environment."""

    max_turns: int = 4

    def build(self):
        """The environment."""
        return NaggingEnvironment(self.max_turns)


class NaggingEnvironment:
    def __init__(self, max_turns: int):
        self.max_turns, self.begun = max_turns, count()

    def begin(self, problem):
        number, turns = next(self.begun), count(1)

        def step(said: str) -> Step:
            turn = next(turns)
            if turn == 2 and number % 4 == 3:
                raise RuntimeError("the tool is out")
            return Step("more<｜end▁of▁sentence｜>" if turn < 3 else None, 0.5)

        return SimpleNamespace(reset=lambda: problem.question, step=step, close=lambda: None)


def test_turns_of_an_environment_are_trained_and_its_words_are_not(place: Path, digits, tmp_path: Path) -> None:
    settings = config(place, tmp_path / "turns", sampling=SamplingConfig(temperature=1.0, max_new_tokens=100))
    settings.environment = Nagging()
    with pytest.MonkeyPatch.context() as patch:  # a random model draws no end: turns of three tokens
        true = InProcessEngine.generate

        def short(self, prompts, sampling, seed, limits=None):
            made = true(self, prompts, sampling, seed, [min(limit, 3) for limit in limits])
            return [
                replace(one, finish_reason="stop") if len(one.token_ids) < limit else one
                for one, limit in zip(made, limits, strict=True)
            ]

        patch.setattr(InProcessEngine, "generate", short)
        rl(settings)
    told = lines(tmp_path / "turns")
    events = [line for line in told if "event" in line]
    told = [line for line in told if "event" not in line]
    assert [line["environment_failed"] for line in told] == [0.25, 0.25] and [line["turns"] for line in told] == [2.75, 2.75]
    assert [line["environment"] for line in told] == [pytest.approx(0.75 * 1.5 + 0.25 * 0.5)] * 2
    assert all(line["rollout_diff_max"] < 1e-4 for line in told), "the trainer rescores turns in their places"
    (event,) = events
    assert event["reason"] == f"environment={__name__}.Nagging: step: RuntimeError: the tool is out" and event["rollout"] == 1
    frames = History(tmp_path / "turns/ledger").samples().values()
    for frame in frames:
        own, tokens = frame.arrays()["own"], frame.arrays()["tokens"]
        seen = len(own) - own.sum()
        assert frame.values["turns"] == (2 if frame.values["environment_failure"] else 3) and len(own) == len(tokens)
        assert seen > 0 and (frame.arrays()["logprobs"][~own] == 0).all() and own[-1]
    assert sum(bool(frame.values["environment_failure"]) for frame in frames) == 4


def test_what_an_environment_says_has_no_gradient(loop) -> None:
    """The loss of a row does not look at tokens that the policy did not draw."""
    run = loop()
    rows, _ = taken(run)
    for row in rows:
        row.own = [place % 2 == 0 for place in range(len(row.completion.token_ids))]
        row.advantage = 1.0
    run.learner.score(rows)
    (batch, *_) = run.learner.batches(rows)
    assert batch.lengths_B.tolist() == [row.num_trained for row in batch.rows]
    spoilt = [replace(row, completion=replace(row.completion, logprobs=[
        value if own else 9.0 for value, own in zip(row.completion.logprobs, row.own, strict=True)])) for row in rows]  # fmt: skip
    start = weights(run)
    run.learner.update(rows)
    after = weights(run)
    other = loop()
    assert same(weights(other), start)
    other.learner.score(spoilt)
    other.learner.update(spoilt)
    assert same(weights(other), after) and not same(after, start)


def test_prompts_are_scored_for_a_probe(loop) -> None:
    """The same numbers as the local engine's model gives, whatever the order of lengths."""
    run = loop()
    prompts = [[5, 9, 11, 40], [7, 8], [60, 61, 62, 63, 64, 65]]
    for prompt, scores in zip(prompts, run.learner.score_prompts(prompts), strict=True):
        with torch.no_grad():
            logits = run.engine.model(torch.tensor([prompt]), use_cache=False).logits[0, :-1].float()
        want = torch.log_softmax(logits, -1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), want, atol=1e-5, rtol=0)
