"""What a program in a sandbox may use, what it is, and how it ended; plain records that two processes exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

ENDS = ("ok", "exit", "signal", "time", "memory", "output", "processes", "refused")
"""How a program ends: by itself with status 0 or another, by a signal, at a limit; refused: it did not start."""


@dataclass(frozen=True)
class Limits:
    """What one program and all that it starts may use together, unless said otherwise.

    wall_seconds, cpu_seconds: time from the program's start; memory_bytes: address space of each process, and resident memory of
    all; processes: processes and threads at once; open_files: of each process; file_bytes: largest file; disk_bytes: all files;
    output_bytes: standard output, and as much standard error (whose end is kept).
    """

    wall_seconds: float = 5.0
    cpu_seconds: float = 5.0
    memory_bytes: int = 512 << 20
    processes: int = 32
    open_files: int = 64
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Job:
    """A program: its arguments, its standard input, and the files of its working folder by name (no folders).

    ``argv[0]`` is an absolute path that the sandbox holds; the interpreter is :data:`r1mega.rl.sandbox.PYTHON`.
    """

    argv: tuple[str, ...]
    stdin: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a program ended: ``end`` of :data:`ENDS`; status: exit status or signal; seconds: wall time of the program; detail: which
    limit, or why it did not start."""

    end: str
    status: int
    stdout: bytes
    stderr: bytes
    seconds: float
    detail: str = ""
