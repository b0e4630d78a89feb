"""Ops ``permute`` and ``unpermute``: tokens to rows sorted by expert, and rows back to tokens.

``permute``: for each expert e in order, for each token t in order with ``routing_map[t, e]``, a row: ``rows[r] = tokens[t]``,
``row_probs[r] = probs[t, e]``. ``unpermute``: ``tokens[t] = sum of rows[r] over the rows of t``, in the order of the experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.ops.library import Case, Op


class RowMap(NamedTuple):
    """Between tokens and rows. ``row_tokens_R``: the token of a row. ``token_rows_TK``: the rows of a token by expert, then -1."""

    row_tokens_R: torch.Tensor
    token_rows_TK: torch.Tensor


class Permuted(NamedTuple):
    """Rows sorted by expert then token, their probabilities, rows an expert (int64, on the device), and the way back."""

    rows_RD: torch.Tensor
    probs_R: torch.Tensor
    counts_E: torch.Tensor
    row_map: RowMap


def permute(tokens_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor, top_k: int | None = None) -> Permuted:
    """A row for each (token, expert) that ``routing_map_TE`` chooses, sorted by expert, then token.

    ``tokens_TD``: any dtype, any strides, T of 0 or more. ``probs_TE``: any floating dtype; entries that are not chosen are not
    read. ``routing_map_TE``: bool. ``top_k``: how many experts each token has, where all have as many; None counts, which waits for
    a device that works ahead. On a CPU a wrong ``top_k`` raises ValueError; elsewhere it is the caller's promise.

    Returns :class:`Permuted`: rows in the tokens' dtype and probabilities in theirs, both exact copies. The gradient of the tokens
    is ``unpermute`` of the rows' gradient (fp32 sums in the order of the experts), that of ``probs_TE`` is 0 where nothing is
    chosen. All sums have one order: the same input gives the same bits, forward and backward. Indices are int64.
    """
    if top_k is None:
        per_token_T = routing_map_TE.sum(1)
        num_rows = int(per_token_T.sum())
        width = int(per_token_T.max()) if num_rows else 0
    else:
        num_rows, width = top_k * routing_map_TE.shape[0], top_k
    rows, probs, counts, row_tokens, token_rows = PERMUTE.packet(tokens_TD, probs_TE, routing_map_TE, num_rows, width)
    return Permuted(rows, probs, counts, RowMap(row_tokens, token_rows))


def unpermute(rows_RD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """The sum of each token's rows, ``[T, D]`` in the rows' dtype; a token without rows gets 0.

    Sums are in fp32 (fp64 for fp64 rows), in the order of the experts, and rounded once. The gradient of a row is its token's,
    exactly. ``row_map``: from :func:`permute`. The same input gives the same bits, forward and backward.
    """
    return UNPERMUTE.packet(rows_RD, row_map.token_rows_TK, row_map.row_tokens_R)


def _permute_reference(tokens, probs, routing_map, num_rows, width):
    counts = routing_map.sum(0)
    pairs = torch.nonzero_static(routing_map.t(), size=num_rows)  # in the order of (expert, token); its size is known: no wait
    expert, token = pairs.unbind(1)
    if tokens.device.type == "cpu":
        _check(routing_map, num_rows, width)
    rows = tokens.index_select(0, token)
    slot = routing_map.cumsum(1)[token, expert] - 1
    token_rows = torch.full((tokens.shape[0], width), -1, dtype=torch.int64, device=tokens.device)
    token_rows[token, slot] = torch.arange(num_rows, device=tokens.device)
    return rows, probs[token, expert], counts, token.clone(memory_format=torch.contiguous_format), token_rows


def _check(routing_map, num_rows, width):
    per_token = routing_map.sum(1)
    total, most = int(per_token.sum()), int(per_token.max()) if per_token.numel() else 0
    if total != num_rows:
        raise ValueError(f"permute: expected as many rows as routing_map chooses, {total}, got {num_rows}")
    if most > width:
        raise ValueError(f"permute: expected a width of at least a token's rows, {most}, got {width}")


def _permute_fake(tokens, probs, routing_map, num_rows, width):
    count = routing_map.new_empty
    return (
        tokens.new_empty(num_rows, tokens.shape[1]),
        probs.new_empty(num_rows),
        count(routing_map.shape[1], dtype=torch.int64),
        count(num_rows, dtype=torch.int64),
        count(tokens.shape[0], width, dtype=torch.int64),
    )


def _permute_setup(ctx, inputs, output):
    _, _, counts, row_tokens, token_rows = output
    ctx.mark_non_differentiable(counts, row_tokens, token_rows)
    ctx.save_for_backward(counts, row_tokens, token_rows)


def _permute_backward(ctx, grad_rows, grad_probs, *_):
    counts, row_tokens, token_rows = ctx.saved_tensors
    grad_tokens = UNPERMUTE.packet(grad_rows, token_rows, row_tokens) if ctx.needs_input_grad[0] else None
    grad_probs_TE = None
    if ctx.needs_input_grad[1]:
        experts = torch.arange(len(counts), device=counts.device)
        expert = experts.repeat_interleave(counts, output_size=len(row_tokens))
        grad_probs_TE = grad_probs.new_zeros(len(token_rows), len(counts)).index_put((row_tokens, expert), grad_probs)
    return grad_tokens, grad_probs_TE, None, None, None


def _unpermute_reference(rows, token_rows, row_tokens):
    accumulate = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = torch.zeros(token_rows.shape[0], rows.shape[1], dtype=accumulate, device=rows.device)
    if rows.shape[0]:
        for place in token_rows.unbind(1):
            part = rows.index_select(0, place.clamp(min=0)).to(accumulate)
            total += torch.where((place >= 0).unsqueeze(1), part, 0.0)
    return total.to(rows.dtype)


def _unpermute_fake(rows, token_rows, row_tokens):
    return rows.new_empty(token_rows.shape[0], rows.shape[1])


def _unpermute_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _unpermute_backward(ctx, grad_tokens):
    (row_tokens,) = ctx.saved_tensors
    return grad_tokens.index_select(0, row_tokens), None, None


def _routing(num_tokens: int, num_experts: int, top_k: int | None, dtype, device, *, ties: bool = False, scale: float = 1.0, D=6):
    """Random arguments: top_k experts a token, or any number where it is None. ``ties``: all tokens and probabilities are the
    same."""
    draw = torch.Generator().manual_seed(1000 * num_tokens + 10 * num_experts + (top_k or 0))
    tokens, probs = torch.randn(num_tokens, D, generator=draw) * scale, torch.rand(num_tokens, num_experts, generator=draw)
    if top_k is None:
        chosen = torch.rand(num_tokens, num_experts, generator=draw) < 0.3
    else:
        chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
        chosen.scatter_(1, torch.rand(num_tokens, num_experts, generator=draw).topk(top_k, dim=1).indices, True)
    if ties:
        tokens, probs = torch.ones_like(tokens), torch.full_like(probs, 0.5)
    return tokens.to(device, dtype), probs.to(device), chosen.to(device)


def _permute_case(*sizes, strided: bool = False, to_one: bool = False, **how):
    def make(dtype, device):
        tokens, probs, chosen = _routing(*sizes, dtype, device, **how)
        if dtype == torch.float64:
            probs = probs.double()
        if strided:
            tokens, probs = tokens.t().contiguous().t(), torch.stack([probs, probs], dim=-1)[..., 0]
            chosen = chosen.t().contiguous().t()
        if to_one:
            chosen = torch.zeros_like(chosen)
            chosen[:, chosen.shape[1] // 2] = True
        per_token = chosen.sum(1)
        return tokens, probs, chosen, int(per_token.sum()), max(1, int(per_token.max()) if len(per_token) else 0)

    return make


def _unpermute_case(*sizes, **how):
    def make(dtype, device):
        tokens, probs, chosen, num_rows, width = _permute_case(*sizes, **how)(dtype, device)
        rows, _, _, row_tokens, token_rows = _permute_reference(tokens, probs, chosen, num_rows, width)
        # rows that differ, as those of experts do
        factor = 1 + torch.arange(num_rows, device=device, dtype=dtype).unsqueeze(1) / max(1, num_rows)
        rows = rows * factor
        return (rows.t().contiguous().t() if how.get("strided") else rows), token_rows, row_tokens

    return make


_SITUATIONS = (
    ("ordinary", (13, 8, 2), {}),
    ("empty", (0, 4, 2), {}),
    ("no expert chosen", (3, 4, 0), {}),
    ("one row", (1, 4, 1), {}),
    ("ragged", (17, 5, None), {}),
    ("non-contiguous", (9, 6, 3), {"strided": True}),
    ("extreme values", (11, 4, 2), {"scale": 1e4}),
    ("ties", (8, 4, 2), {"ties": True}),
    ("all to one expert", (10, 4, 2), {"to_one": True}),
    ("one expert", (7, 1, 1), {}),
    ("width of none", (6, 4, 2), {"D": 0}),
    ("wide", (33, 64, 8), {"D": 40}),
)


def _cases(make) -> tuple[Case, ...]:
    return tuple(Case(name, make(*sizes, **how)) for name, sizes, how in _SITUATIONS)


PERMUTE = Op(
    "permute(Tensor tokens, Tensor probs, Tensor routing_map, SymInt num_rows, SymInt width) "
    "-> (Tensor rows, Tensor row_probs, Tensor counts, Tensor row_tokens, Tensor token_rows)",
    _permute_reference,
    _permute_fake,
    _permute_setup,
    _permute_backward,
    _cases(_permute_case),
)
UNPERMUTE = Op(
    "unpermute(Tensor rows, Tensor token_rows, Tensor row_tokens) -> Tensor tokens",
    _unpermute_reference,
    _unpermute_fake,
    _unpermute_setup,
    _unpermute_backward,
    _cases(_unpermute_case),
)
OPS = (PERMUTE, UNPERMUTE)
