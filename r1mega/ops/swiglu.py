"""Op ``swiglu``, a gated FFN's activation with a row's probability, and its relatives that quantise to block-scaled E4M3.

``out = silu(gate) * up * prob`` with ``silu(x) = x / (1 + e^-x)`` (arXiv 2002.05202); ``hidden`` holds the gate columns, then the
up columns. The FP8 format is that of DeepSeek-V3 (arXiv 2412.19437, section 3.3): a scale for 128 numbers of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from r1mega.ops.library import Case, Op
from r1mega.ops.quantize import BLOCK, Quantized, fake_rows, quantize_rows_reference


class QuantizedGrads(NamedTuple):
    """What :func:`swiglu_backward_quantize` returns: ``grad_hidden`` ``[R, 2F]`` in bf16, the same in E4M3 with its scales,
    ``grad_probs`` ``[R]`` (or empty), and the forward's ``[R, F]`` in bf16."""

    grad_hidden_R2F: torch.Tensor
    payload_R2F: torch.Tensor
    scales: torch.Tensor
    grad_probs_R: torch.Tensor
    activation_RF: torch.Tensor


class QuantizedColumnGrads(NamedTuple):
    """What :func:`swiglu_backward_quantize_columns` returns: ``grad_hidden`` ``[R, 2F]`` by rows, the same by columns ``[2F, R]``,
    the activation by columns ``[F, R]``, each with its scales in the row layout, and ``grad_probs`` ``[R]`` (or empty)."""

    payload_R2F: torch.Tensor
    scales: torch.Tensor
    payload_2FR: torch.Tensor
    scales_t: torch.Tensor
    activation_FR: torch.Tensor
    activation_scales_t: torch.Tensor
    grad_probs_R: torch.Tensor


def swiglu(hidden: torch.Tensor, probs: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up * prob``: ``[..., 2F]`` to ``[..., F]`` in hidden's dtype, computed in fp32 (fp64 for fp64), rounded once.

    ``hidden``: fp32, bf16, fp16 or fp64, any strides, any F and number of rows, 0 among them. ``probs``: one a row, any floating
    dtype, ``[...]``; None: 1. The gradient of ``hidden`` is in its dtype, that of ``probs`` is a row's fp32 sum over F in one
    order, in theirs. The same input gives the same bits, forward and backward. A NaN or an infinity stays in its column; a gate of
    minus infinity gives NaN, as in torch.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = SWIGLU.packet(rows, None if probs is None else probs.reshape(-1))
    return out.view(*hidden.shape[:-1], out.shape[-1])


def swiglu_quantize(
    hidden_R2F: torch.Tensor,
    hidden_scales: torch.Tensor | None = None,
    probs_R: torch.Tensor | None = None,
    power_of_two: bool = False,
) -> Quantized:
    """:func:`swiglu` in 1x128 blocks of E4M3, quantised from fp32: payload ``[R, F]`` and scales ``[R, F / 128]``.

    ``hidden_R2F``: bf16, or E4M3 with ``hidden_scales`` ``[R, 2F / 128]`` of any strides. ``F`` is a multiple of 128. Scales are
    ``max(largest |x|, 2^-100) / 448``, rounded up to a power of two on request; their strides are ``(1, R rounded up to 4)`` and
    the pad is 0. A row of probability 0 has a payload of 0. A block with a NaN or an infinity has a scale that is not finite. A
    payload differs from plain torch's by one step at most, where a product lies at the edge of two. No gradient.
    """
    return Quantized(*SWIGLU_QUANTIZE.packet(hidden_R2F, hidden_scales, probs_R, power_of_two))


def swiglu_backward_quantize(
    grad_RF: torch.Tensor,
    hidden_R2F: torch.Tensor,
    hidden_scales: torch.Tensor | None = None,
    probs_R: torch.Tensor | None = None,
    power_of_two: bool = False,
) -> QuantizedGrads:
    """The backward pass of :func:`swiglu_quantize` and, again, its activation; every input is read once.

    ``grad_RF``: bf16, of the activation. The gradient of hidden comes in bf16 and in E4M3, both from the same fp32 numbers, that of
    the probabilities is an fp32 sum in one order; the activation is bf16, what the second linear layer's weight gradient reads.
    Everything else is as in :func:`swiglu_quantize`. No gradient.
    """
    return QuantizedGrads(*SWIGLU_BACKWARD_QUANTIZE.packet(grad_RF, hidden_R2F, hidden_scales, probs_R, power_of_two))


def swiglu_backward_quantize_columns(
    grad_RF: torch.Tensor,
    hidden_R2F: torch.Tensor,
    hidden_scales: torch.Tensor | None = None,
    probs_R: torch.Tensor | None = None,
    power_of_two: bool = False,
) -> QuantizedColumnGrads:
    """:func:`swiglu_backward_quantize` for weight gradients in FP8: no bf16 result leaves it, in its place come their columns.

    Bit for bit ``quantize_columns`` of the bf16 gradient and activation that :func:`swiglu_backward_quantize` returns on the same
    device; the rows' payload is its too, from fp32. The probabilities' gradient is an fp32 sum in one order, on a GPU another one.
    """
    return QuantizedColumnGrads(*SWIGLU_BACKWARD_QUANTIZE_COLUMNS.packet(grad_RF, hidden_R2F, hidden_scales, probs_R, power_of_two))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _by_row(probs, like):
    return None if probs is None else probs.to(like.dtype).unsqueeze(-1)


def _activation(hidden, probs):
    gate, up = hidden.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return out if probs is None else out * _by_row(probs, out)


def _gradients(grad, hidden, probs):
    """Of hidden, in the type computed in, and of the probabilities, in theirs."""
    gate, up = hidden.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    scaled = grad if probs is None else grad * _by_row(probs, grad)
    grad_hidden = torch.cat([scaled * up * (sigmoid * (1 + gate * (1 - sigmoid))), scaled * silu], dim=-1)
    grad_probs = hidden.new_empty(0, dtype=torch.float32) if probs is None else (grad * silu * up).sum(-1).to(probs.dtype)
    return grad_hidden, grad_probs


def _hidden(hidden, scales):
    return _wide(hidden) if scales is None else hidden.float() * scales.repeat_interleave(BLOCK, dim=1)


def _out_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.bfloat16


def _reference(hidden, probs):
    return _activation(_wide(hidden), probs).to(hidden.dtype)


def _backward_reference(grad, hidden, probs):
    grad_hidden, grad_probs = _gradients(_wide(grad), _wide(hidden), probs)
    return grad_hidden.to(hidden.dtype), grad_probs


def _quantize_reference(hidden, hidden_scales, probs, power_of_two):
    return quantize_rows_reference(_activation(_hidden(hidden, hidden_scales), probs), power_of_two)


def _backward_quantize_reference(grad, hidden, hidden_scales, probs, power_of_two):
    dtype, hidden = _out_dtype(grad), _hidden(hidden, hidden_scales)
    grad_hidden, grad_probs = _gradients(_wide(grad), hidden, probs)
    payload, scales = quantize_rows_reference(grad_hidden, power_of_two)
    return grad_hidden.to(dtype), payload, scales, grad_probs, _activation(hidden, probs).to(dtype)


def _backward_columns_reference(grad, hidden, hidden_scales, probs, power_of_two):
    arguments = grad, hidden, hidden_scales, probs, power_of_two
    grad_hidden, payload, scales, grad_probs, activation = _backward_quantize_reference(*arguments)
    columns = (quantize_rows_reference(x.t(), power_of_two) for x in (grad_hidden, activation))
    return payload, scales, *next(columns), *next(columns), grad_probs


def _fake(hidden, probs):
    return hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)


def _fake_grad_probs(hidden, probs):
    return hidden.new_empty(0, dtype=torch.float32) if probs is None else probs.new_empty(hidden.shape[0])


def _backward_fake(grad, hidden, probs):
    return hidden.new_empty(hidden.shape), _fake_grad_probs(hidden, probs)


def _quantize_fake(hidden, hidden_scales, probs, power_of_two):
    return fake_rows(hidden, hidden.shape[0], hidden.shape[1] // 2)


def _backward_quantize_fake(grad, hidden, hidden_scales, probs, power_of_two):
    grad_hidden = grad.new_empty(hidden.shape)
    quantized = fake_rows(hidden, *hidden.shape)
    return grad_hidden, *quantized, _fake_grad_probs(hidden, probs), grad.new_empty(grad.shape)


def _backward_columns_fake(grad, hidden, hidden_scales, probs, power_of_two):
    R, F2 = hidden.shape
    made = (fake_rows(hidden, *sizes) for sizes in ((R, F2), (F2, R), (F2 // 2, R)))
    return *next(made), *next(made), *next(made), _fake_grad_probs(hidden, probs)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    hidden, probs = ctx.saved_tensors
    grad_hidden, grad_probs = SWIGLU_BACKWARD.packet(grad, hidden, probs)
    return grad_hidden, None if probs is None else grad_probs


def _arguments(num_rows: int, width: int, dtype, device, *, probs=True, strided=False, scale=1.0, padding=0, probs_dtype=None):
    """Random hidden, probabilities or None, gradient; the last ``padding`` rows are 0 with a probability of 0."""
    draw = torch.Generator().manual_seed(1000 * num_rows + width)
    hidden, grad = torch.randn(num_rows, 2 * width, generator=draw) * scale, torch.randn(num_rows, width, generator=draw)
    weights = torch.rand(num_rows, generator=draw)
    if padding:
        hidden[-padding:], weights[-padding:] = 0.0, 0.0
    if strided:
        hidden, grad, weights = hidden.t().contiguous().t(), grad.t().contiguous().t(), weights.repeat_interleave(2)[::2]
    wide = torch.float64 if dtype == torch.float64 else probs_dtype or torch.float32
    return hidden.to(device, dtype), weights.to(device, wide) if probs else None, grad.to(device, dtype)


def _case(*sizes, **how):
    return lambda dtype, device: _arguments(*sizes, dtype, device, **how)[:2]


def _backward_case(*sizes, **how):
    def make(dtype, device):
        hidden, probs, grad = _arguments(*sizes, dtype, device, **how)
        return grad, hidden, probs

    return make


_SITUATIONS = (
    ("ordinary", (7, 24), {}),
    ("without probabilities", (5, 16), {"probs": False}),
    ("probabilities of bf16", (5, 16), {"probs_dtype": torch.bfloat16}),
    ("empty", (0, 8), {}),
    ("width of none", (3, 0), {}),
    ("one row", (1, 40), {}),
    ("odd width", (6, 37), {}),
    ("non-contiguous", (9, 20), {"strided": True}),
    ("extreme values", (4, 33), {"scale": 60.0}),
    ("padding rows", (6, 16), {"padding": 2}),
    ("wide", (5, 2056), {}),
)


def _cases(make) -> tuple[Case, ...]:
    return tuple(Case(name, make(*sizes, **how)) for name, sizes, how in _SITUATIONS)


def _quantize_case(*sizes, fp8=False, power_of_two=False, **how):
    def make(dtype, device):
        hidden, probs, _ = _arguments(*sizes, dtype, device, **how)
        return *(quantize_rows_reference(hidden, False) if fp8 else (hidden, None)), probs, power_of_two

    return make


def _backward_quantize_case(*sizes, **how):
    def make(dtype, device):
        grad = _arguments(*sizes, dtype, device, **{key: how[key] for key in how if key not in ("fp8", "power_of_two")})[2]
        return grad, *_quantize_case(*sizes, **how)(dtype, device)

    return make


_QUANTIZED = (
    ("ordinary", (6, 256), {}),
    ("powers of two", (6, 256), {"power_of_two": True}),
    ("hidden in fp8", (7, 128), {"fp8": True}),
    ("without probabilities", (4, 384), {"probs": False, "fp8": True, "power_of_two": True}),
    ("probabilities of bf16", (4, 128), {"probs_dtype": torch.bfloat16}),
    ("empty", (0, 128), {}),
    ("one row", (1, 128), {}),
    ("non-contiguous", (5, 128), {"strided": True}),
    ("extreme values", (8, 128), {"scale": 60.0}),
    ("padding rows", (9, 128), {"padding": 3, "fp8": True}),
    ("wide", (3, 2304), {"power_of_two": True}),
)


_COLUMNS = (
    ("blocks of rows", (256, 256), {"padding": 70, "fp8": True}),
    ("blocks of rows, hidden in bf16", (256, 128), {"power_of_two": True}),
    ("a short block of rows", (144, 128), {"fp8": True, "power_of_two": True}),
    ("an odd number of rows", (131, 128), {"fp8": True}),
)
"""Of the op that makes columns, beside the others."""


def _quantized_cases(make, more=()) -> tuple[Case, ...]:
    return tuple(Case(name, make(*sizes, **how)) for name, sizes, how in (*_QUANTIZED, *more))


SWIGLU = Op(
    "swiglu(Tensor hidden, Tensor? probs) -> Tensor",
    _reference,
    _fake,
    _setup,
    _backward,
    _cases(_case),
    exact=False,
)
SWIGLU_BACKWARD = Op(
    "swiglu_backward(Tensor grad, Tensor hidden, Tensor? probs) -> (Tensor grad_hidden, Tensor grad_probs)",
    _backward_reference,
    _backward_fake,
    cases=_cases(_backward_case),
    exact=False,
)
SWIGLU_QUANTIZE = Op(
    "swiglu_quantize(Tensor hidden, Tensor? hidden_scales, Tensor? probs, bool power_of_two) -> (Tensor payload, Tensor scales)",
    _quantize_reference,
    _quantize_fake,
    cases=_quantized_cases(_quantize_case),
    dtypes=(torch.bfloat16,),
    exact=False,
)
SWIGLU_BACKWARD_QUANTIZE = Op(
    "swiglu_backward_quantize(Tensor grad, Tensor hidden, Tensor? hidden_scales, Tensor? probs, bool power_of_two) "
    "-> (Tensor grad_hidden, Tensor payload, Tensor scales, Tensor grad_probs, Tensor activation)",
    _backward_quantize_reference,
    _backward_quantize_fake,
    cases=_quantized_cases(_backward_quantize_case),
    dtypes=(torch.bfloat16,),
    exact=False,
)
SWIGLU_BACKWARD_QUANTIZE_COLUMNS = Op(
    "swiglu_backward_quantize_columns(Tensor grad, Tensor hidden, Tensor? hidden_scales, Tensor? probs, bool power_of_two) "
    "-> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t, Tensor activation_t, Tensor activation_scales_t, "
    "Tensor grad_probs)",
    _backward_columns_reference,
    _backward_columns_fake,
    cases=_quantized_cases(_backward_quantize_case, _COLUMNS),
    dtypes=(torch.bfloat16,),
    exact=False,
)
OPS = (SWIGLU, SWIGLU_BACKWARD, SWIGLU_QUANTIZE, SWIGLU_BACKWARD_QUANTIZE, SWIGLU_BACKWARD_QUANTIZE_COLUMNS)
