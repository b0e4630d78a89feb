"""Experts that are given to the router: values and gradients against plain torch, and the bits of its own choice."""

from __future__ import annotations

import pytest
import torch

from r1mega.ops.route import TINY, route, route_within

FUNCTIONS = ("sigmoid", "softmax", "topk_softmax")
T, E, K = 12, 16, 4


def drawn(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, bias, and for every token K experts of chance in an order of chance."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(T, E, generator=draw, dtype=torch.float64).to(dtype)
    given = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(T)])
    return logits.requires_grad_(), 0.3 * torch.randn(E, generator=draw), given


def plain(logits: torch.Tensor, chosen_TK: torch.Tensor, function: str, scale: float) -> torch.Tensor:
    """V3's equations 12 to 16 with the choice fixed (and V2's), over all experts at once."""
    inside = torch.zeros(T, E, dtype=torch.bool).scatter(1, chosen_TK, True)
    if function == "sigmoid":
        scores = torch.where(inside, logits.sigmoid(), 0.0)
        return scale * scores / (scores.sum(1, keepdim=True) + TINY)
    if function == "softmax":
        return torch.where(inside, scale * logits.softmax(1), 0.0)
    return scale * logits.masked_fill(~inside, float("-inf")).softmax(1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_given_experts_weigh_by_the_tokens_own_scores(function: str) -> None:
    logits, bias, given = drawn()
    given[3:6] = -1
    how = {"top_k": K, "num_groups": 4, "topk_groups": 2, "score_function": function, "scale": 2.5}
    bias = bias if function == "sigmoid" else None
    own = route(logits, bias, **how)
    routed, own_map = route_within(logits, bias, given, **how)
    assert torch.equal(own_map, own.routing_map_TE)
    taken = given.clone()
    taken[3:6] = own.routing_map_TE[3:6].to(torch.int8).topk(K, dim=1).indices
    reference = drawn()[0]
    want = plain(reference, taken, function, 2.5)
    torch.testing.assert_close(routed.probs_TE, want, atol=1e-12, rtol=1e-12)
    assert torch.equal(routed.probs_TE[3:6], own.probs_TE[3:6]), "who chooses for itself has the op's bits"
    assert torch.equal(routed.routing_map_TE, torch.zeros(T, E, dtype=torch.bool).scatter(1, taken, True))
    assert routed.counts_E.tolist() == torch.bincount(taken.flatten(), minlength=E).tolist() and int(routed.counts_E.sum()) == T * K
    assert torch.equal(routed.offsets_E, routed.counts_E.cumsum(0))
    weights = torch.randn(T, E, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (routed.probs_TE * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad, atol=1e-12, rtol=1e-10)
    assert (logits.grad.abs().sum(1) > 0).all(), "the router learns of every token"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_own_choice_given_back_has_its_bits(function: str, dtype: torch.dtype) -> None:
    found = []
    for given in (False, True):
        logits, bias, experts = drawn(dtype)
        bias = bias if function == "sigmoid" else None
        how = {"top_k": K, "score_function": function, "scale": 2.5}
        routed = route(logits, bias, **how)
        if given:
            shuffled = routed.routing_map_TE.to(torch.int8).topk(K, dim=1).indices.flip(1)
            routed, _ = route_within(logits, bias, shuffled, **how)
        (routed.probs_TE.float() * torch.arange(E)).sum().backward()
        found.append((*routed, logits.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_neither_bias_nor_order_has_a_part_in_given_experts() -> None:
    logits, bias, given = drawn(torch.float32)
    one, _ = route_within(logits, bias, given, top_k=K)
    other, _ = route_within(logits, -7 * bias, given.flip(1), top_k=K, num_groups=4, topk_groups=2)
    assert torch.equal(one.probs_TE, other.probs_TE) and torch.equal(one.routing_map_TE, other.routing_map_TE)
    single, _ = route_within(logits, bias, given[:, :1], top_k=1)
    torch.testing.assert_close(single.probs_TE.sum(1), logits.gather(1, given[:, :1]).sigmoid()[:, 0])
