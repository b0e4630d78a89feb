"""Benchmark cases of quantisation, at the sizes of DeepSeek-V3's activations and expert weights. Plain torch is the peer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops import quantize as ops
from r1mega.testing.bench import Bench

SHAPES = ((4096, 7168), (32768, 2048))


def _numbers(*shape: int):
    return lambda device: (torch.randn(*shape, device=device).to(torch.bfloat16),)


def _quantized(M: int, K: int):
    return lambda device: tuple(ops.quantize_rows(_numbers(M, K)(device)[0]))


def _rows(x):
    """The payload and scales as they are written down elsewhere: no row layout, NaN or smallest scale."""
    tiles = x.view(x.shape[0], -1, ops.BLOCK).float()
    scale = tiles.abs().amax(-1, keepdim=True) / ops.LARGEST
    return (tiles / scale).to(ops.E4M3).view(x.shape), scale.squeeze(-1)


def _blocks(x):
    *stack, N, K = x.shape
    tiles = x.view(*stack, N // ops.BLOCK, ops.BLOCK, K // ops.BLOCK, ops.BLOCK).float()
    scale = tiles.abs().amax((-3, -1), keepdim=True) / ops.LARGEST
    payload = (tiles / scale).to(ops.E4M3).view(x.shape)
    return payload, payload.view(torch.uint8).transpose(-1, -2).contiguous()


def _read_back(payload, scales):
    return payload.float().view(*scales.shape, ops.BLOCK) * scales.unsqueeze(-1)


def benches() -> Iterator[Bench]:
    """Every op; shapes are whole blocks. Bytes: bf16 two a number, payloads one, scales four a block of 128."""
    for M, K in SHAPES:
        case, n = f"{M} x {K} bf16", M * K
        scales = n * 4 // ops.BLOCK
        one, both = 3 * n + scales, 4 * n + 2 * scales  # x read once, each payload written once
        yield Bench("quantize_rows", case, _numbers(M, K), ops.quantize_rows, one, peers={"torch": _rows})
        yield Bench(
            "quantize_columns",
            case,
            _numbers(M, K),
            ops.quantize_columns,
            one,
            peers={"torch": lambda x: _rows(x.t().contiguous())},
        )
        yield Bench(
            "quantize_both",
            case,
            _numbers(M, K),
            ops.quantize_both,
            both,
            peers={"torch": lambda x: (_rows(x), _rows(x.t().contiguous()))},
        )
        yield Bench(  # payload and scales read, x written
            "dequantize_rows",
            case,
            _quantized(M, K),
            ops.dequantize_rows,
            one,
            peers={"torch": lambda payload, scales: _read_back(payload, scales).to(torch.bfloat16)},
        )
        yield Bench(  # payload and scales read, payload and scales written
            "requantize_columns",
            case,
            _quantized(M, K),
            ops.requantize_columns,
            2 * n + 2 * scales,
            peers={"torch": lambda payload, scales: _rows(_read_back(payload, scales).flatten(1).t().contiguous())},
        )
    E, N, K = 8, 4096, 7168
    yield Bench(  # weights read once, two payloads written; scales are one in 16,384
        "quantize_blocks",
        f"{E} x {N} x {K} bf16, transposed",
        _numbers(E, N, K),
        lambda x: ops.quantize_blocks(x, transposed=True),
        4 * E * N * K,
        peers={"torch": _blocks},
    )
