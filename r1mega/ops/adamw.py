"""Op ``adamw_``: AdamW's step over many tensors at once, with moments in bf16 or fp32 and the model's bf16 copy in the same pass.

For each number, at step t (decoupled weight decay, arXiv 1711.05101; moments in BF16, arXiv 2412.19437, section 3.3.3):

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from r1mega.ops.library import FP32_BF16, Case, Op


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | None = None,
    copies: Sequence[torch.Tensor] = (),
) -> None:
    """One step of AdamW on every tensor of ``params``, in place; also of ``exp_avgs`` (m), ``exp_avg_sqs`` (v) and ``copies``.

    The tensors of a list have one dtype: ``params`` float32 (master weights) or bfloat16, ``grads`` float32 or bfloat16, both
    moments float32 or both bfloat16. All of a parameter's tensors have as many numbers and are contiguous, gradients excepted;
    shapes may differ from tensor to tensor, any may be empty. ``copies``: none, or a bfloat16 tensor a parameter, which gets the
    new parameter. ``grad_scale``: what gradients are multiplied by first (None: nothing).

    ``step``: t, one number of float32 or int64, 1 at the first step, the same for all tensors. On a CPU it is read at the call; on
    the parameters' own device it is read by the kernel, so that a captured CUDA graph may be replayed with another step. Nothing
    waits for the device.

    Everything is computed in fp32, each operation rounded by itself in the order of the formula (the bias corrections in fp64, then
    rounded), and each number that is stored is rounded once more where its tensor is bf16: p is computed from the new moments as
    they are before that. All devices give the same bits, but for those of NaN. Infinity and NaN in a gradient reach its own
    number's p, m and v.
    """
    ADAMW.packet(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(copies),
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        grad_scale,
    )


def _reference(params, grads, exp_avgs, exp_avg_sqs, copies, step, lr, beta1, beta2, eps, weight_decay, grad_scale):
    if step.is_cpu:
        now = float(step)
        step_size, inverse_root = lr / (1.0 - beta1**now), 1.0 / math.sqrt(1.0 - beta2**now)
    else:
        now = step.double()
        step_size, inverse_root = (lr / (1.0 - beta1**now)).float(), (1.0 / (1.0 - beta2**now).sqrt()).float()
    for place, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = grad.float().reshape(param.shape)
        if grad_scale is not None:
            g = g * grad_scale
        m = exp_avg.float().reshape(param.shape) * beta1 + g * (1.0 - beta1)
        v = exp_avg_sq.float().reshape(param.shape) * beta2 + (g * g) * (1.0 - beta2)
        root = v.double().sqrt().float()  # the nearest number: torch's own in fp32 on a CPU may be the next one (MKL's)
        p = param.float() * (1.0 - lr * weight_decay) - (m * step_size) / (root * inverse_root + eps)
        for held, new in ((param, p), (exp_avg, m), (exp_avg_sq, v), *((copy, p) for copy in copies[place : place + 1])):
            held.copy_(new.reshape(held.shape))


def _fake(*args):
    """In place: there is no output to describe."""


_RATES = (3e-3, 0.9, 0.95, 1e-8, 0.1)


def _case(
    shapes: Sequence[tuple[int, ...]],
    *,
    params=torch.float32,
    grads=torch.float32,
    copies: bool = False,
    step: float | int = 3.0,
    step_on_device: bool = False,
    grad_scale: float | None = None,
    scale: float = 1.0,
    offset: int = 0,
    mark: float | None = None,
    strided: bool = False,
    rates: tuple[float, ...] = _RATES,
):
    """``offset``: numbers before each tensor in its storage; ``mark``: one gradient."""

    def make(dtype, device):
        draw = torch.Generator().manual_seed(sum(math.prod(shape) for shape in shapes))

        def tensors(kind, factor=1.0, *, positive=False):
            made = []
            for shape in shapes:
                numbers = torch.randn(offset + math.prod(shape), generator=draw) * factor
                made.append((numbers.square() if positive else numbers).to(device, kind)[offset:].view(shape))
            return made

        lists = tensors(params), tensors(grads, scale), tensors(dtype, 0.1 * scale), tensors(dtype, 0.1 * scale, positive=True)
        if mark is not None:
            lists[1][0].view(-1)[1] = mark
        if strided:
            lists = lists[0], [grad.t().contiguous().t() for grad in lists[1]], *lists[2:]
        at = torch.tensor(step, device=device if step_on_device else "cpu")
        return *lists, tensors(torch.bfloat16) if copies else [], at, *rates, grad_scale

    return make


_BF16 = torch.bfloat16
_SHAPES = ((5, 16), (8,), (3, 4, 8))
ADAMW = Op(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, "
    "Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay, float? grad_scale) -> ()",
    _reference,
    _fake,
    cases=(
        Case("ordinary", _case(_SHAPES)),
        Case("no tensor", _case(())),
        Case("empty", _case(((0,), (4, 0), (8,)))),
        Case("one number", _case(((1,), ()))),
        Case("odd sizes", _case(((7, 3), (1,), (1031,)))),
        Case("not aligned", _case(_SHAPES, offset=3, copies=True)),
        Case("with copies", _case(_SHAPES, copies=True)),
        Case("bf16 weights and gradients", _case(_SHAPES, params=_BF16, grads=_BF16)),
        Case("bf16 gradients", _case(_SHAPES, grads=_BF16, copies=True)),
        Case("the first step", _case(_SHAPES, step=1)),
        Case("a late step on the device", _case(_SHAPES, step=100_000, step_on_device=True)),
        Case("scaled gradients", _case(_SHAPES, grad_scale=1 / 3)),
        Case("no weight decay", _case(_SHAPES, rates=(1e-2, 0.5, 0.999, 1e-6, 0.0))),
        Case("extreme values", _case(_SHAPES, scale=1e15)),
        Case("tiny values", _case(_SHAPES, scale=1e-20)),
        Case("infinity", _case(_SHAPES, mark=float("inf"))),
        Case("non-contiguous", _case(((6, 5), (4, 8)), strided=True)),
        Case("several chunks", _case(((30_000,), (3,), (129, 257)), copies=True)),
        Case("many tensors", _case(tuple((1 + number % 9,) for number in range(300)))),
    ),
    dtypes=FP32_BF16,
)
OPS = (ADAMW,)
