"""Rewards that hang, crash, raise, lie, eat memory or print without end: the call fails, everything else is scored in order."""

from __future__ import annotations

import textwrap
import time
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.reward.accuracy import AccuracyReward
from r1mega.rl.reward.runner import RewardRunner, total
from r1mega.rl.types import RewardRecord

HOSTILE = '''
    import os, sys, time
    from dataclasses import dataclass
    from r1mega.registry import register

    @register("reward", "hostile")
    @dataclass(frozen=True)
    class Hostile:
        """Does what the response says."""

        scale: float = 1.0
        value_range = (0.0, 1.0)

        def build(self):
            def score(problem, response):
                if response == "hang":
                    while True:
                        pass
                if response == "child":
                    import subprocess
                    child = subprocess.Popen(["sleep", "1000"])
                    with open(problem.metadata["note"], "w") as note:
                        note.write(str(child.pid))
                    child.wait()
                if response == "raise":
                    raise KeyError("no such thing")
                if response == "nan":
                    return float("nan")
                if response == "text":
                    return "1.0"
                if response == "large":
                    return 2.0
                if response == "allocate":
                    hoard = []
                    while True:
                        hoard.append(bytearray(1 << 22))
                if response == "print":
                    while True:
                        print("x" * 1000)
                        sys.stderr.write("y" * 1000)
                if response == "file":
                    with open(problem.metadata["note"], "wb") as note:
                        while True:
                            note.write(bytes(1 << 20))
                if response == "exit":
                    sys.exit(3)
                if response == "die":
                    os._exit(9)
                if response == "read":
                    return float(sys.stdin.read() == "")
                return self.scale * float(response)
            return score

    @dataclass(frozen=True)
    class Unbuildable:
        def build(self):
            raise RuntimeError("no model file")
'''


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    (tmp_path / "hostile_rewards.py").write_text(textwrap.dedent(HOSTILE))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def problem(**metadata):
    return SimpleNamespace(id="p", question="?", answer="7", source="numbers", metadata=metadata, solution=None)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_calls_fail_alone_and_order_is_kept(hostile):
    responses = [
        "0.1",
        "hang",
        "0.2",
        "raise",
        "nan",
        "text",
        "large",
        "0.3",
        "allocate",
        "0.4",
        "print",
        "file",
        "exit",
        "die",
        "read",
        "0.5",
    ]
    with RewardRunner({"hostile_rewards.Hostile": 1.0}, timeout_seconds=1.0, memory_bytes=96 << 20) as runner:
        records = [
            record["hostile_rewards.Hostile"]
            for record in runner.score([problem(note=str(hostile / "big"))] * len(responses), responses)
        ]
        pids = [worker.process.pid for worker in runner._workers]
    want = {
        "hang": "time limit of 1 s",
        "raise": "KeyError: 'no such thing'",
        "nan": "from 0 to 1; got nan",
        "text": "got str",
        "large": "got 2",
    }
    want |= {
        "allocate": "memory limit of 100663296 bytes",
        "print": "time limit",
        "file": "OSError",
        "exit": "SystemExit",
        "die": "ended with status 9",
    }
    for response, record in zip(responses, records, strict=True):
        if response in want:
            assert want[response] in record.failure and record.value == 0.0, (response, record)
        else:
            assert record.failure == "" and record.value == (1.0 if response == "read" else float(response)), (response, record)
    assert (hostile / "big").stat().st_size <= 16 << 20
    assert not any(alive(pid) for pid in pids), "close() leaves no process"


def test_a_killed_call_takes_its_children_along(hostile):
    note = hostile / "pid"
    with RewardRunner({"hostile_rewards.Hostile": 1.0}, timeout_seconds=0.5) as runner:
        (record,) = runner.score([problem(note=str(note))], ["child"])
    assert "time limit" in record["hostile_rewards.Hostile"].failure
    pid = int(note.read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def test_several_rewards_knobs_workers_and_many_calls(hostile):
    import hostile_rewards

    weights = {"accuracy": 1.0, "format": 0.5, "hostile": 2.0}
    chosen = {"hostile": hostile_rewards.Hostile(scale=0.5), "accuracy": AccuracyReward(longest_answer=4)}
    responses = [f"r</think><answer>{idx}</answer>" for idx in range(1000)]
    with RewardRunner(weights, workers=2, rewards=chosen) as runner:
        assert runner.score([], []) == []
        records = runner.score([problem()] * 1000, responses)
        assert [idx for idx, record in enumerate(records) if record["accuracy"].value] == [7]
        assert all(record["format"].value == 1.0 for record in records)
        assert all("ValueError" in record["hostile"].failure for record in records)
        one, two = runner.score([problem(), problem()], ["0.25", "r</think><answer>0000007</answer>"])
        assert one["hostile"] == RewardRecord(0.125, one["hostile"].seconds, "") and two["accuracy"].value == 0.0
    assert total(records[6:8], weights) == [0.5, 1.5] and total([one], weights) == [0.25]


def test_reward_choices_that_cannot_run_are_errors(hostile):
    with pytest.raises(UserError, match="at least one"):
        RewardRunner({})
    with pytest.raises(ValueError, match="did you mean accuracy"):
        RewardRunner({"acuracy": 1.0})
    with RewardRunner({"hostile_rewards.Unbuildable": 1.0}) as runner, pytest.raises(UserError, match="no model file"):
        runner.score([problem()], ["x"])
    with RewardRunner({"format": 1.0}, memory_bytes=8 << 20) as runner, pytest.raises(UserError, match="reward.memory_bytes"):
        runner.score([problem()], ["x"])
    with RewardRunner({"format": 1.0}) as runner:
        with pytest.raises(UserError, match="one problem a response"):
            runner.score([problem()], [])
        runner.close()
        with pytest.raises(UserError, match="closed"):
            runner.score([problem()], ["x"])


def test_the_process_imports_no_torch(hostile):
    (hostile / "looks.py").write_text(
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
