"""Hugging Face models of a run on the way: every so many steps a published checkpoint is exported, in a thread of rank 0.

An export is no part of a save: the next save does not wait for it, and one that fails is told and does not end the run. The
checkpoint that is being exported, or waits for it, is not removed. One export runs at a time. What a failed one has written is
removed at once, what a killed one has when the run goes on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections import deque
from pathlib import Path


class Exporter:
    """``folder``: where exports go, ``folder/step-N``; ``every``: at checkpoints whose step is a multiple of it, 0: at none."""

    def __init__(self, folder: Path, every: int, dtype: str):
        self.folder, self.every, self.dtype = folder, every, dtype
        self._waiting: deque[tuple[Path, int]] = deque()
        self._failures: deque[tuple[int, str]] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """True while there is something to export."""
        with self._lock:
            return bool(self._waiting)

    @property
    def holding(self) -> set[Path]:
        """Checkpoints that are being exported or wait for it."""
        with self._lock:
            return {path for path, _ in self._waiting}

    def consider(self, checkpoint: Path, step: int) -> None:
        """Export a published checkpoint where it is its turn and no export of it is there; returns at once."""
        if not self.every or step % self.every or (self.folder / checkpoint.name).exists():
            return
        with self._lock:
            self._waiting.append((checkpoint, step))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="export")
                self._thread.start()

    def clear(self) -> None:
        """Remove what exports of killed runs have left, but of those that are to be made now, which go on from it."""
        awaited = {path.name for path in self.holding}
        for rest in self.folder.glob(".step-*.*"):
            name = rest.name.removeprefix(".").partition(".")[0]
            if name not in awaited:
                discard(self.folder / name)

    def take_failures(self) -> list[tuple[int, str]]:
        """(step, reason) of exports that have failed since the last call."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                checkpoint, step = self._waiting[0]
            target = self.folder / checkpoint.name
            try:
                from r1mega.train.export import export_checkpoint

                export_checkpoint(checkpoint, target, self.dtype)
            except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
                discard(target)  # gives a full disk its room back
                self._failures.append((step, str(error) or type(error).__name__))
            with self._lock:
                self._waiting.popleft()


def discard(target: Path) -> None:
    """Remove what an unfinished conversion to ``target`` has left beside it, unless one is at work there."""
    handles = []
    try:
        for end in ("lock", "partial"):
            path = target.with_name(f".{target.name}.{end}")
            if path.exists():
                handles.append((path, os.open(path, os.O_RDONLY)))
                fcntl.flock(handles[-1][1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path, _ in reversed(handles):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError:  # another's, or gone: nothing that the training ends for
        pass
    finally:
        for _, handle in handles:
            os.close(handle)
