"""balance=eplb in a run: experts move at checkpoints, what is learnt stays the same, and a run that is cut off goes on bit for bit.

Two ranks, and four with a pipeline, are started once each and do every run in turn.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.config.run import ParallelConfig
from r1mega.mesh import close_mesh
from r1mega.model.balance import Eplb
from r1mega.testing.ranks import run_ranks
from r1mega.train.checkpoint import latest
from r1mega.train.experts import Placements
from r1mega.train.pretrain import pretrain
from r1mega.train.sft import sft
from r1mega.train.trainee import Trainee
from tests.train.cases import MODEL, OPTIM, lines, one_rank, pretrain_config, sft_config, stored
from tests.train.test_layouts import assert_same_weights, cut_off

THREE = replace(MODEL, num_layers=3, num_groups=1, topk_groups=1, top_k=2)
"""A dense layer, then two with experts: one for each of two pipeline stages. Without groups, whose members would be chosen together."""
STEPS, MOVES = 5, (2, 4)
"""Where experts may move, every step is saved, and every second checkpoint may move them."""
PLAIN = list(range(MODEL.num_experts))
TOLERANCE = 1e-5
FOUR = {"pipeline": 2, "expert": 2}


def run(data: Path, out: Path, *, balance: Any = None, degrees: dict[str, int], command: str = "pretrain") -> None:
    """To ``STEPS``, or on from where ``out`` stands; SFT from the seed. ``balance`` None: none."""
    trainer = {"micro_batch_size": 2, "save_every": int(balance is not None), "keep_last": STEPS}
    if command == "sft":
        config = sft_config(data, data / "three", out, 3, **trainer)
    else:
        config = pretrain_config(data, out, STEPS, model=THREE, **trainer)
        config.init = str(data / "three")
    config.balance, config.parallel = balance or config.balance, ParallelConfig(**degrees)
    gc.freeze()  # Megatron collects garbage twice a save, among all that was ever imported: most of the time here
    try:
        sft(config) if command == "sft" else pretrain(config)
    finally:
        close_mesh()


def noting_places(call) -> list[list[tuple[int, ...]]]:
    """The experts that this rank's layers hold, each time that ``call()`` sets them."""
    seen, put = [], Placements.put

    def noted(self) -> None:
        put(self)
        seen.append([experts.local_experts() for _, experts in self._layers()])

    Placements.put = noted
    try:
        call()
    finally:
        Placements.put = put
    return seen


def two_ranks(data: Path, there: Path) -> list[list[tuple[int, ...]]]:
    """Everything that two ranks do; returns where the experts of ``moved`` lay."""
    eplb, degrees = Eplb(every=2, min_gain=0.0), {"expert": 2}
    run(data, there / "none", degrees=degrees)
    seen = noting_places(lambda: run(data, there / "moved", balance=eplb, degrees=degrees))
    cut_off(data, there / "cut", lambda: run(data, there / "cut", balance=eplb, degrees=degrees), 3)
    go_on(data, there, "moved", "moved_then_data", degrees={})
    run(data, there / "sft_none", degrees=degrees, command="sft")
    run(data, there / "sft_moved", balance=eplb, degrees=degrees, command="sft")
    return seen


def four_ranks(data: Path, there: Path) -> list[list[tuple[int, ...]]]:
    """The same with two stages, and on with twice as many ranks for the experts."""
    eplb = Eplb(every=2, min_gain=0.0)
    seen = noting_places(lambda: run(data, there / "stages_moved", balance=eplb, degrees=FOUR))
    cut_off(data, there / "stages_cut", lambda: run(data, there / "stages_cut", balance=eplb, degrees=FOUR), 3)
    go_on(data, there, "stages_moved", "stages_then_expert", balance=eplb, degrees={"expert": 4})
    return seen


def go_on(data: Path, there: Path, source: str, name: str, **how: Any) -> None:
    """On from ``source``'s checkpoint behind its first move, in another layout."""
    if os.environ["RANK"] == "0":  # the others meet it in the run before they look
        step = f"checkpoints/step-{MOVES[0] + 1:08d}"
        (there / name / "checkpoints").mkdir(parents=True)
        shutil.copytree(there / source / step, there / name / step)
    run(data, there / name, **how)


@pytest.fixture(scope="module")
def runs(train_data: Path, tmp_path_factory) -> tuple[Path, list]:
    """The folder of two ranks' runs, and where the experts of ``moved`` lay on each."""
    folder = tmp_path_factory.mktemp("balance")
    close_mesh()
    if not (train_data / "three").is_dir():
        pretrain(pretrain_config(train_data, train_data / "three", 1, model=THREE))
        close_mesh()
    return folder, run_ranks(two_ranks, 2, train_data, folder)


@pytest.fixture(scope="module")
def stages(runs, train_data: Path) -> tuple[Path, list]:
    """The same of four ranks, in the same folder."""
    return runs[0], run_ranks(four_ranks, 4, train_data, runs[0])


def placements(out: Path, step: int) -> list[list[int]]:
    """Where the checkpoint says that experts lie from there on."""
    state = json.loads((out / f"checkpoints/step-{step:08d}/state.json").read_text())
    return state["extra"]["placements"]["placements"]


def assert_same_run(left: Path, right: Path) -> None:
    """Losses, gradient norms and loads by expert of every step, and the last weights."""
    ours, theirs = (lines(out) for out in (left, right))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("lm_loss", "mtp_loss", "aux_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=2 * TOLERANCE), f"{name} of step {one['step']}"
        for mine, wanted in zip(one["expert_load"], other["expert_load"], strict=True):
            assert mine == pytest.approx(wanted, abs=1e-6), f"load of step {one['step']}"
    assert_same_weights(left, right, ours[-1]["step"], TOLERANCE)


def assert_moved(out: Path, seen: list, ranks: list[tuple[int, slice]]) -> None:
    """The checkpoints say so, and the layers of each rank (its place on ``expert``, its layers) had those experts."""
    first, last = placements(out, MOVES[0]), placements(out, STEPS)
    assert placements(out, 1) == [PLAIN, PLAIN]
    assert [sorted(place) for place in first + last] == [PLAIN] * 4
    assert PLAIN not in first and first[0] != first[1], "both layers moved, and not alike"
    assert last != first, "they moved twice"
    half = MODEL.num_experts // 2
    for (rank, layers), places in zip(ranks, seen, strict=True):
        for place, wanted in ((places[0], first), (places[-1], last)):
            assert place == [tuple(row[rank * half : (rank + 1) * half]) for row in wanted[layers]]


def assert_bit_for_bit(left: Path, right: Path) -> None:
    ours, theirs = (stored(latest(out / "checkpoints")) for out in (left, right))
    assert ours.keys() == theirs.keys() and any(".exp_avg" in name for name in ours)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    for name in ("lm_loss", "grad_norm", "expert_load", "balancedness_before", "balancedness_after"):
        assert [line.get(name) for line in lines(left)] == [line.get(name) for line in lines(right)]
    assert placements(left, STEPS) == placements(right, STEPS)


@pytest.mark.slow
def test_experts_move_and_the_run_learns_the_same(runs) -> None:
    folder, seen = runs
    assert_moved(folder / "moved", seen, [(0, slice(None)), (1, slice(None))])
    assert_same_run(folder / "moved", folder / "none")


@pytest.mark.slow
def test_the_lines_have_balancedness_where_it_was_considered(runs) -> None:
    considered = {line["step"]: line for line in lines(runs[0] / "moved") if "balancedness_before" in line}
    assert tuple(considered) == MOVES
    for line in considered.values():
        assert 0.5 <= line["balancedness_before"] and line["balancedness_after"] <= 1
        assert line["balancedness_before"] < line["balancedness_after"], "it moved because of a gain"
    assert not [line for line in lines(runs[0] / "none") if "balancedness_before" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moved", "cut"])
def test_the_load_is_that_of_all_steps_since_the_move(runs, name: str) -> None:
    out = runs[0] / name
    for move in MOVES:
        measured = [line["expert_load"] for line in lines(out) if move - 2 < line["step"] <= move]
        wanted = {"balancedness_before": placements(out, move - 1), "balancedness_after": placements(out, move)}
        for key, places in wanted.items():
            found = []
            for layer, place in enumerate(places):
                mean = [sum(load[layer][x] for load in measured) / len(measured) for x in place]
                found.append(0.5 / max(sum(mean[:4]), sum(mean[4:])))
            assert lines(out)[move - 1][key] == pytest.approx(sum(found) / len(found), abs=1e-5), f"{key} of step {move}"


@pytest.mark.slow
def test_a_run_cut_off_behind_a_move_goes_on_bit_for_bit(runs) -> None:
    assert_bit_for_bit(runs[0] / "cut", runs[0] / "moved")


@pytest.mark.slow
def test_a_run_goes_on_without_experts_ranks(runs) -> None:
    out = runs[0] / "moved_then_data"
    assert_same_weights(out, runs[0] / "none", STEPS, TOLERANCE)
    assert json.loads((latest(out / "checkpoints") / "state.json").read_text())["extra"]["placements"] == {}


@pytest.mark.slow
def test_sft_moves_experts_too(runs) -> None:
    out = runs[0] / "sft_moved"
    assert placements(out, 2) != [PLAIN, PLAIN]
    assert_same_run(out, runs[0] / "sft_none")


@pytest.mark.slow
def test_each_stage_moves_its_own_layers(stages) -> None:
    folder, seen = stages
    halves = [(0, slice(0, 1)), (1, slice(0, 1)), (0, slice(1, 2)), (1, slice(1, 2))]
    assert_moved(folder / "stages_moved", seen, halves)
    assert_same_run(folder / "stages_moved", folder / "none")
    assert_bit_for_bit(folder / "stages_cut", folder / "stages_moved")


@pytest.mark.slow
def test_another_number_of_experts_ranks_starts_from_the_logical_order(stages) -> None:
    folder, _ = stages
    out, start = folder / "stages_then_expert", MOVES[0] + 1
    assert placements(out, start) != [PLAIN, PLAIN], "it came from the other layout"
    assert_same_weights(out, folder / "none", STEPS, TOLERANCE)
    assert [line["step"] for line in lines(out) if "balancedness_before" in line] == [MOVES[1]]


def test_places_of_another_layout_and_of_no_balance_are_the_logical_order(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, tmp_path / "run", 2, model=THREE, save_every=1)
    trainee = Trainee(THREE, OPTIM, one_rank(), "fp32")
    moved = [[*PLAIN[1:], 0], PLAIN[::-1]]
    state = {"ranks": 1, "placements": moved, "load": [[1.0] * 8, [2.0] * 8], "steps": 3}

    def places() -> list[list[int]]:
        return [list(layer.mlp.experts.placement) for layer in trainee.module.decoder.layers[1:]]

    config.balance = Eplb()
    held = Placements(config, trainee)
    held.load_state_dict(state)
    assert places() == moved and json.loads(json.dumps(held.state_dict())) == state
    held.load_state_dict({**state, "ranks": 2})
    assert places() == [PLAIN, PLAIN] and held.state_dict()["load"] == state["load"]
    held.load_state_dict(state)
    held.load_state_dict({})
    assert places() == [PLAIN, PLAIN] and held.state_dict()["steps"] == 0
    held.load_state_dict(state)
    config.balance = pretrain_config(tmp_path, tmp_path / "run", 2).balance
    Placements(config, trainee).load_state_dict(state)
    assert places() == [PLAIN, PLAIN]


def test_a_checkpoints_model_without_a_measured_load_is_refused(tmp_path: Path) -> None:
    model = replace(THREE, use_expert_bias=False)
    config = pretrain_config(tmp_path, tmp_path / "run", 2, model=model, save_every=1)
    config.balance = Eplb()
    with pytest.raises(UserError, match=r"^model.use_expert_bias: .*balance=eplb.*; got false; .*balance=none"):
        Placements(config, Trainee(model, None, one_rank(), "fp32"))
