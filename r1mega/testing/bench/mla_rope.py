"""Benchmarks of ``mla_rope`` at DeepSeek-V3's and V2-Lite's heads. Peers: Megatron's plain path, and torch.compile of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from r1mega.ops import mla_rope as ops
from r1mega.testing.bench import Bench

SIZES = ((4096, 1, 128, 128, 64, 128), (4096, 4, 16, 128, 64, 128))
"""S, B, H, nope, rope, v: of V3 and of V2-Lite."""
BF16 = 2


def benches() -> Iterator[Bench]:
    """Forward and backward in bf16."""
    for S, B, H, nope, rope, v in SIZES:
        case = f"{S * B} tokens, {H} heads of {nope}/{rope}/{v}"
        heads, table = S * B * H, 2 * 4 * S * rope // 2
        # a head's query and key_value in, its query, key and value out; a token's shared key; cosines and sines
        moved = heads * (2 * (nope + rope) + (nope + v) + (nope + rope) + v) + S * B * rope
        yield Bench(
            "mla_rope",
            case,
            _inputs(S, B, H, nope, rope, v),
            lambda query, both, shared, cos, sin, nope=nope: ops.MLA_ROPE.packet(query, both, shared, cos, sin, nope),
            num_bytes=BF16 * moved + table,
            peers=_peers(lambda query, both, shared, cos, sin, nope=nope: _plain(query, both, shared, cos, sin, nope)),
        )
        yield Bench(
            "mla_rope_backward",
            case,
            _grads(S, B, H, nope, rope, v),
            lambda query, key, value, cos, sin, nope=nope: ops.MLA_ROPE_BACKWARD.packet(query, key, value, cos, sin, nope),
            num_bytes=BF16 * moved + table,  # the same numbers the other way
            peers=_peers(lambda *inputs, nope=nope: ops.MLA_ROPE_BACKWARD.reference(*inputs, nope)),
        )


def _peers(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"torch": function, "torch.compile": torch.compile(function, dynamic=False)}


def _plain(query, both, shared, cos, sin, nope):
    """What Megatron does: in the tensors' dtype, one step after another."""
    cos, sin = (torch.cat([table, table], dim=-1)[:, None, None].to(query.dtype) for table in (cos, sin))

    def turn(x):
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.cat([first, second], dim=-1) * cos + torch.cat([-second, first], dim=-1) * sin

    turned = torch.cat([query[..., :nope], turn(query[..., nope:])], dim=-1)
    key = torch.cat([both[..., :nope], turn(shared.unsqueeze(2)).expand(-1, -1, both.shape[2], -1)], dim=-1)
    return turned, key, both[..., nope:].contiguous()


def _tables(S: int, rope: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(S, device=device)
    angles = torch.outer(places, 10000.0 ** -(torch.arange(0, rope, 2, device=device) / rope))
    return angles.cos(), angles.sin()


def _inputs(S, B, H, nope, rope, v) -> Callable[[torch.device], tuple]:
    def make(device: torch.device) -> tuple[Any, ...]:
        shapes = (S, B, H, nope + rope), (S, B, H, nope + v), (S, B, rope)
        return *(torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes), *_tables(S, rope, device)

    return make


def _grads(S, B, H, nope, rope, v) -> Callable[[torch.device], tuple]:
    def make(device: torch.device) -> tuple[Any, ...]:
        shapes = (S, B, H, nope + rope), (S, B, H, nope + rope), (S, B, H, v)
        return *(torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes), *_tables(S, rope, device)

    return make
