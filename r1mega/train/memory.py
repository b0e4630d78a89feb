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
from pathlib import Path

import torch

from r1mega.config.errors import UserError
from r1mega.train.trainee import Trainee

SHOWN = 5
"""Holders named in the error; the file has all."""
GIB = 2**30


@contextlib.contextmanager
def watched(trainee: Trainee, out: Path, way_out: str) -> Iterator[None]:
    """While inside, running out of memory raises UserError with the five largest holders; ``out/memory`` gets the whole list.

    ``way_out``: keys to lower. The error is this rank's alone: memory ran out, so the ranks cannot meet once more.
    """
    try:
        yield
    except Exception as error:
        if not trainee.mesh.device.is_out_of_memory(error):
            raise
        told = " ".join(str(error).split())[:160]
        held = sorted(holders(trainee).items(), key=lambda item: -item[1])
        file = _write(trainee, out, held, told)
        largest = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in held[:SHOWN])
        raise UserError(
            f"memory: a step fits; got {told}; lower {way_out}, rank {trainee.mesh.rank} held {largest} (all in {file})"
        ) from error


def holders(trainee: Trainee) -> dict[str, int]:
    """Name to bytes of all that holds memory on the device; layers and experts of one kind are summed under one name (``N``)."""
    sizes: dict[str, int] = defaultdict(int)
    addresses: set[int] = set()
    storages: set[int] = set()
    for label, tensor in _named(trainee):  # parts of one large buffer each: counted by themselves
        if tensor.data_ptr() not in addresses:
            addresses.add(tensor.data_ptr())
            storages.add(_storage(tensor))
            sizes[label] += tensor.numel() * tensor.element_size()
    for tensor in _live(trainee.mesh.device.torch_device):
        if _storage(tensor) not in storages:
            storages.add(_storage(tensor))
            label = f"other tensors {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            sizes[label] += tensor.untyped_storage().nbytes()
    rest = trainee.mesh.device.allocated_bytes() - sum(sizes.values())
    if rest > 0:
        sizes[trainee.mesh.device.unseen_memory] = rest
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


def _write(trainee: Trainee, out: Path, held: list[tuple[str, int]], told: str) -> Path:
    folder, rank = out / "memory", trainee.mesh.rank
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{size / GIB:9.3f} GiB  {name}" for name, size in held]
    (folder / f"rank{rank}.txt").write_text("\n".join([told, "", *rows, ""]))
    trainee.mesh.device.write_memory_snapshot(folder / f"rank{rank}.pickle")
    return folder / f"rank{rank}.txt"
