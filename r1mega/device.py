"""The only file that says cuda, nccl or gloo: device, backend, generators, determinism, memory, waiting, measuring.

Its state is the choice.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.config.run import DeviceConfig

CLOCK_KHZ = 2_000_000
"""About a GPU's clock, in which its waiting is counted."""

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

    def finish_current_work(self) -> None:
        """Wait for what this thread has queued, and not for messages that are still to come on streams of their own."""
        if not self.is_cpu:
            torch.cuda.current_stream().synchronize()

    def mark(self) -> Any:
        """This point in the device's queue (on a CPU: now), for :meth:`milliseconds`."""
        if self.is_cpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        """From one :meth:`mark` to another, once the device has come to it."""
        if self.is_cpu:
            return 1e3 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)

    def hold(self, milliseconds: float) -> None:
        """Keep a GPU busy for about so long, so that the host can queue work that then runs without gaps; nothing on a CPU."""
        if not self.is_cpu:
            torch.cuda._sleep(int(milliseconds * CLOCK_KHZ))

    def open_range(self, name: str) -> Callable[[], None]:
        """Begin a named range in what a profiler records (NVTX on a GPU, a record of torch's on a CPU); returns what ends it.

        Ranges need not be nested, nor end on the thread where they began on a GPU.
        """
        if not self.is_cpu:
            handle = torch.cuda.nvtx.range_start(name)
            return lambda: torch.cuda.nvtx.range_end(handle)
        record = torch.profiler.record_function(name)
        record.__enter__()
        return lambda: record.__exit__(None, None, None)

    @property
    def hardware(self) -> str:
        """The maker's name of a GPU, or of the processor."""
        if not self.is_cpu:
            return torch.cuda.get_device_name()
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
        found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        return found or platform.processor() or platform.machine()

    def release_unused(self) -> None:
        """Give back what no tensor holds any more, cycles of objects included, before a second model is built in this process."""
        gc.collect()
        if not self.is_cpu:
            torch.cuda.empty_cache()

    def reset_peak_bytes(self) -> None:
        """Let :meth:`peak_bytes` begin anew; a CPU's cannot."""
        if not self.is_cpu:
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Largest memory so far: the process's resident set on a CPU, the allocator's peak on a GPU."""
        if self.is_cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return torch.cuda.max_memory_allocated()

    def allocated_bytes(self) -> int:
        """Memory in use now: the process's resident set on a CPU, what the allocator has given out on a GPU."""
        if self.is_cpu:
            import psutil

            return psutil.Process().memory_info().rss
        return torch.cuda.memory_allocated()

    @property
    def unseen_memory(self) -> str:
        """What :meth:`allocated_bytes` counts and no tensor in Python's sight holds."""
        kept = "kept for the backward pass, and temporaries"
        return f"programs, caches, {kept}" if self.is_cpu else kept

    def is_out_of_memory(self, error: BaseException) -> bool:
        """True for what torch and Python raise when memory runs out; for a CPU's and page-locked memory a RuntimeError."""
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        told = ("can't allocate memory", "not enough memory", "out of memory")
        return isinstance(error, RuntimeError) and any(words in str(error) for words in told)

    def record_allocations(self) -> None:
        """Keep the Python stack of each allocation from now on, for :meth:`write_memory_snapshot`; a GPU's allocator only."""
        if not self.is_cpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def write_memory_snapshot(self, path: Path) -> None:
        """The GPU allocator's state for PyTorch's memory viewer, with stacks where they were recorded; nothing on a CPU."""
        if not self.is_cpu:
            torch.cuda.memory._dump_snapshot(str(path))

    def profiled_activities(self) -> list[Any]:
        """What a trace records."""
        kinds = torch.profiler.ProfilerActivity
        return [kinds.CPU] if self.is_cpu else [kinds.CPU, kinds.CUDA]

    @property
    def profile_order(self) -> str:
        """The column of a trace's table that matters here."""
        return "self_cpu_time_total" if self.is_cpu else "self_cuda_time_total"

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
_attention = "auto"


def allocation_device() -> torch.device:
    """The device that :func:`open_device` chose last, for modules that allocate before they are moved; the CPU before that."""
    return torch.device("cpu") if _chosen is None else _chosen.torch_device


ARCHITECTURES = "R1MEGA_CUDA_ARCH"
"""Names the compute capabilities that csrc/ is built for; see setup.py."""


def gpu_toolkit() -> str | None:
    """Version of CUDA that torch is built for; None of a CPU build."""
    return torch.version.cuda


def gpu_capability() -> str | None:
    """Compute capability ("9.0") of the GPU that this process computes on; None where it uses none (yet)."""
    if (_chosen is None or _chosen.is_cpu) and not torch.cuda.is_initialized():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability())


def open_device(config: DeviceConfig) -> Device:
    """Choose the device and set threads and number modes. Raises UserError where a GPU is asked for and there is none."""
    global _chosen, _attention
    _set_determinism(config.deterministic)
    _attention = config.attention
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


def fence(device: torch.device) -> None:
    """Wait until what this thread has queued on ``device`` is done: another process reads the memory next."""
    if device.type != "cpu":
        torch.cuda.current_stream(device).synchronize()


def is_shared_by_handle(device: torch.device | str) -> bool:
    """Whether memory of ``device`` is handed to another process as a handle, without a copy."""
    return torch.device(device).type == "cuda"


def unique_id(device: torch.device) -> str:
    """What a GPU is called in every process, whatever CUDA_VISIBLE_DEVICES numbers it as."""
    return str(torch.cuda.get_device_properties(device).uuid)


def group_backend(device: torch.device | str) -> str:
    """The backend of torch.distributed for tensors of ``device``."""
    return "nccl" if torch.device(device).type == "cuda" else "gloo"


class HostCopy:
    """A tensor's numbers on their way to the host, behind what its stream has queued so far, while both sides go on.

    On a GPU they go by a stream of their own into page-locked memory, so that work queued meanwhile is not waited for.
    """

    waits = 0
    """How often this process has waited for one."""

    def __init__(self, tensor: torch.Tensor):
        self._here, self._event = tensor, None
        if tensor.device.type == "cpu":
            return
        side = _side_stream(tensor.device)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._event = side.record_event()
        tensor.record_stream(side)

    def wait(self) -> torch.Tensor:
        """The numbers, once they are here."""
        HostCopy.waits += 1
        if self._event is not None:
            self._event.synchronize()
        return self._here


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """The stream of a GPU that copies to the host go by."""
    return torch.cuda.Stream(device)


def attention_choice() -> str:
    """``device.attention`` of the device that :func:`open_device` chose last; auto before that."""
    return _attention


def attention_kernels(device: torch.device, *, masked: bool = False) -> contextlib.AbstractContextManager:
    """Inside, torch's attention takes the kernel of ``device.attention``; with auto it asks the fastest one first that takes
    queries wider than values, on a GPU cuDNN's. ``masked``: there is a mask, which flash kernels do not know: as auto then.
    """
    if device.type == "cpu":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    alone = {"cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    if not masked:
        alone["flash"] = SDPBackend.FLASH_ATTENTION
    if _attention in alone:
        return sdpa_kernel(alone[_attention])
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _set_determinism(wanted: bool) -> None:
    """Operations that give the same bits each time, or an error from one that has no such form."""
    if wanted:  # read when the first matrix product's library is opened
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads what it has not written
    torch.backends.cudnn.benchmark = not wanted and torch.backends.cudnn.benchmark


def peak_tflops(device: Device, dtype: torch.dtype) -> float:
    """Matrix-product rate of this process in TFLOP/s, measured: the peak that MFU is a share of where the user names none."""
    size = 512 if device.is_cpu else 8192
    # from a generator of its own: the run's own goes on from where a checkpoint left it
    generator = torch.Generator(device.torch_device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device.torch_device, dtype=dtype, generator=generator) for _ in range(2))
    best = float("inf")
    for _ in range(30 if device.is_cpu else 8):  # the best of many: other work on the cores only slows single ones
        device.synchronize()
        start = time.perf_counter()
        left @ right
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
