"""What the roles say: a file each in the run's folder, rank 0's on the terminal too; of a role that has failed the telling line."""

from __future__ import annotations

import sys
from pathlib import Path

from r1mega.rl.engine.sglang.launch import ERROR

KEPT_BYTES = 64 << 10
"""Of a role's last words, those that are searched."""


class Log:
    """One role's. Appends to ``folder/ROLE.log``; ``shown``: also passed through."""

    def __init__(self, folder: Path, role: str, *, is_shown: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.is_shown = folder / f"{role}.log", is_shown
        self._file = open(self.path, "ab", buffering=0)
        self._last = b""

    def begin(self, line: str) -> None:
        """A line of ours before the next start; what was said before it is forgotten."""
        self._last = b""
        self._file.write(f"=== {line}\n".encode())

    def add(self, out: bytes, errors: bytes = b"") -> None:
        """What has come on stdout and stderr."""
        for data, stream in ((out, sys.stdout), (errors, sys.stderr)):
            if not data:
                continue
            self._file.write(data)
            if self.is_shown:
                stream.buffer.write(data) if hasattr(stream, "buffer") else stream.write(data.decode("utf-8", "replace"))
                stream.flush()
        self._last = (self._last + out + errors)[-KEPT_BYTES:]

    def complaint(self) -> str:
        """The first line since the start that names an error; else the last one; empty where nothing was said."""
        lines = [line.strip() for line in self._last.decode("utf-8", "replace").splitlines() if line.strip()]
        return next((line for line in lines if ERROR.match(line)), lines[-1] if lines else "")[:300]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
