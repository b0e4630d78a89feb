"""Ops ``permute`` and ``unpermute``: tokens to rows sorted by expert, and rows back to tokens; their probabilities beside them.

``permute``: ``rows[r] = tokens[row_tokens[r]]``, ``row_probs[r] = probs[row_tokens[r], row_experts[r]]``, both 0 for padding.
``unpermute``: ``tokens[t] = sum of row_probs[r] * rows[r] over the rows r of t``, in the order of the experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.ops.library import Case, Op
from r1mega.ops.row_map import SITUATIONS, RowMap, map_rows, routing, row_map_reference, sizes_of


class Permuted(NamedTuple):
    """Rows sorted by expert then token, their probabilities, rows an expert (int64, on the device, without padding), and the way
    back, which knows where each expert's rows end."""

    rows_RD: torch.Tensor
    probs_R: torch.Tensor
    counts_E: torch.Tensor
    row_map: RowMap


def permute(
    tokens_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor, top_k: int | None = None, multiple: int = 1
) -> Permuted:
    """A row for each (token, expert) that ``routing_map_TE`` chooses, sorted by expert, then token.

    ``tokens_TD``: any dtype, any strides, T of 0 or more. ``probs_TE``: any floating dtype; entries that are not chosen are not
    read. ``routing_map_TE``, ``top_k`` and ``multiple``: see :func:`r1mega.ops.row_map.map_rows`; with ``multiple`` above 1 there
    are rows of zeros with probability 0, and ``row_map.ends_E`` says where each expert's rows end.

    Returns :class:`Permuted`: rows in the tokens' dtype and probabilities in theirs, both exact copies. The gradient of the tokens
    is ``unpermute`` of the rows' gradient (fp32 sums in the order of the experts), that of ``probs_TE`` is 0 where nothing is
    chosen. All sums have one order: the same input gives the same bits, forward and backward. Indices are int64.
    """
    row_map = map_rows(routing_map_TE, top_k, multiple)
    probs_R = permute_probs(probs_TE, row_map)  # first: what it reads of the map is still in a GPU's cache
    return Permuted(permute_rows(tokens_TD, row_map), probs_R, row_map.counts_E, row_map)


def permute_rows(tokens_TD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """Each token to its rows, ``[R, D]`` in the tokens' dtype, exact copies; padding is 0. ``row_map``: from
    :func:`r1mega.ops.row_map.map_rows`. Gradient: :func:`unpermute`."""
    return PERMUTE.packet(tokens_TD, row_map.row_tokens_R, row_map.token_rows_TK)


def permute_probs(probs_TE: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """``probs[t, e]`` of each row, ``[R]`` in their dtype, any strides; padding is 0. Gradient: each row's in its place, 0
    elsewhere."""
    return PERMUTE_PROBS.packet(probs_TE, row_map.row_tokens_R, row_map.row_experts_R)


def unpermute(rows_RD: torch.Tensor, row_map: RowMap, probs_R: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of each token's rows, ``[T, D]`` in the rows' dtype; a token without rows gets 0, padding is not read.

    ``probs_R``: a factor a row, of any floating dtype; None: 1. Products and sums are in fp32 (fp64 for fp64 rows), each rounded
    there, the sums in the order of the experts, and rounded once to the rows' dtype. The gradient of a row is its token's times
    the factor, 0 for padding; that of a factor the dot product of its row and its token's gradient, in fp32. ``row_map``: from
    :func:`permute` or :func:`r1mega.ops.row_map.map_rows`. The same input gives the same bits, forward and backward. NaN and
    infinity go their way through products and sums.
    """
    return UNPERMUTE.packet(rows_RD, row_map.token_rows_TK, row_map.row_tokens_R, probs_R)


def _sum_type(rows):
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def rows_of(tokens, row_tokens):
    """``tokens[row_tokens]``, zeros for -1."""
    if not len(tokens):
        return tokens.new_zeros(len(row_tokens), tokens.shape[1])
    rows = tokens.index_select(0, row_tokens.clamp(min=0))
    return torch.where((row_tokens < 0).unsqueeze(1), torch.zeros_like(rows), rows)


def _permute_reference(tokens, row_tokens, token_rows):
    return rows_of(tokens, row_tokens)


def _permute_fake(tokens, row_tokens, token_rows):
    return tokens.new_empty(row_tokens.shape[0], tokens.shape[1])


def _permute_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx, grad_rows):
    row_tokens, token_rows = ctx.saved_tensors
    return UNPERMUTE.packet(grad_rows, token_rows, row_tokens), None, None


def _probs_reference(probs, row_tokens, row_experts):
    if not probs.numel():
        return probs.new_zeros(len(row_tokens))
    found = probs[row_tokens.clamp(min=0), row_experts.clamp(min=0)]
    return torch.where(row_tokens < 0, 0.0, found)


def _probs_fake(probs, row_tokens, row_experts):
    return probs.new_empty(row_tokens.shape[0])


def _probs_setup(ctx, inputs, output):
    ctx.sizes = inputs[0].shape
    ctx.save_for_backward(*inputs[1:])


def _probs_backward(ctx, grad_row_probs):
    return PERMUTE_PROBS_BACKWARD.packet(grad_row_probs, *ctx.saved_tensors, *ctx.sizes), None, None


def _probs_backward_reference(grad_row_probs, row_tokens, row_experts, num_tokens, num_experts):
    size = num_tokens * num_experts  # the number behind the last takes what padding has, which is 0
    place = torch.where(row_tokens < 0, size, row_tokens * num_experts + row_experts)
    grad = torch.where(row_tokens < 0, 0.0, grad_row_probs)
    return grad.new_zeros(size + 1).index_put((place,), grad)[:size].view(num_tokens, num_experts)


def _probs_backward_fake(grad_row_probs, row_tokens, row_experts, num_tokens, num_experts):
    return grad_row_probs.new_empty(num_tokens, num_experts)


def _unpermute_reference(rows, token_rows, row_tokens, row_probs=None):
    accumulate = _sum_type(rows)
    total = torch.zeros(token_rows.shape[0], rows.shape[1], dtype=accumulate, device=rows.device)
    if rows.shape[0]:
        for place in token_rows.unbind(1):
            place_or_0 = place.clamp(min=0)
            part = rows.index_select(0, place_or_0).to(accumulate)
            if row_probs is not None:
                part = part * row_probs.to(accumulate)[place_or_0].unsqueeze(1)
            total += torch.where((place >= 0).unsqueeze(1), part, 0.0)
    return total.to(rows.dtype)


def _unpermute_fake(rows, token_rows, row_tokens, row_probs=None):
    return rows.new_empty(token_rows.shape[0], rows.shape[1])


def _unpermute_setup(ctx, inputs, output):
    rows, token_rows, row_tokens, row_probs = inputs
    ctx.weighted = row_probs is not None
    ctx.save_for_backward(token_rows, row_tokens, *((rows, row_probs) if ctx.weighted else ()))


def _unpermute_backward(ctx, grad_tokens):
    token_rows, row_tokens, *weighted = ctx.saved_tensors
    if not ctx.weighted:
        return PERMUTE.packet(grad_tokens, row_tokens, token_rows), None, None, None
    rows, row_probs = weighted
    grad_rows, grad_probs = UNPERMUTE_BACKWARD.packet(grad_tokens, rows, row_tokens, token_rows, row_probs)
    return grad_rows, None, None, grad_probs


def _unpermute_backward_reference(grad_tokens, rows, row_tokens, token_rows, row_probs):
    accumulate, padding = _sum_type(rows), row_tokens < 0
    grad = rows_of(grad_tokens, row_tokens).to(accumulate)
    grad_rows = torch.where(padding.unsqueeze(1), 0.0, grad * row_probs.to(accumulate).unsqueeze(1))
    grad_probs = torch.where(padding, 0.0, (grad * rows.to(accumulate)).sum(1))
    return grad_rows.to(rows.dtype), grad_probs.to(row_probs.dtype)


def _unpermute_backward_fake(grad_tokens, rows, row_tokens, token_rows, row_probs):
    return rows.new_empty(rows.shape), row_probs.new_empty(row_probs.shape)


_MORE = (
    ("extreme values", (11, 4, 2), {"scale": 1e4}),
    ("ties", (8, 4, 2), {"ties": True}),
    ("width of none", (6, 4, 2), {"D": 0}),
    ("rows of 16-byte pieces", (10, 8, 3), {"D": 64}),
    ("rows of several rounds, padding", (5, 4, 2), {"D": 8208, "multiple": 4}),
)


def _made(T, E, top_k, dtype, device, D=6, scale=1.0, ties=False, multiple=1, spare=0, **how):
    """Tokens, probabilities and the map's five parts of a situation."""
    draw = torch.Generator().manual_seed(T + D)
    tokens, probs = torch.randn(T, D, generator=draw) * scale, torch.rand(T, E, generator=draw)
    if ties:
        tokens, probs = torch.ones_like(tokens), torch.full_like(probs, 0.5)
    if how.get("strided"):
        tokens, probs = tokens.t().contiguous().t(), torch.stack([probs, probs], dim=-1)[..., 0]
    probs = probs.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    chosen = routing(T, E, top_k, device, **how)
    return tokens.to(device, dtype), probs, row_map_reference(chosen, *sizes_of(chosen, multiple, spare))


def _case_of(arrange):
    """Cases of an op: ``arrange(tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows)`` are its arguments."""

    def case(sizes, how):
        def make(dtype, device):
            tokens, probs, (_, _, row_experts, row_tokens, token_rows) = _made(*sizes, dtype, device, **how)
            # rows that differ, as those of experts do
            factor = 1 + torch.arange(len(row_tokens), device=device, dtype=dtype).unsqueeze(1) / max(1, len(row_tokens))
            rows = rows_of(tokens, row_tokens) * factor
            rows = rows.t().contiguous().t() if how.get("strided") else rows
            row_probs = _probs_reference(probs, row_tokens, row_experts)
            return arrange(tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows)

        return make

    return tuple(Case(name, case(sizes, how)) for name, sizes, how in SITUATIONS + _MORE)


PERMUTE = Op(
    "permute(Tensor tokens, Tensor row_tokens, Tensor token_rows) -> Tensor rows",
    _permute_reference,
    _permute_fake,
    _permute_setup,
    _permute_backward,
    _case_of(lambda tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows: (tokens, row_tokens, token_rows)),
)
PERMUTE_PROBS = Op(
    "permute_probs(Tensor probs, Tensor row_tokens, Tensor row_experts) -> Tensor row_probs",
    _probs_reference,
    _probs_fake,
    _probs_setup,
    _probs_backward,
    _case_of(lambda tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows: (probs, row_tokens, row_experts)),
    dtypes=(torch.float32, torch.float64),
)
PERMUTE_PROBS_BACKWARD = Op(
    "permute_probs_backward(Tensor grad_row_probs, Tensor row_tokens, Tensor row_experts, SymInt num_tokens, SymInt num_experts) "
    "-> Tensor grad_probs",
    _probs_backward_reference,
    _probs_backward_fake,
    cases=_case_of(
        lambda tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows: (
            *(row_probs, row_tokens, row_experts),
            *probs.shape,
        )
    ),
    dtypes=(torch.float32, torch.float64),
)
UNPERMUTE = Op(
    "unpermute(Tensor rows, Tensor token_rows, Tensor row_tokens, Tensor? row_probs=None) -> Tensor tokens",
    _unpermute_reference,
    _unpermute_fake,
    _unpermute_setup,
    _unpermute_backward,
    _case_of(lambda tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows: (rows, token_rows, row_tokens, None))
    + tuple(
        Case(f"{case.name}, weighted", case.make)
        for case in _case_of(
            lambda tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows: (rows, token_rows, row_tokens, row_probs)
        )
    ),
)
UNPERMUTE_BACKWARD = Op(
    "unpermute_backward(Tensor grad_tokens, Tensor rows, Tensor row_tokens, Tensor token_rows, Tensor row_probs) "
    "-> (Tensor grad_rows, Tensor grad_row_probs)",
    _unpermute_backward_reference,
    _unpermute_backward_fake,
    cases=_case_of(
        lambda tokens, rows, probs, row_probs, row_experts, row_tokens, token_rows: (
            *(tokens * 0.5 + 0.25, rows, row_tokens, token_rows, row_probs),
        )
    ),
    exact=False,
)
OPS = (PERMUTE, PERMUTE_PROBS, PERMUTE_PROBS_BACKWARD, UNPERMUTE, UNPERMUTE_BACKWARD)
