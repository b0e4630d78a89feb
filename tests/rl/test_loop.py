"""The RL loop on a tiny random model: the rollout agrees with the trainer, a cut-off run goes on bit for bit, ranks agree."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega import api
from r1mega.config.errors import Stopped, UserError
from r1mega.config.rl import ProblemDataConfig, RewardConfig, RlConfig, RolloutConfig, ValidConfig
from r1mega.config.run import SamplingConfig
from r1mega.mesh import close_mesh
from r1mega.rl.advantage import GroupAdvantage
from r1mega.rl.batch import RolloutRow
from r1mega.rl.engine import LocalEngine
from r1mega.rl.environment import Single
from r1mega.rl.learner import Learner
from r1mega.rl.ledger import History
from r1mega.rl.loop import rl, turn
from r1mega.rl.loss import GrpoLoss
from r1mega.rl.push import AutoPush
from r1mega.rl.rollouts import Rollouts
from r1mega.rl.run import Run
from r1mega.rl.setup import open_run_mesh
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint
from r1mega.train.checkpoint import latest
from r1mega.train.pretrain import pretrain
from tests.train.cases import CPU, OPTIM, lines, pretrain_config, stored, write_data
from tests.train.test_prometheus import free_port, parsed, scrape

SIZES = RolloutConfig(
    rollouts=2,
    prompts_per_rollout=2,
    group_size=4,
    updates_per_rollout=2,
    micro_batch_size=3,
    sampling=SamplingConfig(temperature=1.0, max_new_tokens=6),
    ref_refresh_updates=3,
    save_every=1,
)
TIMED = (
    "seconds_rollout", "seconds_value", "seconds_score", "seconds_train", "seconds_push", "peak_gib", "save_stall_seconds",
    "idle_share", "push_seconds", "push_gbps", "push_proof_seconds",
)  # fmt: skip
MAY_BE_NOTHING = (
    "reward_seconds", "generated_tokens_per_second", "tokens_per_second", "slowest_reward_seconds", "engine_idle_share",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, problems and a checkpoint to start from (``seed``)."""
    folder = write_data(tmp_path_factory.mktemp("rl"))
    problems = [{"question": f"{left}+1", "answer": str(left + 1)} for left in range(6)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    pretrain(pretrain_config(folder, folder / "seed", 1))
    return folder


def config(place: Path, out: Path, **sizes: Any) -> RlConfig:
    return RlConfig(
        name=out.name,
        out=str(out),
        device=CPU,
        init=str(place / "seed"),
        data=ProblemDataConfig(problems=str(place / "problems.jsonl")),
        rl=replace(SIZES, **sizes),
        reward=RewardConfig(),
        advantage=GroupAdvantage(),
        policy_loss=GrpoLoss(),
        engine=LocalEngine(),
        push=AutoPush(),
        environment=Single(),
        optim=replace(OPTIM, warmup_steps=1, decay="constant"),
    )


class Digits:
    """Stands in for the reward processes: half of the last digit of the response's length, so that groups differ."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None:
        pass

    def score(self, problems, texts):
        from r1mega.rl.types import RewardRecord

        return [{"accuracy": RewardRecord(len(text) % 10 / 2, 0.0), "format": RewardRecord(0.0, 0.0)} for text in texts]


@pytest.fixture
def digits(monkeypatch) -> None:
    monkeypatch.setattr("r1mega.rl.setup.RewardRunner", Digits)


@pytest.fixture(scope="module")
def straight(place: Path) -> dict[str, Any]:
    """Two rollouts in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r1mega.rl.setup.RewardRunner", Digits)
        return rl(config(place, place / "straight"))


def test_two_rollouts(place: Path, straight) -> None:
    told = lines(place / "straight")
    assert (straight["rollouts"], straight["updates"]) == (2, 4)
    assert [(line["rollout"], line["update"]) for line in told] == [(1, 2), (2, 4)]
    for line in told:
        assert 0 <= line["rollout_diff_mean"] <= line["rollout_diff_max"] < 1e-4
        assert line["reward"] > 0 and line["reward_std"] > 0 and line["reward"] == line["accuracy"] and line["format"] == 0
        assert 1 <= line["response_length"] <= 6 and 0 <= line["truncated"] <= 1 and line["reward_failed"] == 0
        assert line["grad_norm"] > 0 and line["lr"] == OPTIM.lr and line["entropy"] > 3
        assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in line["expert_load"]) and line["expert_load"]
        assert all(line[name] > 0 for name in TIMED)
    assert straight["tokens"] == told[-1]["tokens"] > told[0]["tokens"] > 0
    seed, after = (stored(latest(place / name / "checkpoints")) for name in ("seed", "straight"))
    moved = [name for name in seed if not name.startswith("optimizer.") and not torch.equal(seed[name], after[name])]
    assert "output_layer.weight" in moved and any("experts" in name for name in moved)
    state = checkpoint.read_state(latest(place / "straight/checkpoints"))
    assert state["init"]["digest"] == checkpoint.digest(place / "seed") and state["cursor"]["consumed"] == 4
    for line in told:
        assert line["push_proof"] == "checksum" and line["push_bytes"] > 0 and line["staleness_max"] == 0 and line["turns"] == 1
        assert line["tokens_per_second"] > 0 and line["generated_tokens_per_second"] > 0 and 0 <= line["engine_idle_share"] < 1
        assert line["reward/problems"] == line["reward"] and line["responses"] == 8 and line["response_length_max"] <= 6
        assert 0 <= line["idle_share"] <= 1 and line["dropped_groups"] == 0 and line["slowest_reward_seconds"] >= 0


def test_the_ledger_says_what_each_rollout_used(place: Path, straight) -> None:
    history = History(place / "straight/ledger")
    assert history.audit() == []
    uses = history.uses()
    assert [frame.values["items"] for frames in uses.values() for frame in frames] == [[0, 1], [2, 3]]
    known = history.by_id()
    for (frame,) in uses.values():
        samples = [known[name] for name in frame.values["samples"]]
        assert [(entry.values["item"], entry.values["member"]) for entry in samples] == [
            (item, member) for item in frame.values["items"] for member in range(4)
        ]
        for entry, advantage in zip(samples, frame.values["advantages"], strict=True):
            arrays = entry.arrays()
            assert len(arrays["tokens"]) == len(arrays["logprobs"]) <= 6 and math.isfinite(advantage)
            version = 0 if frame.values["rollout"] == 1 else 2
            assert entry.values["versions"] == [[version, 0, len(arrays["tokens"])]]
            assert set(entry.values["rewards"]) == {"accuracy", "format"}


def test_why_timeline_and_report_of_a_run(place: Path, straight) -> None:
    """The update that the ledger names for a sample is the one whose minibatch it was in: those of the learner's own order."""
    run = place / "straight"
    told = api.why(f"run={run}", "step=2")
    order = list(range(8))
    random.Random("1:1:minibatches").shuffle(order)
    assert [row["update"] for row in told["samples"]] == [3 if place in order[0::2] else 4 for place in range(8)]
    assert (told["updates"], told["staleness_tokens"]) == ([3, 4], {"0": told["tokens"]}) and told["faults"] == []
    assert {"rollout", "value", "score", "train", "push"} == set(told["seconds"]) and told["sources"]["problems"]["samples"] == 8
    for row in told["samples"]:
        assert row["began"] <= row["generated"] <= row["judged"] <= row["used"] and row["logprobs"]["count"] == row["tokens"]
    line = lines(run)[1]
    assert line["reward"] == pytest.approx(sum(row["reward"] for row in told["samples"]) / 8, rel=1e-4)
    one = api.why(f"run={run}", f"sample={told['samples'][0]['sample']}")
    assert "+1" in one["prompt"] and one["response"] is not None and one["rollout"] == 2
    assert api.why(f"run={run}")["samples"] == {"used": 16, "dropped": 0, "waiting": 0, "void": 0}
    traced = api.timeline(f"run={run}", f"target={place / 'trace.json'}")
    assert traced["samples"] == 16 and traced["rollouts"] == [1, 2]
    api.report(f"run={run}", f"target={place / 'page.html'}")
    page = (place / "page.html").read_text()
    assert all(title in page for title in ("Samples: straight", "Reward by source: straight", "Slowest rewards", "Generation"))


def test_a_run_that_is_asked_to_end_saves_and_goes_on_bit_for_bit(place: Path, straight, digits, tmp_path, monkeypatch) -> None:
    true = Learner.score

    def signalled(self, rows):
        monkeypatch.setattr(Learner, "score", true)
        os.kill(os.getpid(), signal.SIGTERM)
        return true(self, rows)

    monkeypatch.setattr(Learner, "score", signalled)
    with pytest.raises(Stopped, match="stopped: SIGTERM came, rollout 1 of 2 is saved; the same command goes on from there"):
        rl(config(place, tmp_path / "run", save_every=0))
    assert [line["rollout"] for line in lines(tmp_path / "run")] == [1]
    rl(config(place, tmp_path / "run", save_every=0))
    left, right = (stored(latest(run / "checkpoints")) for run in (place / "straight", tmp_path / "run"))
    assert left.keys() == right.keys() and not [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("on_spike", ["skip", "rollback", "stop"])
def test_an_update_that_is_not_finite(place: Path, digits, tmp_path, monkeypatch, on_spike: str) -> None:
    """The second rollout's first update is spoilt."""
    true, calls = GrpoLoss.build, iter(range(1_000))

    def build(self):
        loss = true(self)

        def spoilt(*args, **kwargs):
            value, stats = loss(*args, **kwargs)
            return (value * float("nan") if next(calls) == 4 else value), stats  # two microbatches an update, two updates a rollout

        return spoilt

    monkeypatch.setattr(GrpoLoss, "build", build)
    run = config(place, tmp_path / "run", on_spike=on_spike, micro_batch_size=2)
    if on_spike == "stop":
        with pytest.raises(
            UserError, match="training: sound updates with rl.on_spike=stop; got loss nan .* in rollout 2; lower optim.lr"
        ):
            rl(run)
        return
    result = rl(run)
    told = lines(tmp_path / "run")
    assert [line["rollout"] for line in told] == [1, 2, 2] and result["rollouts"] == 2 and result["updates"] == 4
    assert told[1]["event"] == ("1 of its updates skipped" if on_spike == "skip" else "rolled back to rollout 1")
    assert "loss nan" in told[1]["reason"] and all(math.isfinite(told[2][name]) for name in ("loss", "grad_norm", "entropy", "kl"))
    cursor = checkpoint.read_state(latest(tmp_path / "run/checkpoints"))["cursor"]
    assert cursor["consumed"] == (4 if on_spike == "skip" else 6), "after a roll-back the prompts are others"
    history = History(tmp_path / "run/ledger")
    assert history.audit() == []
    dropped = [frame.values["items"] for frames in history.uses().values() for frame in frames if frame.kind == "drop"]
    assert dropped == ([] if on_spike == "skip" else [[2, 3]])
    assert all(torch.isfinite(value).all() for value in stored(latest(tmp_path / "run/checkpoints")).values())


def test_a_run_that_is_cut_off_goes_on_bit_for_bit(place: Path, straight, digits, monkeypatch) -> None:
    class CutOff(Exception):
        pass

    train = Learner.train

    def cut(self, rows, rollout):
        if rollout == 1:
            raise CutOff
        return train(self, rows, rollout)

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Learner, "train", cut)
        rl(config(place, place / "cut", async_save=False))
    made = []
    true = Rollouts._episode
    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "_episode", lambda self, item, member: made.append((item, member)) or true(self, item, member))
        rl(config(place, place / "cut", async_save=False))
    assert made == [], "what had been judged before the crash is not made again"
    assert History(place / "cut/ledger").audit() == []
    ours, theirs = (latest(place / name / "checkpoints") for name in ("straight", "cut"))
    left, right = stored(ours), stored(theirs)
    assert left.keys() == right.keys() and not [name for name in left if not torch.equal(left[name], right[name])]
    left, right = stored(ours, "reference"), stored(theirs, "reference")
    assert left and left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    told = [
        [{key: value for key, value in line.items() if key not in (*TIMED, *MAY_BE_NOTHING)} for line in lines(place / name)]
        for name in ("straight", "cut")
    ]
    assert told[0] == told[1]


@pytest.fixture
def loop(place: Path, tmp_path: Path):
    """A run before its first rollout; ``loop(**sizes)``."""
    with ExitStack() as stack:
        numbers = count()

        def make(**sizes: Any) -> Run:
            settings = config(place, tmp_path / f"run{next(numbers)}", **sizes)
            run = Run(settings, open_run_mesh(settings), checkpoint.resolve(place / "seed"), Digits(), stack)
            run.push()
            return run

        yield make


def test_a_run_is_scraped(place: Path, tmp_path: Path) -> None:
    settings = config(place, tmp_path / "run")
    settings.log.prometheus_port = free_port()
    with ExitStack() as stack:
        run = Run(settings, open_run_mesh(settings), checkpoint.resolve(place / "seed"), Digits(), stack)
        run.push()
        turn(run)
        found = parsed(scrape(settings.log.prometheus_port).text)
    label = 'run="run"'
    counted = [found[f"r1mega_{name}_total", label] for name in ("rollouts", "samples", "reward_failures", "engine_deaths")]
    assert counted == [1.0, 8.0, 0.0, 0.0] and found["r1mega_update", label] == 2.0 and found["r1mega_push_seconds", label] > 0
    assert found["r1mega_reward_by_source", f'{label},source="problems"'] == pytest.approx(found["r1mega_reward", label])


def taken(run: Run) -> tuple[list[RolloutRow], dict[str, list[float]]]:
    """Rows of the next rollout, and what the rewards said."""
    return run.value(run.take())


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.policy.trainee.named_tensors()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_the_real_rewards_run(place: Path, tmp_path: Path) -> None:
    result = rl(config(place, tmp_path / "real", rollouts=1, updates_per_rollout=1))
    (line,) = lines(tmp_path / "real")
    assert result["updates"] == 1 and 0 <= line["reward"] <= 2 and line["reward_failed"] == 0 and line["rollout_diff_max"] < 1e-4


def two_ranks(place: Path, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[float]]:
    """One rank's loop: its result, its weights at the end, the log-probabilities that it drew its responses with."""
    settings = config(place, out, valid=ValidConfig(every=2, problems=str(place / "problems.jsonl"), limit=5))
    drawn = []
    with ExitStack() as stack:
        run = Run(settings, open_run_mesh(settings), checkpoint.resolve(place / "seed"), Digits(), stack)
        stack.enter_context(run.saver)
        take = run.take

        def keep():
            made = take()
            drawn.extend(value for sample in made.samples for value in sample.completion.logprobs)
            return made

        run.take = keep
        run.begin()
        for _ in range(settings.rl.rollouts):
            turn(run)
        return run.finish(), weights(run), drawn


@pytest.mark.parametrize("sizes", [{"lag": 1}, {"lag": 2, "oversample": 1.5}])
def test_running_ahead(place: Path, digits, tmp_path: Path, sizes) -> None:
    """Bounded staleness, every question once, also over a cut and a start with another lag."""
    rl(config(place, tmp_path / "run", rollouts=4, **sizes))
    told = lines(tmp_path / "run")
    bound = 2 * (sizes["lag"] + ("oversample" in sizes))
    assert [line["rollout"] for line in told] == [1, 2, 3, 4] and max(line["staleness_max"] for line in told) > 0
    assert all(line["staleness"] <= line["staleness_max"] <= bound for line in told), "two updates a rollout"
    rl(config(place, tmp_path / "run", rollouts=5))
    history = History(tmp_path / "run/ledger")
    assert history.audit() == [] and sorted(history.uses()) == [1, 2, 3, 4, 5]
    assert lines(tmp_path / "run")[-1]["staleness_max"] <= bound


@pytest.mark.slow
def test_two_ranks_share_the_questions_and_agree_on_the_weights(place: Path) -> None:
    close_mesh()
    (first, ours, mine), (second, theirs, others) = run_ranks(two_ranks, 2, place, place / "two")
    assert first["tokens"] == second["tokens"] and first["updates"] == 4
    assert same(ours, theirs) and mine != others
    told = lines(place / "two")
    assert [line["rollout"] for line in told] == [0, 1, 2] and all(line["rollout_diff_max"] < 1e-4 for line in told[1:])
    assert ["valid_pass_at_1" in line for line in told] == [True, False, True], "three and two of the held-out questions a rank"
    assert torch.equal(stored(first["checkpoint"])["output_layer.weight"], ours["output_layer.weight"])


def test_another_prompt_file_is_not_gone_on_with(place: Path, straight, tmp_path: Path) -> None:
    shutil.copytree(place / "straight", tmp_path / "run")
    other = config(place, tmp_path / "run", rollouts=3)
    text = (place / "problems.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(text)
    (tmp_path / "other.jsonl").write_text("".join(text))
    other.data.problems = str(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="data.problems: a run goes on with the problems"):
        rl(other)
