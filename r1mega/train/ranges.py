"""``nvtx=true``: each transformer layer and each op of ours as a named range in what a profiler records, forward and backward.

In: a trainee. Owns the hooks, which are there only inside :func:`named_layers`; elsewhere nothing is done and nothing costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from r1mega.device import Device
from r1mega.ops.library import name_ranges
from r1mega.train.trainee import Trainee


@contextmanager
def named_layers(trainee: Trainee, wanted: bool) -> Iterator[None]:
    """Inside, where ``wanted``, the layers of this rank's stages ("layer 3 forward") and all ops are named.

    A layer's backward range goes from the gradient of its output to that of its input; weight gradients that are put off are not in
    it.
    """
    if not wanted:
        yield
        return
    from megatron.core.transformer.transformer_layer import TransformerLayer

    device, hooks = trainee.mesh.device, []
    for stage in trainee.stages:
        for module in stage.modules():
            if isinstance(module, TransformerLayer):
                layer = _Layer(f"layer {module.layer_number}", device)
                hooks.append(module.register_forward_pre_hook(layer.before, with_kwargs=True))
                hooks.append(module.register_forward_hook(layer.after, always_call=True))
    name_ranges(device.open_range)
    try:
        yield
    finally:
        name_ranges(None)
        for hook in hooks:
            hook.remove()


class _Layer:
    """The hooks of one layer. Its forward passes do not overlap; its backward passes may, each has a range of its own."""

    def __init__(self, name: str, device: Device):
        self.name, self.device = name, device
        self.close: Callable[[], None] | None = None
        self.backward: list[Callable[[], None]] | None = None

    def before(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The forward pass begins."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.backward = None
        if hidden.requires_grad:
            self.backward = held = []  # of this pass: the hooks of its two tensors share it

            def end(grad: torch.Tensor) -> None:
                if held:
                    held.pop()()

            hidden.register_hook(end)
        self.close = self.device.open_range(f"{self.name} forward")

    def after(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        """The forward pass has ended, or raised."""
        if self.close is not None:
            self.close()
            self.close = None
        hidden = output[0] if isinstance(output, tuple) else output
        held = self.backward
        if held is not None and hidden is not None and hidden.requires_grad:

            def begin(grad: torch.Tensor) -> None:
                held.append(self.device.open_range(f"{self.name} backward"))

            hidden.register_hook(begin)
