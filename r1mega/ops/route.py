"""Op ``route``: DeepSeek's router, from logits to each token's experts, their probabilities and the experts' token counts.

``probs[t, e] = scale * g(score[t, e])`` where expert e is among the ``top_k`` of token t, and 0 elsewhere (V3, arXiv 2412.19437,
equations 12 to 16).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.ops.library import FP32_BF16, Case, Op

SCORE_FUNCTIONS = ("sigmoid", "softmax", "topk_softmax")
TINY = 1e-20
"""Added to the sum that sigmoid scores are divided by."""


class Routed(NamedTuple):
    """``probs_TE``: in the logits' dtype. ``routing_map_TE``: bool. ``counts_E``: int64, tokens of each expert. ``offsets_E``:
    int64, their inclusive sums."""

    probs_TE: torch.Tensor
    routing_map_TE: torch.Tensor
    counts_E: torch.Tensor
    offsets_E: torch.Tensor


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    *,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    score_function: str = "sigmoid",
    scale: float = 1.0,
) -> Routed:
    """Exactly ``top_k`` different experts for each token, and what each of them weighs.

    ``logits_TE``: float32 or bfloat16, on a CPU float64 too; any strides, T of 0 or more. All is computed in float32 (float64 for
    float64) and rounded once; sums have one order: the same input gives the same bits. By ``score_function``:

    - ``sigmoid`` (V3): ``s = sigmoid(logits)``, chosen by ``s + bias``; probs are ``scale * s / (sum of the chosen s + 1e-20)``,
      and ``scale * s`` for a ``top_k`` of 1. The bias (floating, ``[E]``) has no part in the probabilities and no gradient.
    - ``softmax`` (V2): ``s = softmax(logits)`` over all experts; probs are ``scale * s``.
    - ``topk_softmax``: chosen by the logits; probs are ``scale * softmax`` over the chosen ones.

    With ``num_groups`` above 1 the experts lie in so many groups of neighbours, and a token's are of its best ``topk_groups``
    groups; a group's score is the sum of its best ``top_k // topk_groups`` scores (biased; logits for ``topk_softmax``).

    Ties: the lower index first, for experts and for groups, as a stable descending sort has it. Experts of a ``softmax`` are
    compared by their logits, the same order without rounding. NaN counts as the largest score, as in ``torch.topk``, and the
    ``top_k`` experts are different ones even so: the NaN is in this token's chosen probs (for ``sigmoid`` with a ``top_k`` of 1 in
    that expert's) and in no other token's.

    The gradient of the logits is that of the formulas with the choice fixed: 0 for experts not chosen, but for ``softmax``, whose
    sum is over all. Gradients of probs that are not chosen are not read.

    On a GPU: E up to 1024, ``top_k`` and ``num_groups`` up to 32. Raises ValueError for sizes that choose nothing or too little.
    """
    return Routed(*ROUTE.packet(logits_TE, bias_E, top_k, num_groups, topk_groups, score_function, scale))


def route_within(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, given_TK: torch.Tensor, **how
) -> tuple[Routed, torch.Tensor]:
    """:func:`route` where some tokens' experts are given (routing replay), and the map of the choice without, bool ``[T, E]``.

    ``given_TK``: whole numbers, each token's ``top_k`` different experts in any order, or -1 for a token that chooses for itself;
    ``how``: as :func:`route`. A given token's probabilities are the same formulas of its own logits, inside the given set: neither
    bias nor groups have a part in them. Counts are those of the experts that are taken. Where the given set is the token's own
    choice, so are the bits of its probabilities and of the gradient.
    """
    *taken, own_map_TE = _Within.apply(logits_TE, bias_E, given_TK, how)
    return Routed(*taken), own_map_TE


class _Within(torch.autograd.Function):
    """The op's own choice, then other experts for the tokens that were given others; its backward pass takes any map."""

    @staticmethod
    def forward(ctx, logits, bias, given, how):
        ctx.how = score_function, top_k, scale = how.get("score_function", "sigmoid"), how["top_k"], how.get("scale", 1.0)
        own = route(logits, bias, **how)
        is_given = given[:, :1] >= 0
        experts = given.clamp(min=0).long().sort(dim=1).values  # one order of the sum, whatever the order they came in
        there = torch.zeros_like(own.routing_map_TE).scatter_(1, experts, True)
        routing_map = torch.where(is_given, there, own.routing_map_TE)
        wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        inside = (_probs_of(wide, experts, top_k, score_function) * scale).to(logits.dtype)
        is_other = (routing_map != own.routing_map_TE).any(dim=1, keepdim=True)
        probs = torch.where(is_other, torch.zeros_like(own.probs_TE).scatter_(1, experts, inside), own.probs_TE)
        counts = routing_map.sum(0)
        offsets = counts.cumsum(0)
        ctx.save_for_backward(logits, routing_map)
        ctx.mark_non_differentiable(routing_map, counts, offsets, own.routing_map_TE)
        return probs, routing_map, counts, offsets, own.routing_map_TE

    @staticmethod
    def backward(ctx, grad_probs, *_):
        logits, routing_map = ctx.saved_tensors
        return ROUTE_BACKWARD.packet(grad_probs, logits, routing_map, *ctx.how), None, None, None


def _probs_of(wide: torch.Tensor, chosen: torch.Tensor, top_k: int, score_function: str) -> torch.Tensor:
    """What each of the chosen experts weighs, without the scale."""
    if score_function == "softmax":
        return wide.softmax(-1).gather(1, chosen)
    if score_function == "topk_softmax":
        return wide.gather(1, chosen).softmax(-1)
    probs = wide.gather(1, chosen).sigmoid()
    return probs / (probs.sum(-1, keepdim=True) + TINY) if top_k > 1 else probs


def _descending(scores: torch.Tensor, best: int) -> torch.Tensor:
    """Indices of the best along the last dimension, equal ones in their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :best]


def _choose(logits, bias, top_k, num_groups, topk_groups, score_function):
    """Indices of each token's experts, best first, ``[T, top_k]``."""
    scores = {"sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1), "topk_softmax": lambda x: x}[score_function](logits)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    ranked = _descending(logits if score_function == "softmax" else scores, scores.shape[1])
    if num_groups > 1:
        size = scores.shape[1] // num_groups
        best = (
            scores.unflatten(1, (num_groups, size)).sort(dim=-1, descending=True, stable=True).values[..., : top_k // topk_groups]
        )
        kept = torch.zeros(len(scores), num_groups, dtype=torch.bool, device=scores.device)
        kept.scatter_(1, _descending(best.sum(-1), topk_groups), True)
        first = _descending(
            kept.gather(1, ranked // size).to(torch.int8), top_k
        )  # those of the kept groups, in the order they are in
        ranked = ranked.gather(1, first)
    return ranked[:, :top_k]


def _route_reference(logits, bias, top_k, num_groups, topk_groups, score_function, scale):
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wide = logits.to(accumulate)
    with torch.no_grad():
        chosen = _choose(wide.detach(), bias, top_k, num_groups, topk_groups, score_function)
    probs = _probs_of(wide, chosen, top_k, score_function)
    probs = (probs * scale).to(logits.dtype)
    routing_map = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter(1, chosen, True)
    counts = routing_map.sum(0)
    return (
        torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device).scatter(1, chosen, probs),
        routing_map,
        counts,
        counts.cumsum(0),
    )


def _route_fake(logits, bias, top_k, num_groups, topk_groups, score_function, scale):
    shape, experts = logits.shape, logits.shape[1]
    counts = logits.new_empty(experts, dtype=torch.int64)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.bool), counts, torch.empty_like(counts)


def _route_setup(ctx, inputs, output):
    logits, _, ctx.top_k, _, _, ctx.score_function, ctx.scale = inputs
    _, routing_map, counts, offsets = output
    ctx.mark_non_differentiable(routing_map, counts, offsets)
    ctx.save_for_backward(logits, routing_map)


def _route_backward(ctx, grad_probs, *_):
    logits, routing_map = ctx.saved_tensors
    grad = ROUTE_BACKWARD.packet(grad_probs, logits, routing_map, ctx.score_function, ctx.top_k, ctx.scale)
    return grad, None, None, None, None, None, None


def _backward_reference(grad_probs, logits, routing_map, score_function, top_k, scale):
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wide, grad = logits.to(accumulate), torch.where(routing_map, grad_probs.to(accumulate) * scale, 0.0)
    if score_function == "sigmoid":
        scores = torch.where(routing_map, wide.sigmoid(), 0.0)
        if top_k > 1:
            total = scores.sum(-1, keepdim=True) + TINY
            grad = torch.where(routing_map, (grad - (grad * (scores / total)).sum(-1, keepdim=True)) / total, 0.0)
        return (grad * (1 - scores) * scores).to(logits.dtype)
    probs = wide.softmax(-1) if score_function == "softmax" else wide.masked_fill(~routing_map, float("-inf")).softmax(-1)
    out = (grad - (grad * probs).sum(-1, keepdim=True)) * probs
    return (out if score_function == "softmax" else torch.where(routing_map, out, 0.0)).to(logits.dtype)


def _backward_fake(grad_probs, logits, routing_map, score_function, top_k, scale):
    return logits.new_empty(logits.shape)


def _route_case(
    T, E, top_k, groups=(1, 1), score_function="sigmoid", *, bias=True, scale=2.5, spread=1.0, strided=False, fill=None
):
    def make(dtype, device):
        draw = torch.Generator().manual_seed(1000 * T + 10 * E + top_k)
        logits = spread * torch.randn(T, E, generator=draw)
        added = 0.2 * torch.randn(E, generator=draw) if bias and score_function == "sigmoid" else None
        if fill is not None:
            fill(logits, added)
        logits = logits.to(device, dtype)
        if strided:
            logits = torch.stack([logits, logits], dim=-1)[..., 0]
        return logits, None if added is None else added.to(device), top_k, *groups, score_function, scale

    return make


def _all_equal(logits, bias):
    logits.fill_(0.5)
    if bias is not None:
        bias.zero_()


def _few_values(logits, bias):
    """Multiples of a half: many equal scores, and groups of equal ones."""
    logits.copy_((logits * 2).round() / 2)
    logits[0] = logits[0].roll(len(logits[0]) // 2)
    if bias is not None:
        bias.copy_((bias * 4).round() / 4)


_SITUATIONS = (
    ("ordinary", (13, 16, 4, (4, 2)), {}),
    ("empty", (0, 8, 2), {}),
    ("one row", (1, 8, 2, (4, 2)), {}),
    ("DeepSeek-V3", (37, 256, 8, (8, 4)), {}),
    ("DeepSeek-V2", (19, 160, 6, (8, 3), "softmax"), {"scale": 16.0}),
    ("DeepSeek-V2-Lite", (21, 64, 6, (1, 1), "softmax"), {"scale": 1.0}),
    ("top-k softmax", (21, 24, 4, (3, 2), "topk_softmax"), {}),
    ("ragged", (11, 77, 7), {"bias": False}),
    ("odd groups", (9, 45, 6, (5, 2)), {}),
    ("groups of one expert", (9, 6, 3, (6, 3), "softmax"), {}),
    ("one expert a token", (9, 8, 1), {}),
    ("all experts", (5, 6, 6), {}),
    ("many experts", (6, 1024, 32, (16, 4)), {}),
    ("wide odd groups", (4, 1023, 8, (3, 2)), {}),
    ("non-contiguous", (9, 16, 4, (4, 2)), {"strided": True}),
    ("extreme values", (9, 16, 4, (4, 2)), {"spread": 1e4}),
    ("extreme softmax", (9, 16, 4, (4, 2), "softmax"), {"spread": 1e4}),
    ("ties", (9, 16, 4, (4, 2)), {"fill": _few_values}),
    ("ties of softmax", (9, 16, 5, (1, 1), "topk_softmax"), {"fill": _few_values}),
    ("all equal", (5, 32, 4, (4, 2)), {"fill": _all_equal}),
)


def _backward_case(make):
    def of(dtype, device):
        logits, bias, top_k, groups, kept, score_function, scale = make(dtype, device)
        _, routing_map, _, _ = _route_reference(logits, bias, top_k, groups, kept, score_function, scale)
        draw = torch.Generator().manual_seed(len(logits))
        grad = torch.randn(logits.shape, generator=draw).to(device, dtype)
        grad[:1] = torch.where(routing_map[:1], grad[:1], float("nan"))  # what is not chosen is not read
        return grad, logits, routing_map, score_function, top_k, scale

    return of


_MAKERS = tuple((name, _route_case(*sizes, **how)) for name, sizes, how in _SITUATIONS)

ROUTE = Op(
    "route(Tensor logits, Tensor? bias, int top_k, int num_groups, int topk_groups, str score_function, float scale) "
    "-> (Tensor probs, Tensor routing_map, Tensor counts, Tensor offsets)",
    _route_reference,
    _route_fake,
    _route_setup,
    _route_backward,
    tuple(Case(name, make) for name, make in _MAKERS),
    dtypes=FP32_BF16,
    exact=False,
)
ROUTE_BACKWARD = Op(
    "route_backward(Tensor grad_probs, Tensor logits, Tensor routing_map, str score_function, int top_k, float scale) -> Tensor",
    _backward_reference,
    _backward_fake,
    cases=tuple(Case(name, _backward_case(make)) for name, make in _MAKERS),
    dtypes=FP32_BF16,
    exact=False,
)
OPS = (ROUTE, ROUTE_BACKWARD)
