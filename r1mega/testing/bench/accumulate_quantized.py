"""Benchmarks of ``accumulate_grouped_quantized_``: FP8 weight gradients of DeepSeek-V3's experts, beside those of bf16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops.accumulate import accumulate_grouped_
from r1mega.ops.accumulate_quantized import accumulate_grouped_quantized_
from r1mega.ops.quantize import BLOCK, quantize_columns
from r1mega.testing.bench import Bench

WIDTHS = ((4096, 7168), (7168, 2048))
"""Of an expert's two stacks: gate and up, down."""
ROWS = ((8, 32768), (16, 32768), (32, 32768), (64, 32768), (32, 8192))


def _ours(out, left, right, ends, *others):
    accumulate_grouped_quantized_(out, left, right, ends)


def _in_place_of(out, left, right, ends, *others):
    accumulate_grouped_quantized_(out, left, right, ends, overwrite=True)


def _in_bf16(out, left, right, ends, left_RN, right_RK):
    accumulate_grouped_(out, left_RN, right_RK, ends)


def _in_bf16_in_place_of(out, left, right, ends, left_RN, right_RK):
    accumulate_grouped_(out, left_RN, right_RK, ends, overwrite=True)


def _plain(out, left, right, ends, left_RN, right_RK):
    if left_RN.is_cuda:
        out.add_(torch.nn.functional.grouped_mm(left_RN.t(), right_RK, offs=ends))
        return
    first = 0
    for own, end in zip(out, ends.tolist(), strict=True):
        own.add_(left_RN[first:end].t().mm(right_RK[first:end]))
        first = end


def _bench(num_experts: int, R: int, N: int, K: int, *, overwrite: bool = False) -> Bench:
    def make(device):
        share = torch.rand(num_experts) + 0.5  # experts differ by up to three times
        ends = (share.cumsum(0) / share.sum() * (R // BLOCK)).round().to(torch.int32) * BLOCK
        rows = tuple(torch.randn(R, width, device=device, dtype=torch.bfloat16) for width in (N, K))
        return torch.zeros(num_experts, N, K, device=device), *map(quantize_columns, rows), ends.to(device), *rows

    # payloads and the scales of their blocks; out written in fp32, and read if it is added to
    num_bytes = R * (N + K) + 4 * R // BLOCK * (N + K) + (4 if overwrite else 8) * num_experts * N * K
    return Bench(
        "accumulate_grouped_quantized_",
        f"{num_experts} experts, {R} rows, {N} x {K}{', overwrite' if overwrite else ''}",
        make,
        _in_place_of if overwrite else _ours,
        num_bytes=num_bytes,
        flops=2 * R * N * K,
        ceiling="fp8",
        peers={"bf16": _in_bf16_in_place_of if overwrite else _in_bf16, "torch": _plain},
    )


def benches() -> Iterator[Bench]:
    """Adding at every size; setting at one of each stack."""
    for N, K in WIDTHS:
        for num_experts, R in ROWS:
            yield _bench(num_experts, R, N, K)
        yield _bench(32, 32768, N, K, overwrite=True)
