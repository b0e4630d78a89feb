"""The ledger of a run: every sample, and the rollout that used it, in append-only files; what survives of them after any crash.

One file a start of the run and rank, ``ledger/START-RANK.r1l``: frames of a JSON header and arrays, each with a checksum, so that a
half written frame at the end is known and left out. A start writes from which rollout on it goes; by that alone everyone can say
which frames still hold: what a start has used for rollouts that a later start makes again is void, and so is a sample from weights
that a later start no longer has. Frames:

``start``: the run goes on after ``rollout`` rollouts and ``update`` updates. ``sample``: one judged response. ``use``: rollout
``rollout`` trained on these samples, with these advantages. ``drop``: questions that are done without being trained on, and why.
``back``: the run went back to ``rollout`` and ``update`` by itself.

Readers are :func:`read`, :class:`History` and ``r1mega why``. Exactly once means: in the surviving lineage each item that is done
was used by one rollout or dropped, each of its samples once, and no item below the cursor is missing (:meth:`History.audit`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r1mega.config.errors import UserError

FOLDER, SUFFIX = "ledger", ".r1l"
_MAGIC = 0x314C3152
_SIZES = struct.Struct("<IIIII")  # magic, bytes of the header, bytes of the arrays, checksum of each
_FRAME_SIZE = _SIZES.size + 4  # and a checksum of these


@dataclass(frozen=True)
class Frame:
    """One record. ``start``, ``rank``: of the file; ``place``: its number there; ``returns``: how often its start had gone back."""

    kind: str
    values: dict[str, Any]
    start: int
    rank: int
    place: int
    returns: int
    path: Path
    offset: int
    checksum: int
    shapes: dict[str, tuple[str, list[int]]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Unique in the run."""
        return f"{self.start}.{self.rank}.{self.place}"

    @property
    def end(self) -> int:
        """Where the next frame of the file begins."""
        return self.offset + sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (dtype, shape) in self.shapes.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the frame, from its file. Raises UserError where they are not what was written."""
        sizes = self._sizes()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            body = file.read(sum(sizes.values()))
        if zlib.crc32(body) != self.checksum:
            raise UserError(f"{self.path}: frames hold what was written; got another checksum in {self.id}; the file is damaged")
        found, begin = {}, 0
        for name, (dtype, shape) in self.shapes.items():
            found[name] = np.frombuffer(body[begin : begin + sizes[name]], dtype=dtype).reshape(shape)
            begin += sizes[name]
        return found


class Ledger:
    """This rank's file of this start. Every frame is handed to the system when it is written; ``sync`` puts it onto the disk."""

    def __init__(self, folder: Path, start: int, rank: int, rollout: int, update: int):
        self.folder, self.start, self.rank = folder, start, rank
        self._places, self._returns = 0, 0
        self._lock = threading.Lock()  # samples come from the rollouts' thread, what uses them from the trainer's
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{start:06d}-{rank:05d}{SUFFIX}").open("xb")
        self.write("start", {"rollout": rollout, "update": update})
        self.sync()

    def write(self, kind: str, values: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> str:
        """Append one frame and return its id. ``values``: JSON values."""
        arrays = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        shapes = {name: (array.dtype.str, list(array.shape)) for name, array in arrays.items()}
        body = b"".join(array.tobytes() for array in arrays.values())
        with self._lock:
            self._returns += kind == "back"
            entry = {"kind": kind, "returns": self._returns, "values": values, "shapes": shapes}
            header = json.dumps(entry, ensure_ascii=False).encode()
            sizes = _SIZES.pack(_MAGIC, len(header), len(body), zlib.crc32(header), zlib.crc32(body))
            self._file.write(sizes + zlib.crc32(sizes).to_bytes(4, "little") + header + body)
            self._file.flush()
            self._places += 1
            return f"{self.start}.{self.rank}.{self._places - 1}"

    def sync(self) -> None:
        """Put what has been written onto the disk: before the checkpoint that counts on it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put everything onto the disk and close; safe to call twice."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self.sync()
            self._file.close()


def next_start(folder: Path) -> int:
    """The number of the next start of a run: one more than the largest there is."""
    return max((int(path.name.partition("-")[0]) for path in folder.glob(f"*{SUFFIX}")), default=0) + 1


def read(folder: Path, least_start: int = 0) -> Iterator[Frame]:
    """All whole frames, by start, rank and place. A frame that was not written to its end ends its file: nothing follows it."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        start, rank = map(int, path.name.removesuffix(SUFFIX).split("-"))
        if start >= least_start:
            yield from _frames(path, start, rank)


def _frames(path: Path, start: int, rank: int) -> Iterator[Frame]:
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while len(head := file.read(_FRAME_SIZE)) == _FRAME_SIZE:
            magic, header_size, body_size, header_sum, body_sum = _SIZES.unpack(head[:-4])
            if magic != _MAGIC or int.from_bytes(head[-4:], "little") != zlib.crc32(head[:-4]):
                return
            header, offset = file.read(header_size), file.tell()
            if zlib.crc32(header) != header_sum or offset + body_size > size:
                return
            entry = json.loads(header)
            at = (start, rank, place, entry["returns"], path, offset, body_sum)
            yield Frame(entry["kind"], entry["values"], *at, entry["shapes"])
            file.seek(offset + body_size)
            place += 1


class History:
    """What a run's ledger says by now: the surviving lineage of its rollouts."""

    def __init__(self, folder: Path, least_start: int = 0):
        """``least_start``: leave out the files of earlier starts. Raises UserError where there is nothing."""
        self.frames = list(read(folder, least_start))
        if not self.frames:
            raise UserError(f"{folder}: a run of r1mega rl has a ledger; got none; give run=DIR of such a run")
        returns = [frame for frame in self.frames if frame.kind in ("start", "back")]
        self._returns = [((frame.start, frame.returns), frame.values["rollout"], frame.values["update"]) for frame in returns]

    def _left(self, frame: Frame) -> tuple[float, float]:
        """(rollout, update) that the run later went back to at the earliest: what is after them has no part in the lineage."""
        later = [place for place in self._returns if place[0] > (frame.start, frame.returns)]
        return min((place[1] for place in later), default=float("inf")), min((place[2] for place in later), default=float("inf"))

    def uses(self) -> dict[int, list[Frame]]:
        """Rollout to the ``use`` and ``drop`` frames of all ranks that still hold."""
        found: dict[int, list[Frame]] = {}
        for frame in self.frames:
            if frame.kind in ("use", "drop") and frame.values["rollout"] <= self._left(frame)[0]:
                found.setdefault(frame.values["rollout"], []).append(frame)
        return found

    def samples(self) -> dict[tuple[int, int], Frame]:
        """(item, member) to the newest sample whose weights are part of the lineage."""
        found: dict[tuple[int, int], Frame] = {}
        for frame in self.frames:
            if frame.kind == "sample" and max((span[0] for span in frame.values["versions"]), default=0) <= self._left(frame)[1]:
                found[frame.values["item"], frame.values["member"]] = frame
        return found

    def by_id(self) -> dict[str, Frame]:
        """Sample id to its frame, void ones included."""
        return {frame.id: frame for frame in self.frames if frame.kind == "sample"}

    def unused(self, consumed: int, done: Iterable[int]) -> dict[tuple[int, int], Frame]:
        """Samples of items that are not done: what a run that goes on need not make again."""
        done = set(done)
        return {key: frame for key, frame in self.samples().items() if key[0] >= consumed and key[0] not in done}

    def audit(self) -> list[str]:
        """What breaks exactly-once in the lineage, in words; an empty list where nothing does."""
        faults, seen, items = [], {}, {}
        known, uses = self.by_id(), self.uses()
        for rollout in range(1, max(uses, default=0) + 1):
            if rollout not in uses:
                faults.append(f"rollout {rollout} has no record of what it used")
            for frame in uses.get(rollout, ()):
                for name in frame.values.get("samples", ()):
                    if name not in known:
                        faults.append(f"rollout {rollout} used sample {name}, which is not in the ledger")
                    key = (known[name].values["item"], known[name].values["member"]) if name in known else name
                    if key in seen:
                        faults.append(f"rollout {rollout} used item {key[0]} member {key[1]} again, after rollout {seen[key]}")
                    seen[key] = rollout
                for item in frame.values["items"]:
                    if items.get(item, (rollout, frame.kind)) != (rollout, frame.kind):
                        faults.append(f"item {item} was done in rollout {items[item][0]} and in rollout {rollout}")
                    items[item] = (rollout, frame.kind)
        cursor = max((frame.values.get("consumed", 0) for frames in uses.values() for frame in frames), default=0)
        lost = sorted(set(range(cursor)) - set(items))
        if lost:
            faults.append(f"items below {cursor} that no rollout used or dropped: {', '.join(map(str, lost[:10]))}")
        return faults
