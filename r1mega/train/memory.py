"""When memory runs out: who held it. In: a trainee and the error; out: a text file a rank, and a GPU allocator's snapshot.

Owns the names: weights, gradients and moments are named after their parameters, other tensors after their shape. What autograd
keeps for the backward pass is out of Python's sight and appears as the difference to what the allocator has given out.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from r1mega.config.errors import UserError
from r1mega.mesh import Mesh
from r1mega.train.trainee import Trainee

SHOWN = 5
"""Holders named in the error; the file has all."""
GIB = 2**30


@dataclass
class Watch:
    """``trainee``: whose tensors get names; None until it is built."""

    trainee: Trainee | None = None


@contextlib.contextmanager
def watched(mesh: Mesh, out: Path, way_out: str) -> Iterator[Watch]:
    """While inside, running out of memory raises UserError with the five largest holders; ``out/memory`` gets the whole list.

    ``way_out``: keys to lower. The error is this rank's alone: memory ran out, so the ranks cannot meet once more.
    """
    watch = Watch()
    try:
        yield watch
    except Exception as error:
        if not mesh.device.is_out_of_memory(error):
            raise
        told = " ".join(str(error).split())[:160]
        held = sorted(holders(watch.trainee, mesh).items(), key=lambda item: -item[1])
        largest = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in held[:SHOWN])
        raise UserError(
            f"memory: a step fits; got {told}; lower {way_out}, rank {mesh.rank} held {largest} ({_write(mesh, out, held, told)})"
        ) from error


def holders(trainee: Trainee | None, mesh: Mesh) -> dict[str, int]:
    """Name to bytes of all that holds memory on the device; layers and experts of one kind are summed under one name (``N``)."""
    sizes: dict[str, int] = defaultdict(int)
    addresses: set[int] = set()
    storages: set[int] = set()
    for label, tensor in _named(trainee) if trainee else ():  # parts of one large buffer each: counted by themselves
        if tensor.data_ptr() not in addresses:
            addresses.add(tensor.data_ptr())
            storages.add(_storage(tensor))
            sizes[label] += tensor.numel() * tensor.element_size()
    for tensor in _live(mesh.device.torch_device):
        if _storage(tensor) not in storages:
            storages.add(_storage(tensor))
            label = f"other tensors {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            sizes[label] += tensor.untyped_storage().nbytes()
    rest = mesh.device.allocated_bytes() - sum(sizes.values())
    if rest > 0:
        sizes[mesh.device.unseen_memory] = rest
    return dict(sizes)


def _named(trainee: Trainee) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of weights, gradients, main weights and moments."""
    for name, parameter in trainee.module.named_parameters():
        kind = re.sub(r"\.\d+\.", ".N.", name)
        yield f"weights {kind}", parameter.data
        for field in ("main_grad", "grad"):
            if isinstance(getattr(parameter, field, None), torch.Tensor):
                yield "gradients", getattr(parameter, field)
    for part in getattr(trainee.optimizer, "chained_optimizers", None) or []:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield "fp32 weights of the optimizer", parameter.data
        for state in part.optimizer.state.values():
            yield from ((f"optimizer moments {name}", value) for name, value in state.items() if isinstance(value, torch.Tensor))


def _live(device: torch.device) -> Iterable[torch.Tensor]:
    for item in gc.get_objects():
        # type() rather than isinstance(): asking a lazy proxy for its class would import or compute things
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device == device and item.layout == torch.strided:
            yield item


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _write(mesh: Mesh, out: Path, held: list[tuple[str, int]], told: str) -> str:
    """Where the whole list lies, or why it could not be written: it must not hide the error that it tells of."""
    folder, rank = out / "memory", mesh.rank
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [f"{size / GIB:9.3f} GiB  {name}" for name, size in held]
        (folder / f"rank{rank}.txt").write_text("\n".join([told, "", *rows, ""]))
        mesh.device.write_memory_snapshot(folder / f"rank{rank}.pickle")
    except (OSError, RuntimeError, MemoryError) as error:
        return f"the list could not be written: {error}"
    return f"all in {folder / f'rank{rank}.txt'}"
