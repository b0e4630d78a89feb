"""``route``: Megatron-Core's own function on random inputs, NaN and infinities, ties, gradients in fp64, the checks' messages."""

from __future__ import annotations

import pytest
import torch

from r1mega.compat import megatron_plain
from r1mega.ops import library
from r1mega.ops.route import ROUTE, route

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = [  # experts, top_k, groups, kept
    (8, 4, 4, 2),
    (64, 6, 1, 1),
    (256, 8, 8, 4),
    (160, 6, 8, 3),
    (16, 1, 1, 1),
]


def megatron(logits, bias, top_k, groups, kept, score_function, scale):
    megatron_plain.apply()
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    return topk_routing_with_score_function(
        logits,
        top_k,
        use_pre_softmax=score_function == "softmax",
        num_groups=groups if groups > 1 else None,
        group_topk=kept if groups > 1 else None,
        scaling_factor=scale,
        score_function="sigmoid" if score_function == "sigmoid" else "softmax",
        expert_bias=bias,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "score_function, biased", [("sigmoid", True), ("sigmoid", False), ("softmax", False), ("topk_softmax", False)]
)
@pytest.mark.parametrize("experts, top_k, groups, kept", LAYOUTS)
def test_values_and_gradients_are_megatrons(experts, top_k, groups, kept, score_function, biased, device) -> None:
    draw = torch.Generator().manual_seed(experts + top_k)
    logits = torch.randn(200, experts, generator=draw).to(device)
    bias = 0.1 * torch.randn(experts, generator=draw).to(device) if biased else None
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    got = route(ours, bias, top_k=top_k, num_groups=groups, topk_groups=kept, score_function=score_function, scale=2.5)
    probs, chosen = megatron(theirs, bias, top_k, groups, kept, score_function, 2.5)
    assert torch.equal(got.routing_map_TE, chosen)
    assert got.counts_E.tolist() == chosen.sum(0).tolist() and got.offsets_E.tolist() == chosen.sum(0).cumsum(0).tolist()
    torch.testing.assert_close(got.probs_TE, probs, rtol=1e-6, atol=1e-7)
    weight = torch.randn(probs.shape, generator=draw).to(device)
    for output in (got.probs_TE, probs):
        (output * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def strange(experts: int = 16) -> torch.Tensor:
    """Six strange tokens, each before an ordinary one."""
    nan, inf = float("nan"), float("inf")
    logits = torch.randn(12, experts, generator=torch.Generator().manual_seed(3))
    logits[0, 3] = nan
    logits[2, ::2] = nan
    logits[4] = nan
    logits[6, 1], logits[6, 6] = inf, -inf
    logits[8, :-2] = -inf
    logits[10] = -inf
    return logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups, kept", [(1, 1), (4, 2)])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax", "topk_softmax"])
def test_nan_and_infinity_stay_in_their_token_and_choose_as_many_experts(score_function, groups, kept, device) -> None:
    logits = strange().to(device)
    args = (4, groups, kept, score_function, 2.5)
    probs, chosen, counts, offsets = ROUTE.packet(logits, None, *args)
    wanted = ROUTE.reference(logits, None, *args)
    assert (chosen.sum(1) == 4).all() and counts.sum() == offsets[-1] == 48
    assert all(torch.equal(ours, theirs) for ours, theirs in zip((chosen, counts, offsets), wanted[1:], strict=True))
    torch.testing.assert_close(probs, wanted[0], equal_nan=True)
    assert chosen[0, 3] and probs[[0, 2, 4]][chosen[[0, 2, 4]]].isnan().all(), "a NaN is chosen and seen"
    assert torch.isfinite(probs[1::2]).all() and (probs[~chosen] == 0).all(), "and nowhere else"
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for call, leaf in zip((ROUTE.packet, ROUTE.reference), leaves, strict=True):
        call(leaf, None, *args)[0].sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_of_equal_experts_and_groups_the_first_are_chosen(device) -> None:
    def experts(row, **how):
        return route(torch.tensor([row], device=device), **how).routing_map_TE[0].nonzero()[:, 0].tolist()

    assert experts([1.0, 2.0, 2.0, 1.0, 2.0], top_k=2) == [1, 2]
    assert experts([0.0, -0.0, 0.0], top_k=2, score_function="topk_softmax") == [0, 1]
    two_of_three = {"top_k": 2, "num_groups": 3, "topk_groups": 2}
    assert experts([1.0, 0.0, 2.0, 2.0, 1.0, 0.0], **two_of_three) == [2, 3]
    assert experts([1.0, 0.0, 0.0, 1.0, 0.0, 1.0], **two_of_three) == [0, 3]
    both = torch.tensor([1.0, 0.0, 1.0], device=device)
    assert route(torch.zeros(1, 3, device=device), both, top_k=1).routing_map_TE[0].tolist() == [True, False, False]


def test_a_group_is_scored_by_its_best_experts_and_the_bias_weighs_nothing() -> None:
    logits = torch.tensor([[3.0, -3.0, 1.0, 1.0]])
    one, two = ({"top_k": k, "num_groups": 2, "topk_groups": 1} for k in (1, 2))
    assert route(logits, **one).routing_map_TE[0].tolist() == [True, False, False, False]
    assert route(logits, **two).routing_map_TE[0].tolist() == [False, False, True, True], "sigmoid(3) + sigmoid(-3) is 1"
    moved = route(logits, torch.tensor([0.0, 1.0, 0.0, 0.0]), scale=3.0, **two)
    scores = torch.sigmoid(logits[:, :2])
    torch.testing.assert_close(moved.probs_TE[:, :2], 3 * scores / scores.sum())


@pytest.mark.parametrize("score_function, top_k", [("sigmoid", 4), ("sigmoid", 1), ("softmax", 4), ("topk_softmax", 4)])
def test_gradients_are_those_of_finite_differences(score_function, top_k) -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: route(x, top_k=top_k, score_function=score_function, scale=2.5).probs_TE, (logits,))


def test_bf16_logits_are_computed_in_fp32_and_rounded_once() -> None:
    logits = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    low, high = (route(x, top_k=4, scale=2.5) for x in (logits, logits.float()))
    assert torch.equal(low.routing_map_TE, high.routing_map_TE) and torch.equal(low.probs_TE, high.probs_TE.bfloat16())


@pytest.mark.skipif(not library.load(), reason=f"the C++ library is not built: {library.BUILD}")
def test_the_checks_say_what_was_expected_and_what_came() -> None:
    logits, bias = torch.zeros(2, 8), torch.zeros(8)
    for how, text in (
        ({"top_k": 9}, "route: expected a top_k from 1 to the experts, 8, got 9"),
        ({"top_k": 2, "score_function": "tanh"}, "route: expected a score_function sigmoid, softmax or topk_softmax, got tanh"),
        ({"top_k": 2, "bias_E": bias, "score_function": "softmax"}, "route: expected no bias beside softmax, got one"),
        ({"top_k": 2, "bias_E": bias[:3]}, r"route: expected a bias \[8\] of a floating type, got \[3\] of Float"),
        ({"top_k": 2, "num_groups": 3}, "route: expected num_groups that divides the experts, 8, got 3"),
        ({"top_k": 2, "num_groups": 4, "topk_groups": 5}, "route: expected topk_groups from 1 to num_groups, 4, got 5"),
        (
            {"top_k": 5, "num_groups": 4, "topk_groups": 2},
            "route: expected a top_k from topk_groups to their experts, 2 to 4, got 5",
        ),
        (
            {"top_k": 1, "num_groups": 4, "topk_groups": 2},
            "route: expected a top_k from topk_groups to their experts, 2 to 4, got 1",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            route(logits, **how)
    for wrong, text in (
        (logits[0], r"expected logits \[T, E\], got 1 dim"),
        (logits.half(), "expected logits of float32, .*, got Half"),
    ):
        with pytest.raises(ValueError, match=text):
            route(wrong, top_k=2)
    backward = torch.ops.r1mega.route_backward
    with pytest.raises(
        ValueError, match=r"route_backward: expected grad_probs like logits, \[2, 8\] of Float, got \[2, 7\] of Float"
    ):
        backward(logits[:, :7], logits, logits.bool(), "sigmoid", 2, 1.0)
    with pytest.raises(ValueError, match=r"route_backward: expected routing_map of bool, \[2, 8\], got \[2, 8\] of Float"):
        backward(logits, logits, logits, "sigmoid", 2, 1.0)
