"""Routing replay over ranks that share a model or a sequence: scoring and updates with given experts are one rank's."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.config.run import ParallelConfig
from r1mega.mesh import close_mesh
from r1mega.rl.engine import LocalEngine
from r1mega.rl.run import Run
from r1mega.rl.setup import open_run_mesh
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint
from tests.rl.test_context import BALANCE_OFF, LAYOUTS, TOLERANCE, rows, whole
from tests.rl.test_loop import Digits, config, place  # noqa: F401  place is a fixture
from tests.train.cases import MODEL

pytestmark = pytest.mark.slow  # two ranks in every layout, twice

MODES = ("r3", "r2")


def told_rows() -> list:
    """Rows of many lengths; engine's experts of chance for most of their tokens: some prompts' first ones, and a whole row, are left
    out, as is what no engine reads."""
    draw, made = torch.Generator().manual_seed(11), rows(equal=False)
    for number, row in enumerate(made):
        experts = torch.rand(row.size - 1, MODEL.num_layers, MODEL.num_experts, generator=draw).topk(MODEL.top_k, dim=-1).indices
        experts = experts.to(torch.uint8)
        if number % 2:
            experts[:2] = 255
        if number != 5:
            row.completion = replace(row.completion, routed_experts=experts)
    return made


def replayed(place: Path, out: Path, mode: str, **degrees: Any) -> dict[str, Any]:  # noqa: F811
    """Two updates: log-probabilities before and after, the agreement, the numbers of the updates, all weights."""
    with ExitStack() as stack:
        settings = config(place, out / mode, micro_batch_size=3, routing_replay=mode)
        settings.model, settings.parallel, settings.engine = (
            BALANCE_OFF,
            ParallelConfig(**degrees),
            LocalEngine(routed_experts=True),
        )
        run = Run(settings, open_run_mesh(settings), checkpoint.resolve(place / "seed"), Digits(), stack)
        stack.enter_context(run.saver)
        batch = told_rows()
        run.learner.score(batch)
        agreement, before = run.learner.agreement, [(row.old, row.ref) for row in batch]
        kept = [row.replay for row in batch]
        results = run.learner.train(batch, 0)
        run.learner.score(batch)
        numbers = [(result.loss, result.grad_norm, result.stats) for result in results]
        after = [(row.old, row.ref) for row in batch]
        return {"agreement": agreement, "before": before, "after": after, "numbers": numbers, "kept": kept, "weights": whole(run)}


def two_ranks(place: Path, out: Path) -> dict[tuple[str, str], Any]:  # noqa: F811
    found = {}
    for name, degrees in LAYOUTS.items():
        for mode in MODES:
            found[name, mode] = replayed(place, out / name, mode, **degrees)
            close_mesh()
    return found


@pytest.fixture(scope="module")
def one(place: Path) -> dict[str, Any]:  # noqa: F811
    close_mesh()
    found = {}
    for mode in (*MODES, "none"):
        found[mode] = replayed(place, place / "one", mode)
        close_mesh()
    return found


@pytest.fixture(scope="module")
def two(place: Path) -> list[dict[tuple[str, str], Any]]:  # noqa: F811
    return run_ranks(two_ranks, 2, place, place / "replayed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_with_given_experts_are_those_of_one_rank(one, two, layout: str, mode: str) -> None:
    theirs = one[mode]
    for rank in two:
        ours = rank[layout, mode]
        assert ours["agreement"] == pytest.approx(theirs["agreement"]) and len(ours["agreement"]) == 1
        for when in ("before", "after"):
            for mine, other in zip(ours[when], theirs[when], strict=True):
                for got, want in zip(mine, other, strict=True):
                    assert got.shape == want.shape and len(got)
                    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        for got, want in zip(ours["numbers"], theirs["numbers"], strict=True):
            assert got[0] == pytest.approx(want[0], abs=TOLERANCE) and got[1] == pytest.approx(want[1], abs=TOLERANCE)
            assert got[2] == pytest.approx(want[2], abs=1e-4)
        assert ours["weights"].keys() == theirs["weights"].keys()
        for name, tensor in ours["weights"].items():
            torch.testing.assert_close(
                tensor, theirs["weights"][name], atol=TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_the_experts_show(one) -> None:
    """Given experts are others than the routers' own, and r2's are what it chose."""
    differ = [(mine[0] - other[0]).abs().max() for mine, other in zip(one["r3"]["before"], one["none"]["before"], strict=True)]
    assert sum(value > 1e-4 for value in differ) >= 6 and differ[5] < 1e-6, "the sixth row has no record"
    for mine, other in zip(one["r2"]["before"], one["none"]["before"], strict=True):
        assert torch.equal(mine[0], other[0])
    assert one["none"]["agreement"] == one["r2"]["agreement"] and 0 <= one["r3"]["agreement"][0] < 0.5
    assert all(record is not None for record in one["r2"]["kept"]) and all(record is None for record in one["r3"]["kept"])
