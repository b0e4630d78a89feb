"""SIGTERM as a wish: noted when it comes, acted upon between two steps. Owns the one handler; the loops ask and save.

A cluster that takes a machine back sends SIGTERM and waits some seconds. Inside :func:`heeding` the signal only sets a flag, which
all ranks agree on after a step; the run then saves and raises :class:`~r1mega.config.errors.Stopped`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from r1mega.mesh import Mesh

_asked = False


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """While inside, SIGTERM is noted; one that came too late to be acted upon takes its usual course at the end.

    Outside the main thread, where Python takes no handlers, signals stay as they are.
    """
    global _asked
    _asked = False

    def note(number: int, frame: object) -> None:
        global _asked
        _asked = True

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if _asked:  # not after an error, which says more than the signal would
        signal.raise_signal(signal.SIGTERM)


def asked(mesh: Mesh) -> bool:
    """Has any rank got SIGTERM? Every rank calls this at the same place and gets the same answer."""
    return mesh.any(_asked)
