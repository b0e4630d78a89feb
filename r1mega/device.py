"""The only file that says cuda, nccl or gloo: device, backend, generators, waiting, measuring. Its state is the choice."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import torch

from r1mega.config.errors import UserError
from r1mega.config.run import DeviceConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """Where this process computes. ``torch_device`` is what tensors are made on; ``backend`` is torch.distributed's name."""

    kind: str
    torch_device: torch.device
    backend: str

    @property
    def is_cpu(self) -> bool:
        """True where Megatron-Core needs ``compat``."""
        return self.kind == "cpu"

    def synchronize(self) -> None:
        """Wait for all queued work, so that a clock read next is true."""
        if not self.is_cpu:
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Largest memory so far: the process's resident set on a CPU, the allocator's peak on a GPU."""
        if self.is_cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return torch.cuda.max_memory_allocated()

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of torch's generators, to be saved with a checkpoint."""
        states = {"cpu": torch.get_rng_state()}
        if not self.is_cpu:
            states["device"] = torch.cuda.get_rng_state()
        return states

    def set_rng_state(self, states: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`rng_state` gave. A state of another device kind is left out."""
        torch.set_rng_state(states["cpu"].cpu())
        if not self.is_cpu and "device" in states:
            torch.cuda.set_rng_state(states["device"].cpu())


def local_rank() -> int:
    """This process's index on its machine (LOCAL_RANK, 0 alone)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


_chosen: Device | None = None


def allocation_device() -> torch.device:
    """The device that :func:`open_device` chose last, for modules that allocate before they are moved; the CPU before that."""
    return torch.device("cpu") if _chosen is None else _chosen.torch_device


def open_device(config: DeviceConfig) -> Device:
    """Choose the device and set threads and number modes. Raises UserError where a GPU is asked for and there is none."""
    global _chosen
    if config.kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device.kind: torch sees no GPU; got cuda; use device=cpu or install a CUDA build of torch")
        index, found = local_rank(), torch.cuda.device_count()
        if index >= found:
            raise UserError(f"launch.processes: one GPU a process; got local rank {index} with {found} GPUs; start at most {found}")
        torch.cuda.set_device(index)
        _chosen = Device("cuda", torch.device("cuda", index), "nccl")
        return _chosen
    threads = config.threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    _chosen = Device("cpu", torch.device("cpu"), "gloo")
    return _chosen


def peak_tflops(device: Device, dtype: torch.dtype) -> float:
    """Matrix-product rate of this process in TFLOP/s, measured: the peak that MFU is a share of where the user names none."""
    import time

    size = 512 if device.is_cpu else 8192
    left, right = (torch.randn(size, size, device=device.torch_device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(30 if device.is_cpu else 8):  # the best of many: other work on the cores only slows single ones
        device.synchronize()
        start = time.perf_counter()
        left @ right
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
