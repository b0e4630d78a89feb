"""The look at every rollout: what is outside its budget is told, skipped or ends the run, over all ranks; and the evidence of it."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega.cli import main
from r1mega.config.compose import save_config
from r1mega.config.errors import UserError
from r1mega.config.rl import DiffBudgetConfig
from r1mega.config.run import PrecisionConfig
from r1mega.mesh import close_mesh
from r1mega.rl.autopsy.evidence import Row, folder_of, kept, read
from r1mega.rl.autopsy.watch import USUAL, Budget, Gap, budget_of, format_of, gap_of
from r1mega.rl.ledger import History
from r1mega.rl.loop import turn
from r1mega.testing.ranks import run_ranks
from tests.rl.autopsy.cases import config, opened, places, rollout
from tests.train.cases import lines, one_rank

HEAD = "lm_head.weight"


def row(engine, trainer, own=None, versions=()) -> Row:
    count = len(engine)
    return Row(0, [1], [2] * count, torch.tensor(engine), torch.tensor(trainer), torch.tensor(own or [True] * count), versions)


def test_the_numbers() -> None:
    close_mesh()
    rows = [
        row([-1.0, -2.0, -9.0], [-1.5, -2.0, 0.0], [True, True, False]),
        row([-1.0, -1.0], [-2.0, -1.0], None, ((3, 0, 1), (4, 1, 2))),
    ]
    gap = gap_of(one_rank(), rows, version=4)
    assert (gap.tokens, gap.stale_tokens, gap.stale_mean, gap.max) == (3, 1, 1.0, 0.5)
    assert gap.mean == pytest.approx(0.5 / 3) and gap.kl == pytest.approx((math.exp(-0.5) - 1 + 0.5) / 3)
    assert gap_of(one_rank(), [], 0) == Gap(0, 0, 0, 0, 0, 0)
    broken = gap_of(one_rank(), [row([-1.0], [math.nan])], 0)
    assert len(USUAL["fp8"].faults(broken, None)) == 3, "no number is outside every budget"


def test_limits_come_from_the_format_and_the_config() -> None:
    fp32, bf16 = PrecisionConfig(), PrecisionConfig(dtype="bf16")
    assert format_of(fp32, None) == "fp32" and format_of(bf16, SimpleNamespace(dtype=torch.float32)) == "bf16"
    assert format_of(fp32, SimpleNamespace(dtype=torch.bfloat16)) == "bf16"
    served = [SimpleNamespace(info={"dtype": "float32"}), SimpleNamespace(info={"dtype": "auto", "quantization": "fp8"})]
    assert (
        format_of(fp32, SimpleNamespace(servers=served[:1])) == "fp32" and format_of(fp32, SimpleNamespace(servers=served)) == "fp8"
    )
    assert format_of(replace(bf16, products="fp8"), None) == "fp8"
    assert budget_of(DiffBudgetConfig(max=7.0), "bf16") == replace(USUAL["bf16"], max=7.0)
    gap = Gap(mean=0.2, max=1.0, kl=0.01, tokens=9, stale_mean=0.6, stale_tokens=3)
    assert Budget(0.1, 5.0, 0.05).faults(gap, 0.5) == ["mean 0.2 above 0.1", "stale_mean 0.6 above 0.5"]
    assert Budget(0.3, 5.0, 0.05).faults(gap, None) == []


def spoil(run) -> None:
    """The engine's head is another one."""
    places(run)[HEAD].mul_(1.5)


def spoiling(run) -> None:
    """Every push is spoilt."""
    true = run.push

    def push() -> None:
        true()
        spoil(run)

    run.push = push


def test_warn_trains_on_and_keeps_the_first_few(begin) -> None:
    run = begin(diff_budget=DiffBudgetConfig(rows=3, keep=1))
    spoiling(run)
    run.push()
    for _ in range(2):
        turn(run)
    told = lines(run.folder)
    events, plain = [line for line in told if "event" in line], [line for line in told if "event" not in line]
    assert [event["event"] for event in events] == ["trained on all the same"] * 2 and len(plain) == 2
    assert f"r1mega autopsy run={run.folder} step=1" in events[0]["reason"] and "no evidence kept" in events[1]["reason"]
    assert all(line["rollout_kl"] > 1e-3 and line["diff_skipped"] == 0 and line["grad_norm"] > 0 for line in plain)
    assert kept(run.folder) == [1]
    found = read(run.folder, 1)
    assert (found.rollout, found.version, len(found.rows)) == (1, 0, 3)
    means = found.facts["row_means"]
    worst = sorted(range(8), key=lambda place: -means[place])[:3]
    assert [entry.place for entry in found.rows] == worst
    first = found.rows[0]
    assert float((first.engine - first.trainer).abs().mean()) == pytest.approx(means[worst[0]], rel=1e-5)
    assert found.held.wrong == [HEAD] and torch.equal(found.held.tensors[HEAD], 1.5 * found.weights[HEAD])
    assert set(found.sums) == set(found.weights) and found.held.asked > 50


def test_skip_leaves_the_weights_and_counts(begin) -> None:
    run = begin(diff_budget=DiffBudgetConfig(action="skip", weights_bytes=0))
    spoiling(run)
    run.push()
    before = {name: tensor.clone() for name, tensor in run.policy.trainee.named_tensors()}
    turn(run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.policy.trainee.named_tensors())
    del run.push  # sound from here on
    run.push()
    turn(run)
    event, first, second = lines(run.folder)
    assert event["event"] == "not trained on" and "loss" not in first and first["diff_skipped"] == second["diff_skipped"] == 1
    assert (first["update"], second["update"]) == (1, 2) and second["grad_norm"] > 0, "its updates count, made or not"
    history = History(run.folder / "ledger")
    frames = [frame for frames in history.uses().values() for frame in frames]
    assert [(frame.kind, frame.values.get("reason")) for frame in frames] == [("drop", "rl.diff_budget"), ("use", None)]
    assert history.audit() == [], "each question once"
    assert not (folder_of(run.folder, 1) / "weights.pt").exists()


def test_stop_names_the_command_and_off_does_not_look(begin) -> None:
    run = begin(diff_budget=DiffBudgetConfig(action="stop", mean=0.01))
    with pytest.raises(
        UserError, match=r"rl.diff_budget: at most mean 0.01, .*; got rollout 1: .* nats; see why with r1mega autopsy run="
    ):
        rollout(run, spoil)
    assert kept(run.folder) == [1]
    run = begin(diff_budget=DiffBudgetConfig(action="off"))
    assert rollout(run, spoil) and kept(run.folder) == []


def on_rank(place: Path, out: Path) -> list[int]:
    """The rows that this rank's evidence has; the engine of the second rank alone is spoilt."""
    with ExitStack() as stack:
        run = opened(config(place, out), stack)
        rollout(run, lambda run: spoil(run) if run.mesh.rank == 1 else None)
        return [run._watch.gap.tokens, run.mesh.rank]


@pytest.mark.slow
def test_one_of_two_ranks_is_off(autopsy_place: Path, tmp_path: Path) -> None:
    close_mesh()
    (tokens, _), (same, _) = run_ranks(on_rank, 2, autopsy_place, tmp_path / "run")
    assert tokens == same, "over both ranks"
    found = read(tmp_path / "run", 1)
    gaps = {
        rank: max(float((entry.engine - entry.trainer).abs().max()) for entry in found.rows if entry.rank == rank)
        for rank in (0, 1)
    }
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]
    assert found.held.wrong == [], "the first rank's engine is sound"
    assert main(["autopsy", f"run={tmp_path / 'run'}", "passes=1"]) == 2, (
        "another rank's engine was not asked, and there is no search"
    )


def test_the_command_line(begin, autopsy_place: Path, capsys) -> None:
    run = begin()
    assert rollout(run, spoil)
    run.mesh.barrier()
    assert main(["autopsy", f"run={run.folder}", "step=1", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["causes"][0]["kind"] == "quantisation" and told["causes"][0]["where"] == [HEAD] and told["side"] == "engine"
    assert "scaled by 1.5" in told["causes"][0]["says"]
    assert main(["autopsy", f"run={run.folder}", "step=7"]) == 2
    assert "got 7; evidence is there of 1" in capsys.readouterr().err
    path = next(folder_of(run.folder, 1).glob("rank-*.pt"))
    path.write_bytes(b"torn")
    assert main(["autopsy", f"run={run.folder}"]) == 2 and "remove its folder" in capsys.readouterr().err


def test_by_the_ledger_where_no_evidence_is_left(begin, autopsy_place: Path, capsys) -> None:
    run = begin(diff_budget=DiffBudgetConfig(action="off"), temperature=0.7)
    save_config(run.config, run.folder, overrides=(), choices={"engine": "local", "push": "auto", "advantage": "grpo"})
    true = run.engine.generate
    run.engine.generate = lambda prompts, sampling, *rest: true(prompts, replace(sampling, temperature=1.0), *rest)
    run.push()
    turn(run)
    turn(run)
    assert main(["autopsy", f"run={run.folder}", "step=2"]) == 0
    out = capsys.readouterr().out
    assert "rows are the ledger's" in out and "1. sampling" in out and "does not apply the temperature 0.7" in out
