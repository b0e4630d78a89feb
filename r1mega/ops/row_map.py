"""Op ``row_map``: which row of a tensor sorted by expert holds which token, from a routing map.

For each expert e in order, for each token t in order with ``routing_map[t, e]``, a row; then rows of padding up to a multiple.
One map serves every movement of rows: see ``permute``, ``unpermute`` and ``permute_quantize``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.ops.library import Case, Op


class RowMap(NamedTuple):
    """Between T tokens and R rows of E experts, all on the tokens' device.

    ``row_tokens_R`` int64: the token of a row, -1 for padding. ``token_rows_TK`` int64: the rows of a token in the order of the
    experts, then -1. ``row_experts_R`` int32: the expert of a row, its padding included, -1 behind the last expert's rows
    (DeepGEMM's ``m_indices``). ``ends_E`` int32: the end of each expert's rows, padding included (``offs`` of torch's grouped
    matrix product). ``counts_E`` int64: rows of each expert without padding.
    """

    row_tokens_R: torch.Tensor
    token_rows_TK: torch.Tensor
    row_experts_R: torch.Tensor
    ends_E: torch.Tensor
    counts_E: torch.Tensor


def map_rows(routing_map_TE: torch.Tensor, top_k: int | None = None, multiple: int = 1) -> RowMap:
    """The rows that ``routing_map_TE`` (bool, any strides) asks for, sorted by expert, then token.

    ``top_k``: how many experts each token has, where all have as many; None counts, which waits for a device that works ahead.
    ``multiple``: each expert's rows are filled up to a multiple of it; an expert without rows gets none. The number R of rows is
    exact where ``multiple`` is 1 or ``top_k`` is None. Otherwise it is the largest that can be needed, ``top_k * T + min(E,
    top_k * T) * (multiple - 1)`` rounded down to a multiple, and what is left over lies behind the last expert's rows.

    On a CPU a wrong ``top_k`` raises ValueError; elsewhere it is the caller's promise: one that is broken loses rows and nothing
    is written out of bounds. Fewer than 2^31 rows. Integers all: the same bits on every device.
    """
    num_tokens, num_experts = routing_map_TE.shape
    if top_k is not None:
        num_rows, width = top_k * num_tokens, top_k
        if multiple > 1:
            num_rows = (num_rows + min(num_experts, num_rows) * (multiple - 1)) // multiple * multiple
    elif routing_map_TE.numel():
        rows_E = (routing_map_TE.sum(0) + multiple - 1).div(multiple, rounding_mode="floor") * multiple
        num_rows, width = torch.stack([rows_E.sum(), routing_map_TE.sum(1).max()]).tolist()
    else:
        num_rows = width = 0
    counts, ends, row_experts, row_tokens, token_rows = ROW_MAP.packet(routing_map_TE, num_rows, width, multiple)
    return RowMap(row_tokens, token_rows, row_experts, ends, counts)


def row_map_reference(routing_map, num_rows, width, multiple):
    num_tokens, num_experts = routing_map.shape
    counts = routing_map.sum(0)
    padded = (counts + multiple - 1).div(multiple, rounding_mode="floor") * multiple
    ends = padded.cumsum(0)
    if routing_map.device.type == "cpu":
        _check(routing_map, ends, num_rows, width, multiple)
    places = torch.arange(num_rows, device=routing_map.device)
    row_experts = torch.searchsorted(ends, places, right=True)
    row_experts = torch.where(row_experts < num_experts, row_experts, -1).int()
    # one more row and one more slot take what is not there: no size depends on the map, so nothing waits for the device
    row_tokens = counts.new_full((num_rows + 1,), -1)
    token_rows = counts.new_full((num_tokens, width + 1), -1)
    if routing_map.numel():
        pairs = torch.nonzero_static(routing_map.t(), size=num_rows, fill_value=-1)  # in the order of (expert, token)
        found = pairs[:, 0] >= 0
        expert, token = pairs.clamp(min=0).unbind(1)
        row = (ends - padded)[expert] + routing_map.cumsum(0)[token, expert] - 1
        row = torch.where(found, row.clamp(max=num_rows), num_rows)
        slot = torch.where(found, (routing_map.cumsum(1)[token, expert] - 1).clamp(max=width), width)
        row_tokens[row] = torch.where(row < num_rows, token, -1)
        token_rows[token, slot] = torch.where(row < num_rows, row, -1)
    return counts, ends.clamp(max=num_rows).int(), row_experts, row_tokens[:num_rows].clone(), token_rows[:, :width].contiguous()


def _check(routing_map, ends, num_rows, width, multiple):
    per_token = routing_map.sum(1)
    total, most = int(per_token.sum()), int(per_token.max()) if per_token.numel() else 0
    if multiple == 1 and total != num_rows:
        raise ValueError(f"row_map: expected as many rows as routing_map chooses, {total}, got {num_rows}")
    needed = int(ends[-1]) if ends.numel() else 0
    if needed > num_rows:
        raise ValueError(f"row_map: expected at least {needed} rows for multiples of {multiple}, got {num_rows}")
    if most > width:
        raise ValueError(f"row_map: expected a width of at least a token's rows, {most}, got {width}")


def _fake(routing_map, num_rows, width, multiple):
    def empty(*shape, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device=routing_map.device)

    num_tokens, num_experts = routing_map.shape
    return (
        empty(num_experts),
        empty(num_experts, dtype=torch.int32),
        empty(num_rows, dtype=torch.int32),
        empty(num_rows),
        empty(num_tokens, width),
    )


def routing(num_tokens: int, num_experts: int, top_k: int | None, device, *, strided=False, to_one=False) -> torch.Tensor:
    """A random routing map for cases: top_k experts a token, or any number where it is None."""
    draw = torch.Generator().manual_seed(1000 * num_tokens + 10 * num_experts + (top_k or 0))
    if top_k is None:
        chosen = torch.rand(num_tokens, num_experts, generator=draw) < 0.3
    else:
        chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
        chosen.scatter_(1, torch.rand(num_tokens, num_experts, generator=draw).topk(top_k, dim=1).indices, True)
    if to_one:
        chosen = torch.zeros_like(chosen)
        chosen[:, num_experts // 2] = True
    return (chosen.t().contiguous().t() if strided else chosen).to(device)


def sizes_of(routing_map: torch.Tensor, multiple: int = 1, spare: int = 0) -> tuple[int, int, int]:
    """num_rows, width and multiple of a map for cases; ``spare``: rows behind the last expert's."""
    per_token, per_expert = routing_map.sum(1), routing_map.sum(0)
    num_rows = int(((per_expert + multiple - 1) // multiple * multiple).sum()) + spare
    return num_rows, max(1, int(per_token.max()) if len(per_token) else 0), multiple


SITUATIONS = (
    ("ordinary", (13, 8, 2), {}),
    ("empty", (0, 4, 2), {}),
    ("no expert chosen", (3, 4, 0), {}),
    ("one row", (1, 4, 1), {}),
    ("ragged", (17, 5, None), {}),
    ("non-contiguous", (9, 6, 3), {"strided": True}),
    ("all to one expert", (10, 4, 2), {"to_one": True}),
    ("one expert", (7, 1, 1), {}),
    ("wide", (33, 64, 8), {}),
    ("more than eight rows a token", (12, 40, 19), {}),
    ("padding", (21, 6, 2), {"multiple": 4}),
    ("padding of one row, rows to spare", (1, 4, 1), {"multiple": 16, "spare": 32}),
)
"""Of every op of the family: name, sizes, and how: arguments of :func:`routing`, :func:`sizes_of`."""

_LARGER = (
    ("blocks of tokens", (1000, 256, 8), {}),
    ("more experts than lanes, an odd number", (300, 1001, 6), {"multiple": 8, "spare": 64}),
    ("spans of several blocks", (40000, 6, None), {"multiple": 128}),
)


def _case(num_tokens, num_experts, top_k, multiple=1, spare=0, **how):
    def make(dtype, device):
        chosen = routing(num_tokens, num_experts, top_k, device, **how)
        return chosen, *sizes_of(chosen, multiple, spare)

    return make


ROW_MAP = Op(
    "row_map(Tensor routing_map, SymInt num_rows, SymInt width, SymInt multiple) "
    "-> (Tensor counts, Tensor ends, Tensor row_experts, Tensor row_tokens, Tensor token_rows)",
    row_map_reference,
    _fake,
    cases=tuple(Case(name, _case(*sizes, **how)) for name, sizes, how in SITUATIONS + _LARGER),
    dtypes=(torch.float32,),
)
OPS = (ROW_MAP,)
