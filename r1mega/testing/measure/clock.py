"""How long a call takes on a device. In: callables and a way to make their inputs; out: microseconds, the median over rounds.

On a GPU events on the stream are read, not the host's clock: the device is held while a round's calls are queued, and inputs rotate
through more than its cache, so that each call finds its own in memory.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from r1mega.device import Device

ROTATED_BYTES = 256 << 20
"""Inputs that lie between two calls with the same ones: several times the cache of any GPU (H200: 50 MiB)."""
ROTATED_BYTES_CPU = 32 << 20
MOST_COPIES = 256
HOLD_MILLISECONDS = 0.15
"""For each call of a round: longer than the host takes to queue one."""


def tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among ``values``, lists and tuples opened."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += tensor_bytes(value)
    return total


def rotation(make: Callable[[torch.device], tuple], device: Device) -> list[tuple]:
    """So many inputs that together they are larger than the cache; of tiny ones at most :data:`MOST_COPIES`."""
    inputs = [make(device.torch_device)]
    wanted = ROTATED_BYTES_CPU if device.is_cpu else ROTATED_BYTES
    copies = min(MOST_COPIES, -(-wanted // max(1, tensor_bytes(inputs[0]))))
    return inputs + [make(device.torch_device) for _ in range(copies - 1)]


def medians(
    calls: Mapping[str, Callable[..., Any]], inputs: list[tuple], device: Device, rounds: int, warmup: int = 3
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of each call by name, and why a call has none: the first line of what it raised.

    A round is every call on every input; the calls take turns, in another order each round, so that what else happens on the
    machine meets all of them. ``warmup`` rounds are not counted.
    """
    faults: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            if name in faults:
                continue
            try:
                took = _round(calls[name], inputs, device)
            except Exception as error:  # noqa: BLE001 - a peer's own; told in the table, and the others are measured
                faults[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]
                continue
            if number >= warmup:
                times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items() if found and name not in faults}, faults


def _round(call: Callable[..., Any], inputs: list[tuple], device: Device) -> float:
    """Mean microseconds of one call over all inputs."""
    device.synchronize()
    device.hold(HOLD_MILLISECONDS * len(inputs))
    begin = device.mark()
    for one in inputs:
        call(*one)
    end = device.mark()
    return 1e3 * device.milliseconds(begin, end) / len(inputs)
