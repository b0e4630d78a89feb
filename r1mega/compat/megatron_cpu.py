"""Megatron-Core 0.16.1 on a CPU. Owns every bend that it takes; touches Megatron's modules only, torch stays as it is.

| bend | symptom without it | where | remove when |
|---|---|---|---|
| ``torch`` in Megatron's modules is a copy whose ``cuda`` answers for the CPU | "Torch not compiled with CUDA enabled" from ``torch.cuda.current_device``, rng, streams, and from ``device="cuda"`` in factory calls | all of megatron.core | Megatron asks an accelerator object |
| type names in the optimizers' code | ``TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor ...`` | ``optimizer.py``, ``distrib_optimizer.py``, ``clip_grads.py`` | they compare dtypes |
| the rng tracker's logger is set to errors | "CPU RNG state changed within GPU RNG context" for each weight: there is one generator here | ``tensor_parallel/random.py`` | as the first |
| split sizes of the token dispatcher become numpy arrays here too | ``TypeError: all_to_all_single(): incompatible function arguments`` with more than one expert or tensor rank: sizes that are on the CPU already stay tensors | ``moe/token_dispatcher.py`` | ``maybe_move_tensor_to_cpu`` converts whatever it is given |
| ``weight.data.cuda()`` is ``weight.data.cpu()`` | "Torch not compiled with CUDA enabled" where embedding and head lie on two pipeline stages and share a weight (MTP, tied head) | ``language_module.py`` | as the first |
| functions under ``jit_fuser`` are unwrapped | torch.compile of each small function at its first call (tens of seconds) | router, activations, fusions | Megatron reads a switch at call time |

Versions: megatron-core 0.16.1, torch 2.11 to 2.13. On a CUDA device nothing is applied; the bends are for good, so a process that has
them computes on no CUDA device (``open_mesh`` refuses it).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types
from collections.abc import Callable

import torch

FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
TYPE_NAMES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
CPU = torch.device("cpu")


class _Stream:
    """A stream on a device without streams: everything is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        """Nothing is pending."""

    def wait_event(self, event) -> None:
        """Nothing is pending."""

    def record_event(self, event=None):
        """An event that has happened."""
        return event or _Event()

    def synchronize(self) -> None:
        """Nothing is pending."""


class _Event(_Stream):
    """An event on a device without streams."""

    def record(self, stream=None) -> None:
        """Already happened."""

    def wait(self, stream=None) -> None:
        """Already happened."""

    def query(self) -> bool:
        """Already happened."""
        return True


def _on_cpu(factory: Callable) -> Callable:
    """``factory`` with a CUDA device argument answered on the CPU and without pinning (which needs a driver)."""

    def make(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    make.__name__ = factory.__name__
    return make


def _cuda_for_cpu() -> types.ModuleType:
    """A copy of ``torch.cuda`` whose device, rng and stream functions answer for the CPU."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    stream = _Stream()
    cuda.current_device = lambda: CPU
    cuda.is_available = lambda: False
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.synchronize = cuda.empty_cache = lambda *args: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.random = types.ModuleType("torch.cuda.random")
    cuda.random.__dict__.update(torch.cuda.random.__dict__)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    return cuda


def _torch_for_cpu() -> types.ModuleType:
    """A copy of ``torch``'s namespace with that ``cuda`` and with factories that stay on the CPU."""
    copy = types.ModuleType("torch")
    copy.__dict__.update(torch.__dict__)
    copy.__getattr__ = lambda name: getattr(torch, name)  # names that torch loads lazily
    for name in FACTORIES:
        copy.__dict__[name] = _on_cpu(getattr(torch, name))
    copy.cuda = _cuda_for_cpu()
    return copy


_namespace: types.ModuleType | None = None


def apply() -> int:
    """Bend every loaded Megatron module; safe to call again after more were imported. Returns how many were bent this time."""
    global _namespace
    import megatron.core.tensor_parallel.random as random

    if _namespace is None:
        _namespace = _torch_for_cpu()
        importlib.import_module("megatron.core.fusions.fused_bias_dropout")  # otherwise loaded by the first model alone
        for name in ("clip_grads", "distrib_optimizer", "optimizer"):
            _rename_types(importlib.import_module(f"megatron.core.optimizer.{name}"))
        # the tracker's own accessors go around torch.cuda to the driver
        logging.getLogger(random.__name__).setLevel(logging.ERROR)
        random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)
        dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
        dispatcher.maybe_move_tensor_to_cpu = _as_numpy
        shared = importlib.import_module("megatron.core.models.common.language_module.language_module").LanguageModule
        setup = shared.setup_embeddings_and_output_layer
        setup.__code__ = setup.__code__.replace(co_names=tuple({"cuda": "cpu"}.get(name, name) for name in setup.__code__.co_names))
    bent = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "__dict__", {}).get("torch") is torch:
            module.torch = _namespace
            _unwrap_compiled(module)
            bent += 1
    return bent


def is_applied() -> bool:
    """True where this process's Megatron is bent for a CPU."""
    return _namespace is not None


def _as_numpy(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Megatron's ``maybe_move_tensor_to_cpu`` for what is on the CPU: there is only the form to change."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _unwrap_compiled(module: types.ModuleType) -> None:
    """Put the plain functions back where ``jit_fuser`` left torch.compile's wrappers."""
    owners = [module] + [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            plain = getattr(value, "_torchdynamo_orig_callable", None)
            if plain is not None:
                setattr(owner, name, plain)


def _rename_types(module: types.ModuleType) -> None:
    """Give a module's functions the CPU's names of the tensor types that they compare with."""
    owners = [module] + [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    for value in [value for owner in owners for value in vars(owner).values()]:
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
            function.__code__ = _renamed(function.__code__)


def _renamed(code: types.CodeType) -> types.CodeType:
    def constant(value):
        if isinstance(value, str):
            return TYPE_NAMES.get(value, value)
        if isinstance(value, tuple):
            return tuple(constant(item) for item in value)
        return _renamed(value) if isinstance(value, types.CodeType) else value

    return code.replace(co_consts=tuple(constant(value) for value in code.co_consts))
