"""Context parallelism: parts, both exchanges of attention, whole models; losses and gradients are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.mesh import close_mesh
from r1mega.model.context import ALONE, ContextPart
from r1mega.testing.ranks import run_ranks
from tests.model import context_cases as cases

TOLERANCE = 1e-5


def test_the_parts_of_four_ranks_by_hand() -> None:
    row = torch.arange(16)[None]
    parts = [ContextPart(rank, 4, object()) for rank in range(4)]
    assert [part.cut(row)[0].tolist() for part in parts] == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert [part.parts for part in parts] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    by_rank = torch.cat([part.cut(row, 1)[0] for part in parts])
    assert parts[0].in_order(by_rank).tolist() == list(range(16))
    # each rank's rows in two pieces, all ranks' first pieces first: what a gather over the tensor axis makes of it
    pieces = torch.cat([part.cut(row)[0].chunk(2)[piece] for piece in range(2) for part in parts])
    assert parts[0].in_order(pieces, 2).tolist() == list(range(16))


def test_alone_nothing_is_cut() -> None:
    row = torch.arange(7)[None]
    assert ALONE.cut(row) is row and ALONE.gather(row) is row and ALONE.multiple == 1
    assert ALONE.positions(7, row.device).tolist() == row[0].tolist()


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="context: a length that 2 x 4 parts divide; got 12; pad it to a multiple"):
        ContextPart(0, 4, object()).cut(torch.zeros(1, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights and numbers of one rank."""
    place = tmp_path_factory.mktemp("context")
    close_mesh()
    cases.reference(place)
    close_mesh()
    return place


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(cases.two_ranks, 2, folder)


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(cases.four_ranks, 4, folder, timeout_seconds=240)


def assert_basics(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["round trip"] and all(found.get("rolled", [True]))
        for case, differences in found["attention"].items():
            assert len(differences) == 8 and max(differences) < 1e-12, f"{case}: {differences}"


def assert_models(ranks: list[dict[str, Any]], count: int) -> None:
    for found in ranks:
        assert len(found["models"]) == count
        for case in found["models"]:
            assert max(case["losses"], case["mtp"], case["gradients"]) < TOLERANCE, case


def test_two_ranks_cut_roll_and_attend_as_one(two) -> None:
    assert_basics(two)


def test_models_on_two_ranks_are_those_of_one(two) -> None:
    assert_models(two, 8)


@pytest.mark.slow
def test_three_ranks() -> None:
    assert_basics(run_ranks(cases.three_ranks, 3))


@pytest.mark.slow
def test_four_ranks_and_two_with_two_tensor_ranks(four) -> None:
    assert_basics(four)
    assert_models(four, 6)


def test_an_unknown_exchange_is_refused() -> None:
    from r1mega.model.attention import CoreAttention

    mesh = cases.mesh_of()
    config = cases.build(cases.MODEL, mesh).config
    with pytest.raises(ValueError, match="model: cp_comm_type is one of all_gather, p2p; got 'a2a'"):
        CoreAttention(config, 1, None, "self", 1.0, cp_comm_type="a2a")


def test_heads_take_turns_where_scores_are_many(monkeypatch) -> None:
    from r1mega.model import part_attention

    query, key, grad = (torch.randn(2, 5, 6, 4, dtype=torch.float64) for _ in range(3))
    value = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    keys = part_attention.Keys(0, 1, key, value)

    def both():
        out, lse = part_attention._block(query, keys, True, None, 0.5)
        return [out, lse, *part_attention._block_backward(query, keys, out, lse, grad, True, None, 0.5)]

    whole = both()
    monkeypatch.setattr(part_attention, "MOST_SCORES", 2 * 6 * 6 * 2)
    assert [turn.stop - turn.start for turn in part_attention._turns(query, keys)] == [2, 2, 1]
    for one, other in zip(whole, both(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_kernel_agrees_with_scores_written_out(causal: bool, monkeypatch) -> None:
    from r1mega.model import part_attention

    draw = torch.Generator("cuda").manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(2, 4, 256, width, device="cuda", dtype=torch.bfloat16, generator=draw)

    query, key, value, grad = normal(192), normal(192), normal(128), normal(128)
    keys = part_attention.Keys(0, 1, key, value)
    assert part_attention._fused(query, value, None)

    def both():
        out, lse = part_attention._block(query, keys, causal, None, 0.07)
        return [out, lse, *part_attention._block_backward(query, keys, out, lse, grad, causal, None, 0.07)]

    fused = both()
    monkeypatch.setattr(part_attention, "_fused", lambda *_: False)
    for one, other in zip(fused, both(), strict=True):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)
