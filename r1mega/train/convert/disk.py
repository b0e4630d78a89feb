"""Bytes from and to a disk: reading at an offset into a tensor, and writing a file that is hashed on the way.

Owns how a file of a conversion comes to be: as ``.NAME.part``, synced, then renamed. A file that has its name is whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from r1mega.config.errors import UserError

PIECE = 1 << 20
"""Bytes that are hashed and then written, so that the write finds them in the processor's cache."""
AHEAD = 64 << 20
"""Bytes after which the kernel is asked to start putting them on the disk: the sync at the end then waits for little."""
AGAIN = "fetch the file again"


def octets(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, flat, without a copy: for hashing, reading into and writing."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def sync(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fill(descriptor: int, offset: int, into: memoryview) -> int:
    """Read ``into`` full from ``offset`` on; returns the bytes that were there. Many threads may read one descriptor."""
    done = 0
    while done < len(into):
        got = os.preadv(descriptor, [into[done:]], offset + done)
        if not got:
            break
        done += got
    return done


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read from. Raises UserError, naming the file, where it cannot be opened or read (the caller reads inside)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: the file can be read; got {error.strerror or error}; {AGAIN}") from error


class Sink:
    """A file that is hashed while it is written, as ``.NAME.part``; :meth:`close` syncs it and gives it its name.

    As a context: an error on the way removes the part. Raises UserError, naming the file, where the disk fails.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.part = self.path.with_name(f".{self.path.name}.part")
        self.bytes = 0
        self._hash, self._small, self._asked = hashlib.sha256(), bytearray(), 0
        with self._disk():
            self._descriptor = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data``; returns its size."""
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        if len(view) < PIECE:  # many small ones make one system call
            self._small += view
            if len(self._small) >= PIECE:
                self._flush()
            return len(view)
        self._flush()
        for start in range(0, len(view), PIECE):
            self._put(view[start : start + PIECE])
        done = self.bytes - self._asked
        if done >= AHEAD:
            with self._disk():  # what is clean already leaves the page cache, the rest is on its way to the disk
                os.posix_fadvise(self._descriptor, self._asked, done, os.POSIX_FADV_DONTNEED)
            self._asked = self.bytes
        return len(view)

    def tell(self) -> int:
        """Bytes so far."""
        return self.bytes

    def flush(self) -> None:
        """Torch asks for it; nothing needs it before :meth:`close`."""

    def close(self) -> tuple[int, str]:
        """Sync and rename; returns the file's bytes and sha256."""
        self._flush()
        with self._disk():
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            os.rename(self.part, self.path)
            sync(self.path.parent)
        return self.bytes, self._hash.hexdigest()

    def discard(self) -> None:
        """Give up: the part goes. Nothing happens after :meth:`close`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.part.unlink(missing_ok=True)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind, value, trace) -> None:
        self.discard()

    def _flush(self) -> None:
        if self._small:
            small, self._small = self._small, bytearray()
            self._put(memoryview(small))

    def _put(self, view: memoryview) -> None:
        self._hash.update(view)
        with self._disk():
            while view:
                view = view[os.write(self._descriptor, view) :]

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: the disk takes what is written; got {error.strerror or error}; make room and run the same command"
            ) from error
