"""Rows by expert: the map, tokens to rows with probabilities, back with probabilities, and to rows in E4M3; DeepSeek-V3's sizes.

Peers: plain torch; Megatron-Core's permute and unpermute; their fused form through Transformer Engine.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from r1mega.ops.permute import UNPERMUTE_BACKWARD, permute, permute_probs, permute_rows, unpermute
from r1mega.ops.permute_quantize import permute_quantize, permute_quantize_both, permute_quantize_columns
from r1mega.ops.quantize import quantize_columns, quantize_rows_reference
from r1mega.ops.row_map import RowMap, map_rows
from r1mega.testing.bench import Bench

T, D, K = 8192, 7168, 8
ROWS = T * K


class _Rows(NamedTuple):
    """What the way back starts from. ``te_map``: Transformer Engine's map of the same rows, where it is installed."""

    rows_RD: torch.Tensor
    row_map: RowMap
    probs_R: torch.Tensor
    probs_TE: torch.Tensor
    routing_map_TE: torch.Tensor
    te_map: Any


@functools.cache
def _megatron() -> Any:
    """Megatron-Core's module of these functions: imported when a peer runs, which takes seconds."""
    return importlib.import_module("megatron.core.transformer.moe.moe_utils")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _routed(num_experts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    probs = torch.rand(T, num_experts, device=device)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, torch.rand_like(probs).topk(K, dim=1).indices, True)
    return tokens, probs, chosen


def _rows(num_experts: int, device: torch.device) -> _Rows:
    tokens, probs, chosen = _routed(num_experts, device)
    row_map = map_rows(chosen, K)
    te_map = None
    if _has("transformer_engine") and device.type != "cpu":
        te_map = _megatron().permute(tokens, chosen, probs=probs, num_out_tokens=ROWS, fused=True)[2]
    return _Rows(permute_rows(tokens, row_map), row_map, permute_probs(probs, row_map), probs, chosen, te_map)


def _torch_map(chosen: torch.Tensor) -> torch.Tensor:
    return torch.nonzero_static(chosen.t(), size=ROWS)


def _torch_permute(tokens, probs, chosen):
    expert, token = _torch_map(chosen).unbind(1)
    return tokens.index_select(0, token), probs[token, expert], chosen.sum(0)


def _torch_unpermute(given: _Rows):
    weighted = given.rows_RD.float() * given.probs_R.unsqueeze(1)
    sums = torch.zeros(T, D, device=weighted.device).index_add_(0, given.row_map.row_tokens_R, weighted)
    return sums.bfloat16()


def _torch_unpermute_backward(given: _Rows, grad):
    grad_rows = grad.index_select(0, given.row_map.row_tokens_R)
    return grad_rows * given.probs_R.unsqueeze(1).bfloat16(), (grad_rows * given.rows_RD).sum(1, dtype=torch.float32)


def _torch_quantize(tokens, row_map):
    return quantize_rows_reference(tokens.index_select(0, row_map.row_tokens_R.clamp(min=0)), False)


def _torch_quantize_columns(tokens, row_map):
    rows = tokens.index_select(0, row_map.row_tokens_R.clamp(min=0))
    return quantize_rows_reference(torch.where((row_map.row_tokens_R < 0).unsqueeze(1), 0, rows).t(), False)


def _permute_peers() -> dict[str, Callable[..., Any]]:
    def megatron(fused: bool):
        return lambda tokens, probs, chosen: _megatron().permute(tokens, chosen, probs=probs, num_out_tokens=ROWS, fused=fused)

    peers: dict[str, Callable[..., Any]] = {"torch": _torch_permute}
    if _has("megatron"):
        peers["Megatron-Core"] = megatron(False)
        if _has("transformer_engine"):
            peers["Megatron-Core, Transformer Engine"] = megatron(True)
    return peers


def _unpermute_peers() -> dict[str, Callable[..., Any]]:
    def plain(given: _Rows):
        order = given.row_map.row_tokens_R
        return _megatron().unpermute(given.rows_RD, order, (T, D), probs=given.probs_TE, routing_map=given.routing_map_TE)

    def fused(given: _Rows):
        return _megatron().unpermute(given.rows_RD, given.te_map, (T, D), probs=given.probs_TE, fused=True)

    peers: dict[str, Callable[..., Any]] = {"torch": _torch_unpermute}
    if _has("megatron"):
        peers["Megatron-Core"] = plain
        if _has("transformer_engine"):
            peers["Megatron-Core, Transformer Engine"] = fused
    return peers


def _quantize_inputs(num_experts: int, device: torch.device, multiple: int = 1) -> tuple[torch.Tensor, RowMap]:
    tokens, _, chosen = _routed(num_experts, device)
    return tokens, map_rows(chosen, K, multiple)


def _backward_inputs(device: torch.device) -> tuple[_Rows, torch.Tensor]:
    return _rows(256, device), torch.randn(T, D, device=device, dtype=torch.bfloat16)


def benches() -> Iterator[Bench]:
    yield Bench(
        "row_map",
        f"{T} x 256, top-{K}",
        lambda device: (_routed(256, device)[2],),
        lambda chosen: map_rows(chosen, K),
        # the map of bytes; counts and ends; expert and token of a row, row of a slot
        num_bytes=T * 256 + 256 * (8 + 4) + ROWS * (4 + 8 + 8),
        peers={"torch": _torch_map},
    )
    for num_experts in (8, 32, 256):
        yield Bench(
            "permute",
            f"{T} x {D} bf16, top-{K} of {num_experts}, with its map and probabilities",
            functools.partial(_routed, num_experts),
            lambda tokens, probs, chosen: permute(tokens, probs, chosen, K),
            # each token read once, each row written once, both in bf16; the map and what it becomes are under 1%
            num_bytes=(T + ROWS) * D * 2,
            peers=_permute_peers(),
        )
    for num_experts in (8, 32, 256):
        yield Bench(
            "unpermute",
            f"{T} x {D} bf16, top-{K} of {num_experts}, with probabilities",
            lambda device, num_experts=num_experts: (_rows(num_experts, device),),
            lambda given: unpermute(given.rows_RD, given.row_map, given.probs_R),
            num_bytes=(ROWS + T) * D * 2,  # rows read, tokens written
            peers=_unpermute_peers(),
        )
    yield Bench(
        "unpermute_backward",
        f"{T} x {D} bf16, top-{K} of 256",
        _backward_inputs,
        lambda given, grad: UNPERMUTE_BACKWARD.packet(
            grad, given.rows_RD, given.row_map.row_tokens_R, given.row_map.token_rows_TK, given.probs_R
        ),
        num_bytes=(T + 2 * ROWS) * D * 2,  # the tokens' gradient and rows read, the rows' gradient written
        peers={"torch": _torch_unpermute_backward},
    )
    yield Bench(
        "permute_quantize",
        f"{T} x {D} bf16 to E4M3, top-{K} of 256",
        functools.partial(_quantize_inputs, 256),
        permute_quantize,
        # tokens read in bf16; a byte a number and a scale of four bytes a block of 128 written
        num_bytes=T * D * 2 + ROWS * (D + D // 128 * 4),
        peers={"torch": _torch_quantize},
    )
    for num_experts in (8, 32, 256):
        # a whole block of 128 more rows for every expert at most, whatever the routing
        rows = (ROWS + num_experts * 127) // 128 * 128
        case = f"{T} x {D} bf16 to E4M3, top-{K} of {num_experts}, rows by 128"
        inputs = functools.partial(_quantize_inputs, num_experts, multiple=128)
        payload = rows * D + rows // 128 * D * 4
        yield Bench(
            "permute_quantize_columns",
            case,
            inputs,
            permute_quantize_columns,
            # each row read in bf16, though its token is in the L2 by then for most; a byte a number and scales written
            num_bytes=rows * D * 2 + payload,
            peers={
                "permute, quantize_columns": lambda tokens, row_map: quantize_columns(permute_rows(tokens, row_map)),
                "torch": _torch_quantize_columns,
            },
        )
        yield Bench(
            "permute_quantize_both",
            case,
            inputs,
            permute_quantize_both,
            num_bytes=rows * D * 2 + 2 * payload,
            peers={
                "permute_quantize, permute_quantize_columns": lambda tokens, row_map: (
                    permute_quantize(tokens, row_map),
                    permute_quantize_columns(tokens, row_map),
                ),
                "torch": lambda tokens, row_map: (_torch_quantize(tokens, row_map), _torch_quantize_columns(tokens, row_map)),
            },
        )
