"""Benchmarks of ``adamw_``: a hundred tensors of four million numbers, against torch's fused AdamW, which widens moments first."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops.adamw import adamw_
from r1mega.testing.bench import Bench

RATES = {"lr": 2e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def _bench(num_tensors: int, numel: int, moments: torch.dtype, *, copies: bool, odd: int = 0) -> Bench:
    """``odd``: numbers more in each tensor, so that none can be read 16 bytes at a time to its end."""

    def make(device):
        def tensors(dtype):
            return [torch.rand(numel + odd, device=device).to(dtype) for _ in range(num_tensors)]

        wide = [tensors(torch.float32) for _ in range(2)]
        return *wide, tensors(moments), tensors(moments), torch.tensor(7.0), tensors(torch.bfloat16) if copies else []

    def run(params, grads, exp_avgs, exp_avg_sqs, step, copied):
        adamw_(params, grads, exp_avgs, exp_avg_sqs, step, **RATES, copies=copied)

    def plain(params, grads, exp_avgs, exp_avg_sqs, step, copied):
        steps = [step.to(params[0].device, copy=True) for _ in params]
        wide = [[one.float() for one in moment] for moment in (exp_avgs, exp_avg_sqs)]  # its moments are as wide as the weights
        torch._fused_adamw_(params, grads, *wide, [], steps, **RATES, amsgrad=False, maximize=False)
        if moments != torch.float32:
            torch._foreach_copy_([*exp_avgs, *exp_avg_sqs], [*wide[0], *wide[1]])
        if copied:
            torch._foreach_copy_(copied, params)

    # read and written: the weight in fp32, both moments; read: the gradient in fp32; written: the bf16 copy
    each = 8 + 4 * moments.itemsize + 4 + 2 * copies
    kind = str(moments).removeprefix("torch.")
    about = f"{num_tensors} x {numel + odd}, moments {kind}" + (", copies" if copies else "")
    return Bench(
        "adamw_",
        about,
        make,
        run,
        num_bytes=each * num_tensors * (numel + odd),
        peers={"torch": plain},
    )


def benches() -> Iterator[Bench]:
    """Many large tensors, and many small ones, where a launch a tensor would show."""
    yield _bench(100, 4 << 20, torch.bfloat16, copies=True)
    yield _bench(100, 4 << 20, torch.bfloat16, copies=False)
    yield _bench(100, 4 << 20, torch.float32, copies=False)
    yield _bench(100, 4 << 20, torch.bfloat16, copies=True, odd=1)
    yield _bench(1000, 8192, torch.bfloat16, copies=True)
