"""Every layout trains what one process trains, and every layout's checkpoint loads under every other. Ranks are started once a size."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from r1mega.mesh import close_mesh
from r1mega.testing import parity
from r1mega.testing.parity import Case, differences
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint
from tests.parity.layouts import CASES, MORE, RESHARDED, by_name, num_ranks


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """All runs of :data:`CASES`."""
    close_mesh()
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="session")
def ran(folder: Path):
    """Makes the runs of one number of ranks at the first request."""
    done: set[tuple[bool, int]] = set()

    def run(world: int, more: bool = False) -> Path:
        if (more, world) not in done:
            began = time.time()
            parity.run((MORE if more else CASES)[world], world, folder)
            done.add((more, world))
            print(f"{world} ranks: {time.time() - began:.0f} s")
        return folder

    return run


def marks(num_ranks: int) -> tuple:
    """Two cores have time for two ranks."""
    return (pytest.mark.slow,) if num_ranks > 2 else ()


def named(cases: dict[int, list[Case]]):
    return [pytest.param(world, case, id=case.name, marks=marks(world)) for world, group in cases.items() for case in group]


@pytest.mark.parametrize(("world", "case"), named(CASES))
def test_a_layout_learns_what_one_process_learns(ran, world: int, case: Case) -> None:
    assert differences(case, ran(world)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), named(MORE))
def test_more_layouts_learn_what_one_process_learns(ran, world: int, case: Case) -> None:
    assert differences(case, ran(world, more=True)) == []


FRESH = {"ep2": {"expert": 2}, "etp2": {"expert_tensor": 2}, "pp2": {"pipeline": 2}, "tp2_ep2": {"tensor": 2, "expert": 2}}


def start(folder: Path) -> None:
    """One rank's part: fresh weights of each layout, saved."""
    for name, degrees in FRESH.items():
        trainee = parity.build(Case(name, degrees), "cpu")
        trainee.allocate_moments()
        state = checkpoint.TrainState()
        checkpoint.save(trainee, state, folder / name, keep_last=1, tokenizer=None, parent=None, command="parity")
        close_mesh()


@pytest.mark.slow
def test_fresh_experts_and_stages_are_no_copies_of_each_other(tmp_path: Path) -> None:
    run_ranks(start, 2, tmp_path)
    for name in FRESH:
        weights = checkpoint.plain_tensors(checkpoint.resolve(tmp_path / name), without="optimizer.")
        parts = [
            half
            for key, tensor in sorted(weights.items())
            if "experts.weight1" in key
            for expert in tensor
            for half in expert.chunk(4)  # gate and up, each cut in two
        ]
        attention = [tensor for key, tensor in weights.items() if "linear_q_up_proj.weight" in key]
        for group in (parts, attention):
            assert len(group) > 4 and len({tuple(part.flatten()[:8].tolist()) for part in group}) == len(group), name


def reshard(pairs: list[tuple[str, str]], folder: Path) -> None:
    """One rank's part: load each checkpoint under the other layout and save it again."""
    for source, target in pairs:
        case = by_name(target)
        trainee = parity.build(case, "cpu")
        path = checkpoint.resolve(folder / source / "last.run")
        state = checkpoint.load(trainee, path)
        rng = trainee.mesh.device.rng_state()
        out = folder / f"{source}_to_{target}"
        checkpoint.save(trainee, state, out, keep_last=1, tokenizer=None, parent=None, command="parity")
        if trainee.mesh.is_first:
            saved = torch.load(path / "rng.pt", weights_only=True)[0]
            kept = all(torch.equal(value, saved[name]) for name, value in rng.items())
            (out / "kept.json").write_text(json.dumps({"rng": kept, "cursor": state.cursor, "step": state.step}))
        close_mesh()


@pytest.fixture(scope="session")
def resharded(ran):
    """Loads and saves again all pairs of one number of ranks at the first request."""
    done: set[tuple[int, bool]] = set()

    def run(world: int, more: bool) -> Path:
        pairs = [pair for pair in RESHARDED[world] if (most_ranks(world, pair) > 2) == more]
        for size in sorted({num_ranks(source) for source, _ in pairs}):
            folder = ran(size)
        if (world, more) not in done:
            run_ranks(reshard, world, pairs, folder, timeout_seconds=400)
            done.add((world, more))
        return folder

    return run


def most_ranks(world: int, pair: tuple[str, str]) -> int:
    """Of the two layouts of a pair; ``world``: those of the one that loads."""
    return max(world, num_ranks(pair[0]))


@pytest.mark.parametrize(
    ("world", "source", "target"),
    [
        pytest.param(world, *pair, id="-".join(pair), marks=marks(most_ranks(world, pair)))
        for world, pairs in RESHARDED.items()
        for pair in pairs
    ],
)
def test_a_checkpoint_loads_under_another_layout_bit_for_bit(resharded, world: int, source: str, target: str) -> None:
    folder = resharded(world, most_ranks(world, (source, target)) > 2)
    before = checkpoint.plain_tensors(checkpoint.resolve(folder / source / "last.run"))
    after = checkpoint.plain_tensors(checkpoint.resolve(folder / f"{source}_to_{target}"))
    assert before.keys() == after.keys() and any(name.startswith("optimizer.state.exp_avg_sq.") for name in before)
    assert not [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    kept = json.loads((folder / f"{source}_to_{target}" / "kept.json").read_text())
    assert kept == {"rng": True, "cursor": parity.CURSOR, "step": Case.steps}
