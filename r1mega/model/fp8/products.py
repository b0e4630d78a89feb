"""Products of block-scaled E4M3 matrices: on a GPU by torch's scaled product and DeepGEMM, elsewhere from what the numbers mean.

    payload * scale, the scale of each 1x128 block of a row (activations, gradients) or each 128x128 block (weights)

Sums are in fp32. On a Hopper GPU both sides' numbers of rows and columns are multiples of 128 (:data:`BLOCK`).
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from r1mega import device
from r1mega.config.errors import UserError
from r1mega.ops.accumulate_quantized import accumulate_grouped_quantized_
from r1mega.ops.quantize import BLOCK, Quantized


@functools.cache
def deep_gemm() -> ModuleType:
    """The package of grouped FP8 products, and of those that add to fp32. UserError where it, or a Hopper GPU, is missing."""
    instead = "use precision=bf16"
    capability = device.gpu_capability()
    if capability not in (None, "9.0"):
        raise UserError(f"precision.products: fp8 is for Hopper GPUs, compute capability 9.0; got {capability}; {instead}")
    try:
        import deep_gemm as package
    except Exception as error:  # its import compiles and asserts: whatever it raises, the package is not usable here
        told = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"precision.products: fp8 takes products from DeepGEMM; got {type(error).__name__}: {told}; "
            f"pip install 'r1mega[deepgemm]', or {instead}"
        ) from None
    return package


def rows_by_blocks(rows: Quantized, weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """``rows [M, K]`` times ``weight [N, K]`` transposed: ``[M, N]`` in ``dtype``."""
    if not rows.payload.is_cuda:
        return (_of_rows(rows) @ _of_blocks(weight).t()).to(dtype)
    kinds = F.ScalingType
    scales = weight.scales
    if scales.shape[1] % 4:  # the product reads each row of scales from an address that divides by 16
        scales = F.pad(scales, (0, -scales.shape[1] % 4))
    return F.scaled_mm(
        rows.payload,
        weight.payload.t(),
        rows.scales,
        kinds.BlockWise1x128,
        scales.t(),
        kinds.BlockWise128x128,
        output_dtype=dtype,
    )


def add_rows_by_rows_(total: torch.Tensor, left: Quantized, right: Quantized, overwrite: bool = False) -> None:
    """``total [N, K] += left [N, M] times right [K, M] transposed``, fp32: a weight's gradient, M the rows of the batch.

    ``overwrite``: ``total`` is set to it.
    """
    if overwrite:
        total.zero_()  # DeepGEMM's product of rows by rows is an addition
    if not left.payload.is_cuda:
        total += _of_rows(left) @ _of_rows(right).t()
        return
    deep_gemm().fp8_gemm_nt(tuple(left), tuple(right), total, c=total, recipe=(1, 1, BLOCK))


def add_grouped_rows_by_rows_(
    total: torch.Tensor, left: Quantized, right: Quantized, ends_E: torch.Tensor, overwrite: bool = False
) -> None:
    """:func:`add_rows_by_rows_` for each expert: ``total [e, N, K]``, its rows of the batch ``ends_E[i - 1]`` to ``ends_E[i]``.

    ``left [N, R]``, ``right [K, R]``; ``ends_E``: int32, multiples of 128. ``overwrite``: ``total`` is set, and 0 for experts
    without rows. Nothing waits for a GPU.
    """
    accumulate_grouped_quantized_(total, left, right, ends_E, overwrite=overwrite)


def grouped_rows_by_blocks(
    rows: Quantized, weight: Quantized, row_experts_R: torch.Tensor, ends_E: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Each expert's rows times its weight ``[N, K]`` transposed: ``[R, N]``. The rows behind the last expert's are left unset.

    ``row_experts_R``: int32, -1 behind the last expert's rows; ``ends_E``: int32, multiples of 128. Nothing waits for a GPU.
    """
    payload = rows.payload
    out = torch.empty(payload.shape[0], weight.payload.shape[1], dtype=dtype, device=payload.device)
    if not payload.is_cuda:
        values, start = _of_rows(rows), 0
        for expert, end in enumerate(ends_E.tolist()):
            own = Quantized(weight.payload[expert], weight.scales[expert])
            out[start:end] = values[start:end] @ _of_blocks(own).t()
            start = end
    elif len(payload):
        deep_gemm().m_grouped_fp8_gemm_nt_contiguous(tuple(rows), tuple(weight), out, row_experts_R)
    return out


def _of_rows(rows: Quantized) -> torch.Tensor:
    wide = rows.payload.float()
    return wide * rows.scales.repeat_interleave(BLOCK, dim=1)[:, : wide.shape[1]]


def _of_blocks(weight: Quantized) -> torch.Tensor:
    wide = weight.payload.float()
    scales = weight.scales.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return wide * scales[: wide.shape[0], : wide.shape[1]]
