"""Ops ``accumulate_product_`` and ``accumulate_grouped_``: a weight's gradient, added where it is summed in fp32.

``out += left^T right``, for one matrix or for each expert's rows: what a linear layer's backward pass owes to a weight whose
gradient is summed in an fp32 buffer (Megatron's ``main_grad``), without the gradient as a tensor of its own. With ``overwrite`` out
is set instead, and not read: the first microbatch's sum needs no zeros.
"""

from __future__ import annotations

import torch

from r1mega.ops.library import FP32_BF16, Case, Op


def accumulate_product_(out_NK: torch.Tensor, left_MN: torch.Tensor, right_MK: torch.Tensor, *, overwrite: bool = False) -> None:
    """``out[n, k] += sum over m of left[m, n] right[m, k]``, in place; with ``overwrite`` ``=``.

    ``out_NK``: float32, any strides (contiguous is fastest). ``left_MN``, ``right_MK``: both float32 or both bfloat16, any strides,
    M of 0 or more; M of 0 changes nothing, or sets 0. Products and sums are in fp32 (on a GPU fp32 operands follow torch's setting
    for TF32), and nothing is rounded to bf16. No tensor of out's size is made. NaN and infinity are propagated. The same input
    gives the same bits. No gradient. Raises ValueError for other shapes or dtypes.
    """
    ACCUMULATE_PRODUCT.packet(out_NK, left_MN, right_MK, overwrite)


def accumulate_grouped_(
    out_eNK: torch.Tensor, left_RN: torch.Tensor, right_RK: torch.Tensor, ends_e: torch.Tensor, *, overwrite: bool = False
) -> None:
    """``out[i] += left[rows of i]^T right[rows of i]`` for each expert i, in place; its rows are ``ends[i - 1]`` to ``ends[i]``.

    ``out_eNK``: float32, contiguous. ``left_RN``, ``right_RK``: both float32 or both bfloat16, any strides. ``ends_e``: int32,
    ascending, at most R, on out's device and never waited for; rows behind the last end do not count. On a CPU other ends raise
    ValueError; elsewhere they are the caller's promise. An expert without rows keeps its bits; with ``overwrite`` out is set and
    not read, and such an expert's becomes 0. Sums are in fp32. On a Hopper GPU nothing is rounded where N and K are multiples of 8;
    elsewhere on a GPU a bfloat16 expert's product is rounded to bfloat16 once before it is added (as the gradient of a bfloat16
    weight is in torch), and at most 128 MiB of such products are held, or 128 rows of each expert. The same input gives the same
    bits. No gradient.
    """
    ACCUMULATE_GROUPED.packet(out_eNK, left_RN, right_RK, ends_e, overwrite)


def _product_reference(out, left, right, overwrite=False):
    if overwrite:
        out.zero_()
    out.addmm_(left.to(out.dtype).t(), right.to(out.dtype))


def _grouped_reference(out, left, right, ends, overwrite=False):
    if overwrite:
        out.zero_()
    if ends.device.type == "cpu":
        first = 0
        for own, end in zip(out, ends.tolist(), strict=True):
            own.addmm_(left[first:end].to(own.dtype).t(), right[first:end].to(own.dtype))
            first = end
        return
    # each expert's rows with the others' at 0: no wait for a device that works ahead
    row = torch.arange(len(left), device=out.device)
    first = torch.cat([ends.new_zeros(1), ends])[: len(ends)]
    for own, begin, end in zip(out, first, ends, strict=True):
        inside = ((row >= begin) & (row < end)).unsqueeze(1)
        rows, others = torch.where(inside, left, 0.0), torch.where(inside, right, 0.0)
        own += rows.t().mm(others)


def _nothing(*args):
    """In place: there is no output to describe."""


def _draw(*shape: int, dtype, device, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def _product_case(
    M: int, N: int, K: int, *, strided: bool = False, scale: float = 1.0, mark: float | None = None, overwrite: bool = False
):
    def make(dtype, device):
        out = _draw(N, K, dtype=torch.float32, device=device, seed=1)
        left, right = (
            _draw(M, width, dtype=dtype, device=device, seed=2 + number, scale=scale) for number, width in enumerate((N, K))
        )
        if mark is not None:
            left[M // 2, N // 2] = mark
        if strided:
            out, left = out.t().contiguous().t(), left.t().contiguous().t()
            right = torch.stack([right, right], dim=-1)[..., 0]
        if overwrite:
            out.fill_(torch.nan)
        return out, left, right, overwrite

    return make


def _grouped_case(
    counts: tuple[int, ...],
    N: int,
    K: int,
    *,
    behind: int = 0,
    strided: bool = False,
    scale: float = 1.0,
    overwrite: bool = False,
):
    """``behind``: rows after the last end."""

    def make(dtype, device):
        num_rows = sum(counts) + behind
        _, left, right, _ = _product_case(num_rows, N, K, scale=scale)(dtype, device)
        if strided:
            left, right = left.t().contiguous().t(), torch.stack([right, right], dim=-1)[..., 0]
        out = _draw(len(counts), N, K, dtype=torch.float32, device=device, seed=4)
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0).to(torch.int32)
        if overwrite:
            out.fill_(torch.nan)
        return out, left, right, ends.to(device), overwrite

    return make


ACCUMULATE_PRODUCT = Op(
    "accumulate_product_(Tensor(a!) out, Tensor left, Tensor right, bool overwrite=False) -> ()",
    _product_reference,
    _nothing,
    cases=(
        Case("ordinary", _product_case(64, 32, 48)),
        Case("empty", _product_case(0, 8, 16)),
        Case("width of none", _product_case(5, 0, 16)),
        Case("one row", _product_case(1, 8, 16)),
        Case("odd sizes", _product_case(37, 13, 7)),
        Case("non-contiguous", _product_case(24, 16, 8, strided=True)),
        Case("extreme values", _product_case(33, 8, 16, scale=1e15)),
        Case("NaN", _product_case(9, 8, 16, mark=float("nan"))),
        Case("infinity", _product_case(9, 8, 16, mark=float("inf"))),
        Case("wide", _product_case(256, 192, 320)),
        Case("overwrite", _product_case(37, 16, 24, overwrite=True)),
        Case("overwrite, non-contiguous", _product_case(24, 16, 8, strided=True, overwrite=True)),
        Case("overwrite, empty", _product_case(0, 8, 16, overwrite=True)),
    ),
    dtypes=FP32_BF16,
    exact=False,
)
ACCUMULATE_GROUPED = Op(
    "accumulate_grouped_(Tensor(a!) out, Tensor left, Tensor right, Tensor ends, bool overwrite=False) -> ()",
    _grouped_reference,
    _nothing,
    cases=(
        Case("ordinary", _grouped_case((16, 40, 8), 32, 48)),
        Case("empty", _grouped_case((0, 0), 8, 16)),
        Case("no expert", _grouped_case((), 8, 16)),
        Case("one row", _grouped_case((0, 1, 0), 8, 16)),
        Case("ragged", _grouped_case((3, 0, 17, 1, 0), 24, 16)),
        Case("odd sizes", _grouped_case((5, 9), 13, 7)),
        Case("rows behind the last end", _grouped_case((4, 6), 8, 16, behind=5)),
        Case("non-contiguous", _grouped_case((6, 10), 16, 8, strided=True)),
        Case("extreme values", _grouped_case((6, 10), 16, 8, scale=1e15)),
        Case("all to one expert", _grouped_case((0, 70, 0, 0), 72, 136)),
        Case("whole tiles", _grouped_case((64, 0, 192, 128), 512, 264)),
        Case("many tiles", _grouped_case((70, 0, 33, 5, 64, 1, 0, 40, 9, 130, 3, 21), 2304, 520)),
        Case("ragged tiles", _grouped_case((1, 130, 0, 77), 256, 520, behind=50)),
        Case("sizes between tiles", _grouped_case((70, 0, 9), 200, 296)),
        Case("overwrite", _grouped_case((3, 0, 17, 1, 0), 24, 16, behind=3, overwrite=True)),
        Case("overwrite, odd sizes", _grouped_case((0, 5, 9), 13, 7, overwrite=True)),
        Case("overwrite, sizes of 8 but for one", _grouped_case((0, 5, 9), 24, 12, overwrite=True)),
        Case("overwrite, empty", _grouped_case((0, 0), 8, 16, overwrite=True)),
        Case("overwrite, many tiles", _grouped_case((70, 0, 33, 5, 64, 0, 130), 2304, 520, overwrite=True)),
    ),
    dtypes=FP32_BF16,
    exact=False,
)
OPS = (ACCUMULATE_PRODUCT, ACCUMULATE_GROUPED)
