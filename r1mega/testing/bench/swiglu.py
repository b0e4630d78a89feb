"""Benchmarks of ``swiglu`` and its relatives, at DeepSeek-V3's expert width. Peers: plain torch, and torch.compile of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from r1mega.ops import swiglu as ops
from r1mega.ops.quantize import BLOCK, quantize_columns, quantize_rows_reference
from r1mega.testing.bench import Bench

SIZES = ((32768, 2048), (8192, 2048), (32768, 1408))
"""Rows and F: V3's experts at two batch sizes, V2-Lite's at one."""
BF16 = 2


def benches() -> Iterator[Bench]:
    """Forward and backward in bf16, then both with quantised results from bf16 and from E4M3."""
    for num_rows, width in SIZES:
        case = f"{num_rows} x 2*{width}"
        numbers = num_rows * width
        yield Bench(
            "swiglu",
            case,
            _inputs(num_rows, width),
            lambda grad, hidden, probs: ops.SWIGLU.packet(hidden, probs),
            num_bytes=3 * BF16 * numbers + 4 * num_rows,  # hidden in, result out, probabilities
            peers={"torch": _forward, "torch.compile": _compiled(_forward)},
        )
        yield Bench(
            "swiglu_backward",
            case,
            _inputs(num_rows, width),
            ops.SWIGLU_BACKWARD.packet,
            num_bytes=5 * BF16 * numbers + 8 * num_rows,  # gradient and hidden in, hidden's gradient out, probabilities and theirs
            peers={"torch": ops.SWIGLU_BACKWARD.reference, "torch.compile": _compiled(ops.SWIGLU_BACKWARD.reference)},
        )
    num_rows, width = SIZES[0]
    numbers = num_rows * width
    for fp8 in (False, True):
        case = f"{num_rows} x 2*{width}, hidden in {'E4M3' if fp8 else 'bf16'}"
        hidden_bytes = 2 * numbers * (1 + 4 / BLOCK if fp8 else BF16)  # payload and scales, or bf16
        yield Bench(
            "swiglu_quantize",
            case,
            _inputs(num_rows, width, fp8=fp8),
            lambda grad, hidden, scales, probs: ops.SWIGLU_QUANTIZE.packet(hidden, scales, probs, True),
            num_bytes=int(hidden_bytes + numbers * (1 + 4 / BLOCK)) + 4 * num_rows,  # payload and scales out
            peers={"torch": lambda grad, hidden, scales, probs: ops.SWIGLU_QUANTIZE.reference(hidden, scales, probs, True)},
        )
        yield Bench(
            "swiglu_backward_quantize",
            case,
            _inputs(num_rows, width, fp8=fp8),
            lambda grad, hidden, scales, probs: ops.SWIGLU_BACKWARD_QUANTIZE.packet(grad, hidden, scales, probs, True),
            # gradient in; out: hidden's gradient in bf16 and in E4M3 with scales, the activation
            num_bytes=int(hidden_bytes + numbers * (BF16 + 2 * BF16 + 2 * (1 + 4 / BLOCK) + BF16)) + 8 * num_rows,
            peers={"torch": lambda *inputs: ops.SWIGLU_BACKWARD_QUANTIZE.reference(*inputs, True)},
        )

        yield Bench(
            "swiglu_backward_quantize_columns",
            case,
            _inputs(num_rows, width, fp8=fp8),
            lambda grad, hidden, scales, probs: ops.SWIGLU_BACKWARD_QUANTIZE_COLUMNS.packet(grad, hidden, scales, probs, True),
            # gradient in; out: hidden's gradient twice and the activation, a byte a number and scales
            num_bytes=int(hidden_bytes + numbers * (BF16 + 5 * (1 + 4 / BLOCK))) + 8 * num_rows,
            peers={
                "swiglu_backward_quantize, quantize_columns": _in_two_passes,
                "torch": lambda *inputs: ops.SWIGLU_BACKWARD_QUANTIZE_COLUMNS.reference(*inputs, True),
            },
        )


def _in_two_passes(grad, hidden, scales, probs):
    made = ops.swiglu_backward_quantize(grad, hidden, scales, probs, True)
    return made, quantize_columns(made.grad_hidden_R2F, True), quantize_columns(made.activation_RF, True)


def _inputs(num_rows: int, width: int, *, fp8: bool | None = None) -> Callable[[torch.device], tuple]:
    """Gradient, hidden (its scales, or None, where ``fp8`` is said) and probabilities."""

    def make(device: torch.device) -> tuple[Any, ...]:
        hidden = torch.randn(num_rows, 2 * width, device=device, dtype=torch.bfloat16)
        grad = torch.randn(num_rows, width, device=device, dtype=torch.bfloat16)
        probs = torch.rand(num_rows, device=device)
        if fp8 is None:
            return grad, hidden, probs
        return grad, *(quantize_rows_reference(hidden, True) if fp8 else (hidden, None)), probs

    return make


def _forward(grad, hidden, probs):
    gate, up = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs.unsqueeze(-1)).to(hidden.dtype)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile, which compiles at the first call."""
    return torch.compile(function, dynamic=False)
