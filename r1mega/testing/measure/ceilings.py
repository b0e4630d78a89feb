"""What the device itself can do, measured in the run that takes shares of it: a copy, products in bf16 and in block-scaled FP8.

Rates: bytes/s (read and written) of ``copy``, operations/s of ``bf16`` and ``fp8``. A CPU's are of small sizes and have no ``fp8``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from r1mega.device import Device
from r1mega.testing.measure.clock import medians

UNITS = {"copy": ("GB/s", 1e9), "bf16": ("TFLOP/s", 1e12), "fp8": ("TFLOP/s", 1e12)}
"""Ceiling to the unit of its rate and of what is a share of it, and how many make one."""
COPY_BYTES, COPY_BYTES_CPU = 1 << 30, 64 << 20
PRODUCT_SIZE, PRODUCT_SIZE_CPU = 8192, 512
BLOCK = 128


def measure(device: Device, rounds: int = 10) -> dict[str, float]:
    """The rates by name; one that the device or this torch does not have is left out."""
    found = {}
    for name, prepare in (("copy", _copy), ("bf16", _bf16), ("fp8", _fp8)):
        if name == "fp8" and device.is_cpu:
            continue
        try:
            work, call = prepare(device)
        except (RuntimeError, AttributeError, ValueError):  # no such format on this device, or in this torch
            continue
        times, faults = medians({name: call}, [()], device, rounds)
        if not faults:
            found[name] = work / (times[name] / 1e6)
        del call
    return found


def _copy(device: Device) -> tuple[int, Callable[[], Any]]:
    source = torch.zeros(COPY_BYTES_CPU if device.is_cpu else COPY_BYTES, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * source.numel(), lambda: target.copy_(source)


def _operands(device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of random numbers: a GPU's clock depends on how many bits change."""
    size = PRODUCT_SIZE_CPU if device.is_cpu else PRODUCT_SIZE
    draw = torch.Generator(device.torch_device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device.torch_device, generator=draw) for _ in range(2))
    return left, right


def _bf16(device: Device) -> tuple[int, Callable[[], Any]]:
    left, right = (one.bfloat16() for one in _operands(device))
    return 2 * len(left) ** 3, lambda: left @ right


def _fp8(device: Device) -> tuple[int, Callable[[], Any]]:
    """1x128 blocks by 128x128 blocks, as DeepSeek-V3 trains; ``right`` is of ``[N, K]``."""
    from torch.nn.functional import ScalingType, scaled_mm

    size = PRODUCT_SIZE
    blocks = size // BLOCK
    left, right = (one.to(torch.float8_e4m3fn) for one in _operands(device))
    one_by_128 = torch.ones(blocks, size, device=device.torch_device).t()  # [M, K / 128], M runs fastest
    square = torch.ones(blocks, blocks, device=device.torch_device).t()  # [K / 128, N / 128], K runs fastest

    def call() -> torch.Tensor:
        return scaled_mm(
            left, right.t(), one_by_128, ScalingType.BlockWise1x128, square, ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip

    call()
    return 2 * size**3, call
