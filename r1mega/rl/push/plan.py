"""Which tensors travel together, and whether all of them came. Pure.

In: (name, tensor) pairs in the name table's order. Out: lists of pairs, a bucket each. SGLang's loader puts ``q_a_proj`` and
``kv_a_proj_with_mqa`` into one parameter when it has both, within one request, and forgets a lonely one without a word; it makes
MLA's absorbed matrices of ``kv_b_proj`` at the end of the request that has it, scales included. So a layer's attention is never
cut, nor is a weight from its scales. What the loader passes over in silence (layers that no draft model has, names that it does not
know) is told here before anything is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

from r1mega.config.errors import UserError
from r1mega.model.names import LISTED, SCALE, Part

ATTENTION = re.compile(r"(model\.layers\.\d+\.self_attn)\.")
Pair = tuple[str, torch.Tensor]


def atom_of(name: str) -> str:
    """What must not be cut: equal for tensors that one request has together."""
    found = ATTENTION.match(name)
    return found[1] if found else name.removesuffix(SCALE)


def buckets(pairs: Iterable[Pair], capacity_bytes: int) -> Iterator[list[Pair]]:
    """``pairs`` in order, as many a bucket as fit; more than ``capacity_bytes`` only where one atom is larger.

    Reads one atom ahead. Raises UserError for an atom whose tensors are not side by side.
    """
    bucket: list[Pair] = []
    held = 0
    for atom in atoms(pairs):
        size = sum(nbytes(tensor) for _, tensor in atom)
        if bucket and held + size > capacity_bytes:
            yield bucket
            bucket, held = [], 0
        bucket += atom
        held += size
    if bucket:
        yield bucket


def atoms(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """``pairs`` in order, those of an atom together."""
    atom: list[Pair] = []
    done: set[str] = set()
    for name, tensor in pairs:
        key = atom_of(name)
        if atom and key != atom_of(atom[0][0]):
            done.add(atom_of(atom[0][0]))
            yield atom
            atom = []
        if key in done:
            raise UserError(f"push: what {key} is made of comes side by side; got {name} apart; send in the name table's order")
        atom.append((name, tensor))
    if atom:
        yield atom


def nbytes(tensor: torch.Tensor) -> int:
    """Of its numbers."""
    return tensor.numel() * tensor.element_size()


class Coverage:
    """Every tensor of the table once and no other, each of its shape."""

    def __init__(self, table: Iterable[Part]):
        self.table = {part.name: part for part in table}
        self._missing = dict.fromkeys(self.table)

    def take(self, name: str, tensor: torch.Tensor) -> Part:
        """The part of ``name``. Raises UserError for a name that is unknown or came before, and another shape or kind of number."""
        part = self.table.get(name)
        if part is None:
            raise UserError(f"push: every tensor is in the name table; got {name}; push the model that config.json describes")
        if name not in self._missing:
            raise UserError(f"push: each tensor comes once; got {name} twice; check what gathers the weights")
        if tuple(tensor.shape) != part.shape:
            raise UserError(f"push: {name} is {list(part.shape)}; got {list(tensor.shape)}; send whole tensors")
        if not tensor.is_floating_point():
            raise UserError(f"push: {name} is of floating-point numbers; got {tensor.dtype}; send the trainer's weights")
        del self._missing[name]
        return part

    def finish(self) -> None:
        """Raise UserError that names what did not come."""
        missing = list(self._missing)
        if missing:
            listed = ", ".join(missing[:LISTED]) + (f" and {len(missing) - LISTED} more" if len(missing) > LISTED else "")
            raise UserError(f"push: every tensor of the model comes; got no {listed}; check what gathers the weights")
