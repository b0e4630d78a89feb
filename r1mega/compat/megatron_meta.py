"""Megatron-Core 0.16.1 on the meta device, wherever the process computes. Owns the bend that lets a model of any size be built.

| bend | symptom without it | remove when |
|---|---|---|
| every tensor made inside ``on_meta()`` is made on the meta device, and moves between devices do nothing | ``init_model_with_meta_device`` is read by a few modules only: the others allocate on ``torch.cuda.current_device()``, terabytes for DeepSeek-V3 | all modules ask the config |

Versions: megatron-core 0.16.1, torch 2.11 to 2.13. Nothing is patched: it is a torch function mode, gone with the context.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}


class on_meta(TorchFunctionMode):  # noqa: N801 - used as a function, as torch.no_grad is
    """Inside, no tensor has storage, whatever device the code names."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in MOVES:
            dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            return args[0].type(dtypes[0]) if dtypes else args[0]
        if func in FACTORIES:
            kwargs["device"] = META
            kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange", "empty", "empty_like", "full", "full_like", "linspace", "ones", "ones_like", "rand", "randn", "tensor", "zeros",
        "zeros_like",
    )
}  # fmt: skip
