"""Benchmarks of ``accumulate_product_`` and ``accumulate_grouped_``: weight gradients of a DeepSeek-V3 layer added into fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops.accumulate import accumulate_grouped_, accumulate_product_
from r1mega.testing.bench import Bench


def _matrices(M: int, N: int, K: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(M, width, device=device, dtype=torch.bfloat16) for width in (N, K))


def _product(M: int, N: int, K: int) -> Bench:
    def make(device):
        return torch.zeros(N, K, device=device), *_matrices(M, N, K, device)

    def plain(out, left, right):
        out.add_(left.t().mm(right))

    return Bench(
        "accumulate_product_",
        f"{M} tokens, {N} x {K}",
        make,
        accumulate_product_,
        num_bytes=2 * M * (N + K) + 8 * N * K,  # both operands; out read and written in fp32
        flops=2 * M * N * K,
        ceiling="bf16",
        peers={"torch": plain},
    )


def _grouped(num_experts: int, R: int, N: int, K: int) -> Bench:
    def make(device):
        share = torch.rand(num_experts) + 0.5  # experts differ by up to three times
        ends = (share.cumsum(0) / share.sum() * R).round().to(torch.int32)
        return torch.zeros(num_experts, N, K, device=device), *_matrices(R, N, K, device), ends.to(device)

    def plain(out, left, right, ends):
        if left.is_cuda:
            out.add_(torch.nn.functional.grouped_mm(left.t(), right, offs=ends))
            return
        first = 0
        for own, end in zip(out, ends.tolist(), strict=True):
            own.add_(left[first:end].t().mm(right[first:end]))
            first = end

    return Bench(
        "accumulate_grouped_",
        f"{num_experts} experts, {R} rows, {N} x {K}",
        make,
        accumulate_grouped_,
        num_bytes=2 * R * (N + K) + 8 * num_experts * N * K,  # both operands; out read and written in fp32
        flops=2 * R * N * K,
        ceiling="bf16",
        peers={"torch": plain},
    )


def benches() -> Iterator[Bench]:
    """V3's widths: the query's projection up, an expert's two stacks."""
    yield _product(8192, 24576, 1536)
    yield _product(8192, 7168, 2048)
    yield _grouped(8, 16384, 4096, 7168)
    yield _grouped(8, 16384, 7168, 2048)
