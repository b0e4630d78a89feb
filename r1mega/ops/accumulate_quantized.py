"""Op ``accumulate_grouped_quantized_``: experts' weight gradients from block-scaled E4M3, added where they are summed in fp32.

    out[i][n, k] += sum over blocks b of 128 rows of expert i: left_scales[n, b] right_scales[k, b] (left[n, b] . right[k, b])

Both operands lie with the rows of the batch innermost, as :func:`r1mega.ops.quantize.quantize_columns` makes them of ``[R, N]`` and
``[R, K]``.
"""

from __future__ import annotations

import torch

from r1mega.ops.library import Case, Op
from r1mega.ops.quantize import BLOCK, Quantized, quantize_rows_reference


def accumulate_grouped_quantized_(
    out_eNK: torch.Tensor, left: Quantized, right: Quantized, ends_e: torch.Tensor, *, overwrite: bool = False
) -> None:
    """Adds to ``out[i]``, in place, the product of expert i's rows of the batch; they are ``ends[i - 1]`` to ``ends[i]``.

    ``out_eNK``: float32, contiguous. ``left``: payload float8_e4m3fn ``[N, R]``, scales float32 ``[N, R/128]``; ``right``: of K
    instead of N. Any strides; contiguous payloads and the row layout of scales are read without a copy. R is a multiple of 128.
    ``ends_e``: int32 multiples of 128, ascending, at most R, on out's device and never waited for; rows behind the last end do not
    count. On a CPU other ends raise ValueError; elsewhere they are the caller's promise.

    An expert without rows keeps its bits; with ``overwrite`` out is set and not read, and such an expert's becomes 0. A block's
    products are summed, multiplied by the product of both scales and added in fp32, block after block. Hopper's tensor cores keep
    about 14 bits of a block's sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2, for 128 rows as there); on a CPU, and on a GPU for
    what our kernel for Hopper does not take (K no multiple of 4), all of it is in fp32. NaN and infinity are propagated. The same
    input gives the same bits. No gradient. Raises ValueError for other shapes or dtypes.
    """
    ACCUMULATE_GROUPED_QUANTIZED.packet(out_eNK, *left, *right, ends_e, overwrite)


def _reference(out, left, left_scales, right, right_scales, ends, overwrite=False):
    if overwrite:
        out.zero_()
    num_experts, num_blocks = len(ends), left_scales.shape[1]
    if num_experts == 0:
        return
    starts = torch.arange(num_blocks, device=out.device, dtype=ends.dtype) * BLOCK
    expert = torch.searchsorted(ends, starts, right=True)  # the first whose end lies behind the block; e behind the last end
    place = expert.clamp(max=num_experts - 1)
    for block in range(num_blocks):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        product = left[:, rows].to(out.dtype) @ right[:, rows].to(out.dtype).t()
        scale = left_scales[:, block].unsqueeze(1) * right_scales[:, block]
        counts = expert[block] < num_experts
        out.index_add_(0, place[block : block + 1], torch.where(counts, scale * product, 0.0).unsqueeze(0))


def _nothing(*args):
    """In place: there is no output to describe."""


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _case(
    blocks: tuple[int, ...],
    N: int,
    K: int,
    *,
    behind: int = 0,
    overwrite: bool = False,
    spread: float = 0.0,
    mark: float | None = None,
    strided: bool = False,
):
    """``blocks``: of 128 rows of each expert; ``behind``: after the last end. ``spread``: powers of ten that rows differ by.
    ``mark``: stands once in the last expert's rows of left and, behind the last end, once in right's."""

    def make(dtype, device):
        R = (sum(blocks) + behind) * BLOCK
        left, right = _draw(N, R, seed=1), _draw(K, R, seed=2)
        for one in (left, right):
            one *= torch.logspace(-spread, spread, max(1, R // BLOCK)).repeat_interleave(BLOCK)[:R]
            one *= torch.logspace(-spread, spread, len(one)).unsqueeze(1)
        if mark is not None:
            left[N // 2, sum(blocks) * BLOCK - 1] = mark
            if behind:
                right[K // 2, -1] = mark
        operands = [part for one in (left, right) for part in quantize_rows_reference(one.to(device), False)]
        if strided:
            operands = [part.t().contiguous().t() if number % 2 == 0 else part.contiguous() for number, part in enumerate(operands)]
        out = torch.full((len(blocks), N, K), torch.nan) if overwrite else _draw(len(blocks), N, K, seed=3)
        ends = torch.tensor(blocks, dtype=torch.int32).cumsum(0) * BLOCK
        return out.to(device), *operands, ends.to(device, torch.int32), overwrite

    return make


_MANY = (2, 0, 1, 3, 1, 0, 0, 5, 1, 2, 1, 0)

ACCUMULATE_GROUPED_QUANTIZED = Op(
    "accumulate_grouped_quantized_(Tensor(a!) out, Tensor left, Tensor left_scales, Tensor right, Tensor right_scales, "
    "Tensor ends, bool overwrite=False) "
    "-> ()",
    _reference,
    _nothing,
    cases=(
        Case("ordinary", _case((1, 3, 2), 32, 48)),
        Case("no rows", _case((0, 0), 16, 32)),
        Case("no expert", _case((), 16, 32)),
        Case("no expert, rows behind", _case((), 16, 32, behind=1)),
        Case("width of none", _case((1, 2), 0, 32)),
        Case("an expert without rows", _case((0, 2, 0, 1, 0), 48, 16)),
        Case("all to one expert", _case((0, 9, 0, 0), 144, 272)),
        Case("rows behind the last end", _case((1, 2), 32, 48, behind=2)),
        Case("odd sizes", _case((1, 2), 13, 7)),
        Case("sizes between tiles", _case((2, 0, 1), 301, 404)),
        Case("one number", _case((1,), 1, 1)),
        Case("non-contiguous", _case((1, 2), 48, 64, strided=True)),
        Case("extreme scales", _case((2, 1), 48, 64, spread=6.0)),
        Case("NaN", _case((1, 2), 48, 64, behind=1, mark=float("nan"))),
        Case("infinity", _case((1, 2), 48, 64, behind=1, mark=float("inf"))),
        Case("whole tiles", _case((3, 0, 1), 512, 256)),
        Case("many tiles", _case(_MANY, 528, 784)),
        Case("more blocks than stages", _case((21, 2), 256, 264, behind=1)),
        Case("overwrite", _case((2, 0, 1), 48, 64, behind=1, overwrite=True)),
        Case("overwrite, odd sizes", _case((0, 1), 13, 7, overwrite=True)),
        Case("overwrite, no rows", _case((0, 0), 16, 32, overwrite=True)),
        Case("overwrite, many tiles", _case(_MANY, 528, 784, overwrite=True)),
    ),
    dtypes=(torch.float32,),
    exact=False,
    tensor_core_error=2.0**-9,
)
OPS = (ACCUMULATE_GROUPED_QUANTIZED,)
