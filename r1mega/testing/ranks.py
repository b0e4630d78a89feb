"""Runs a function as N ranks on this machine: processes of their own, one thread each, joined through a free port.

The first call starts a process that imports what ranks import (:mod:`r1mega.testing.nest`); on a machine without accelerator ranks
are forks of it.

In: an importable module-level function, a number of ranks, arguments that pickle. Out: what each rank returned, in rank order, or
:class:`RankError` with the traceback of the rank that failed first; the others are ended. A deadline ends everything.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from r1mega.compat import megatron_jit
from r1mega.launch.local import LaunchError, free_port, rank_env, show_errors, start_ranks
from r1mega.testing.nest import Nest

CALL = "call.pickle"


class RankError(RuntimeError):
    """A rank failed or was too slow. ``rank``: which; the text ends with its traceback."""

    def __init__(self, function: str, rank: int, world_size: int, story: str):
        super().__init__(f"{function}: rank {rank} of {world_size} failed\n{story}")
        self.rank = rank


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """``function(*args)`` in ``world_size`` processes, whose environment is torchrun's; what each returned, in rank order.

    Starting costs some seconds, so let one function try many cases. ``timeout_seconds``: of the whole; a rank that is
    still at work then shows where it stands. Raises RankError, and ValueError for a function that a fresh process cannot import.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ValueError(f"run_ranks: a function at the top of an importable module; got {name}; move it into one")
    with tempfile.TemporaryDirectory(prefix="ranks-") as place:
        folder = Path(place)
        (folder / CALL).write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        failed = _start(folder, [place, str(timeout_seconds)], world_size)
        if failed:
            rank, status = failed[0]
            story = folder / f"{rank}.txt"
            told = story.read_text() if story.is_file() else ""
            raise RankError(name, rank, world_size, told or f"exit status {status}") from None
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


_nest: Nest | None = None


def _start(folder: Path, arguments: list[str], world_size: int) -> list[tuple[int, int]]:
    """Run :func:`main` as ranks; (rank, status) of those that failed, the first to fail first."""
    global _nest
    env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    if _nest is None or (_nest.is_fit and not _nest.is_alive):
        _nest = Nest({**os.environ, **env})
    if not _nest.is_fit:
        try:
            start_ranks(["-m", __name__, *arguments], world_size, env=env)
        except LaunchError as error:
            return [(error.rank, error.status)]
        return []
    port = free_port()
    environments = [{**os.environ, **env, **rank_env(rank, world_size, port), "OMP_NUM_THREADS": "1"} for rank in range(world_size)]
    failed = _nest.run(folder, arguments, environments)
    with ExitStack() as stack:
        errors = [None, *(stack.enter_context((folder / f"{rank}.stderr").open("ab+")) for rank in range(1, world_size))]
        show_errors(failed, errors)
    return failed


def main(place: str, timeout_seconds: str) -> int:
    """One rank's part: call, and leave the result or the traceback in the folder ``place``. Returns the exit status."""
    folder, rank = Path(place), os.environ["RANK"]
    module, name, args = pickle.loads((folder / CALL).read_bytes())
    with (folder / f"{rank}.txt").open("w") as story:
        faulthandler.dump_traceback_later(float(timeout_seconds), exit=True, file=story)  # ends the process with status 1
        try:
            megatron_jit.apply()
            result = getattr(importlib.import_module(module), name)(*args)
            (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        except BaseException:
            story.write(traceback.format_exc())
            return 1
        finally:
            faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a process group that waits for a dead peer would hold up a normal exit
