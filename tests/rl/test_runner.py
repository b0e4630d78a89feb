"""The runner: order, knobs, several workers, weights by source, what stops it. Hostile rewards are in test_reward_hostile.py."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.reward.accuracy import AccuracyReward
from r1mega.rl.reward.mix import weights_of
from r1mega.rl.reward.runner import RewardRunner, total
from r1mega.rl.types import RewardRecord

MODULE = '''
    import sys, time
    from dataclasses import dataclass
    from r1mega.registry import register

    @register("reward", "scaled")
    @dataclass(frozen=True)
    class Scaled:
        """The number in the response."""

        scale: float = 1.0
        value_range = (0.0, 1.0)

        def build(self):
            return lambda problem, response: self.scale * float(response)

    @dataclass(frozen=True)
    class Unbuildable:
        def build(self):
            raise RuntimeError("no model file")

    @dataclass(frozen=True)
    class Warmed:
        """Has what it loads for a source, once, outside the time limit of a call."""

        def build(self):
            return Warm()

    class Warm:
        def __init__(self):
            self.sources = []

        def warm(self, source):
            time.sleep(0.5)
            self.sources.append(source)

        def __call__(self, problem, response):
            return float(self.sources.count(problem.source) == 1)
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def problem(source="numbers", **metadata):
    return SimpleNamespace(id="p", question="?", answer="7", source=source, metadata=metadata, solution=None)


def test_several_rewards_knobs_workers_and_many_calls(module):
    import some_rewards

    weights = {"accuracy": 1.0, "format": 0.5, "scaled": 2.0}
    chosen = {"scaled": some_rewards.Scaled(scale=0.5), "accuracy": AccuracyReward(longest_answer=4)}
    responses = [f"r</think><answer>{idx}</answer>" for idx in range(1000)]
    with RewardRunner(weights, workers=2, rewards=chosen) as runner:
        assert runner.score([], []) == []
        records = runner.score([problem()] * 1000, responses)
        assert [idx for idx, record in enumerate(records) if record["accuracy"].value] == [7]
        assert all(record["format"].value == 1.0 for record in records)
        assert all("ValueError" in record["scaled"].failure for record in records)
        one, two = runner.score([problem(), problem()], ["0.25", "r</think><answer>0000007</answer>"])
        assert one["scaled"] == RewardRecord(0.125, one["scaled"].seconds, "") and two["accuracy"].value == 0.0
    assert total(records[6:8], [weights, weights]) == [0.5, 1.5] and total([one], [weights]) == [0.25]


def test_only_the_rewards_of_a_problems_source_run(module):
    weights = {"accuracy": 1.0, "format": 0.5}
    by_source = {"prose": {"format": 2.0}, "pro*": {"some_rewards.Scaled": 1.0}, "watched": {"accuracy": 0.0, "format": 1.0}}
    sources = ["numbers", "prose", "program", "Prose", "watched", "numbers"]
    problems = [problem(source) for source in sources]
    responses = ["r</think><answer>7</answer>"] * 2 + ["0.25"] + ["r</think><answer>7</answer>"] * 2 + ["7"]
    with RewardRunner(weights, workers=2, by_source=by_source) as runner:
        assert runner.names == ["accuracy", "format", "some_rewards.Scaled"]
        records = runner.score(problems, responses)
    assert [{name: record.value for name, record in each.items()} for each in records] == [
        {"accuracy": 1.0, "format": 1.0},
        {"format": 1.0},  # the first pattern that matches, alone
        {"some_rewards.Scaled": 0.25},
        {"accuracy": 1.0, "format": 1.0},  # case counts
        {"accuracy": 1.0, "format": 1.0},  # weight 0: run and recorded
        {"accuracy": 0.0, "format": 0.0},
    ]
    assert not any(record.failure for each in records for record in each.values())
    own = [weights_of(source, weights, by_source) for source in sources]
    assert total(records, own) == [1.5, 2.0, 0.25, 1.5, 1.0, 0.0]
    with RewardRunner({}, by_source={"*": {"format": 1.0}}) as runner:
        assert list(runner.score([problem()], ["x"])[0]) == ["format"]


def test_warming_is_once_a_source_and_outside_the_limit(module):
    with RewardRunner({"some_rewards.Warmed": 1.0}, timeout_seconds=0.3) as runner:
        for sources in (["a", "a", "b"], ["b", "a"]):
            records = runner.score([problem(source) for source in sources], ["x"] * len(sources))
            assert [record["some_rewards.Warmed"].value for record in records] == [1.0] * len(sources)


def test_reward_choices_that_cannot_run_are_errors(module):
    with pytest.raises(UserError, match="at least one"):
        RewardRunner({})
    with pytest.raises(ValueError, match="did you mean accuracy"):
        RewardRunner({"acuracy": 1.0})
    with RewardRunner({"some_rewards.Unbuildable": 1.0}) as runner, pytest.raises(UserError, match="no model file"):
        runner.score([problem()], ["x"])
    with RewardRunner({"format": 1.0}, memory_bytes=8 << 20) as runner, pytest.raises(UserError, match="reward.memory_bytes"):
        runner.score([problem()], ["x"])
    with RewardRunner({"format": 1.0}) as runner:
        with pytest.raises(UserError, match="one problem a response"):
            runner.score([problem()], [])
        runner.close()
        with pytest.raises(UserError, match="closed"):
            runner.score([problem()], ["x"])


TOGETHER = '''
    import time
    from dataclasses import dataclass

    from r1mega.rl.types import Noted


    def longer(problem, response):
        """A reward that is a function."""
        return Noted(len(response) / 10, "characters") if response else "nothing"


    class Mean:
        def many(self, calls):
            found = [float(len(calls)) if response.isdigit() else ValueError(response) for _, response in calls]
            if any(response == "die" for _, response in calls):
                import os
                os._exit(3)
            if any(response == "hang" for _, response in calls):
                time.sleep(1000)
            return found[1:] if any(response == "few" for _, response in calls) else found


    @dataclass(frozen=True)
    class Together:
        """Scores all calls of a chunk at once."""

        longest_seconds = 1.0
        batched = True
        value_range = (0.0, 1000.0)

        def build(self):
            return Mean()


    @dataclass(frozen=True)
    class Slow:
        """Takes longer than the runner's limit, and says so."""

        longest_seconds = 20.0

        def build(self):
            return lambda problem, response: time.sleep(0.5) or 1.0


    @dataclass(frozen=True)
    class Picky:
        def check(self):
            from r1mega.config.errors import UserError
            raise UserError("picky: a better machine; got this one; buy it")

        def build(self):
            return lambda problem, response: 1.0
'''


@pytest.fixture
def together(tmp_path, monkeypatch):
    (tmp_path / "together.py").write_text(textwrap.dedent(TOGETHER))
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_is_a_reward(together):
    with RewardRunner({"together.longer": 1.0, "format": 1.0}) as runner:
        records = [each["together.longer"] for each in runner.score([problem()] * 2, ["four", ""])]
    assert (records[0].value, records[0].failure, records[0].note) == (0.4, "", "characters")
    assert (records[1].value, records[1].failure, records[1].note) == (0.0, "a reward is a number; got str", "")


def test_calls_that_are_scored_together(together):
    name = "together.Together"
    with RewardRunner({"format": 1.0, name: 1.0, "together.longer": 1.0}, timeout_seconds=0.5, workers=2) as runner:
        responses = ["1", "x", "22", "3"] * 3
        records = runner.score([problem()] * 12, responses)
        for response, record in zip(responses, records, strict=True):
            assert list(record) == ["format", name, "together.longer"] and record["together.longer"].value == len(response) / 10
            failed = "" if response.isdigit() else "ValueError: x"
            assert (record[name].value, record[name].failure) == (6.0 if response.isdigit() else 0.0, failed), "six a process"
        for response, says in (("die", "status 3"), ("hang", "time limit of 1 s"), ("few", "many answers 2 calls; got 1 answers")):
            start = time.monotonic()
            records = runner.score([problem()] * 4, [response, response, "1", "1"])
            assert says in records[0][name].failure and says in records[1][name].failure
            assert [record[name].value for record in records[2:]] == [2.0, 2.0] and not records[0]["format"].failure
            assert time.monotonic() - start < 15


def test_a_reward_may_take_longer_and_may_refuse_the_machine(together):
    with RewardRunner({"together.Slow": 1.0}, timeout_seconds=0.1) as runner:
        assert runner.score([problem()], ["x"])[0]["together.Slow"].value == 1.0
    with pytest.raises(UserError, match="picky: a better machine"):
        RewardRunner({"together.Picky": 1.0})


def test_the_process_imports_no_torch(module):
    (module / "looks.py").write_text(
        textwrap.dedent("""
        import sys
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Looks:
            def build(self):
                return lambda problem, response: float("torch" in sys.modules)
        """)
    )
    with RewardRunner({"looks.Looks": 1.0, "accuracy": 1.0}) as runner:
        (record,) = runner.score([problem()], ["r</think><answer>7.0</answer>"])
    assert (record["looks.Looks"].value, record["accuracy"].value) == (0.0, 1.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_somebody_kills_is_started_again_and_its_call_made_again(number: int) -> None:
    """kill -9 from outside costs no reward; what kills itself does so twice and is a failure."""
    problem = SimpleNamespace(question="1+1", answer="2", source="file", metadata={})
    with RewardRunner({"accuracy": 1.0}, timeout_seconds=20.0) as runner:
        right = "so</think><answer>2</answer>"
        assert runner.score([problem], [right])[0]["accuracy"].value == 1.0
        killed: list[int] = []

        def kill_soon() -> None:
            for worker in runner._workers:
                time.sleep(0.05)
                os.kill(worker.keeper.pid, number)
                killed.append(worker.keeper.pid)

        thread = threading.Thread(target=kill_soon)
        thread.start()
        records = runner.score([problem] * 20000, [right] * 20000)
        thread.join()
        assert killed and all(record["accuracy"].value == 1.0 and not record["accuracy"].failure for record in records)
