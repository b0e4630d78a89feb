"""The variables that torchrun sets for a rank, looked at before anything reads them: numbers that fit, and a meeting place.

In: this process's environment. Out: nothing, or one UserError with a line a fault. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from r1mega.config.errors import UserError, Violation

LEAST = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}
"""Variable to its least value."""

ALONE = "start the ranks with torchrun or launch.processes=N, or unset RANK WORLD_SIZE"


def check_ranks(*, meeting: bool = False) -> None:
    """Raise UserError where the ranks' variables are no numbers or do not fit; ``meeting``: or name no meeting place."""
    found = list(_numbers()) or list(_pairs()) or (list(_meeting()) if meeting else [])
    if found:
        raise UserError("\n".join(map(str, found)))


def _numbers() -> Iterator[Violation]:
    for name, least in LEAST.items():
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdecimal() and int(text) >= least):
            yield Violation(name, f"a whole number from {least} on", repr(text), hint=f"unset {name}, or start with torchrun")


def _pairs() -> Iterator[Violation]:
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is not None and world is None:
        yield Violation("WORLD_SIZE", "set where RANK is", f"RANK={rank} without it", hint=ALONE)
    elif rank is None and world is not None and int(world) > 1:
        yield Violation("RANK", "set where WORLD_SIZE is", f"WORLD_SIZE={world} without it", hint=ALONE)
    elif rank is not None and int(rank) >= int(world):
        yield Violation("RANK", f"below WORLD_SIZE {world}", rank, hint=ALONE)


def _meeting() -> Iterator[Violation]:
    """Rank 0 listens there; alone a process needs none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    for name, what in (("MASTER_ADDR", "the address of rank 0's machine"), ("MASTER_PORT", "a port of rank 0's machine")):
        text = os.environ.get(name)
        if not text:
            yield Violation(name, what, "none", hint=f"export {name}=..., or start with torchrun, which sets it")
        elif name == "MASTER_PORT" and not (text.isascii() and text.isdecimal() and 0 < int(text) < 1 << 16):
            yield Violation(name, f"{what}, from 1 to 65535", repr(text), hint=f"export {name}=29500, or start with torchrun")
