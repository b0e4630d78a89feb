"""``r1mega convert``: a checkpoint from one format into the other, file by file, with a ledger of every tensor.

In: a source folder; out: a target folder, which appears whole or not at all. Works in ``.NAME.partial`` beside it, where a finished
file has an entry in ``journal/``: the same command goes on after a kill. Memory: what ``workers`` threads hold of single tensors,
kept under the source's largest file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1mega import __version__
from r1mega.config.convert import ConvertConfig
from r1mega.config.errors import UserError
from r1mega.train.convert import finish, verify
from r1mega.train.convert.ledger import account
from r1mega.train.convert.shards import TORCH
from r1mega.train.convert.sources import open_source
from r1mega.train.convert.targets import Item, Unit, open_target

JOURNAL = "journal"
LARGEST_WORKERS = 4
ROOM_BYTES = 64 << 20
"""Free disk beyond the weights: config, tokenizer, ledger."""
COPIES = 4
"""Of a tensor in fp32 while it is converted: as read, as fp32, as written, and a temporary one."""


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert ``config.source`` to ``config.target``. Returns target, format, numbers of tensors, parameters, bytes and files.

    A target that this command has finished already is left alone; ``convert.verify`` then looks at both sides again. Raises
    UserError, naming the tensor, for whatever is missing, too much, or not as config, index and ledger say.
    """
    began = time.perf_counter()
    source = open_source(Path(config.source), allow_mixed=config.convert.allow_mixed)
    target, place = open_target(source, config), Path(config.target)
    identity = {
        "source": source.identity(),
        "format": target.format,
        "dtype": config.dtype,
        "scale_format": config.convert.scale_format,
        "vocab_multiple": config.convert.vocab_multiple,
        "files": [[unit.file, len(unit.items), unit.num_bytes] for unit in target.units],
    }
    _check_place(place, Path(config.source))
    result = {"target": str(place), "format": target.format, "files": len(target.units)}
    if finish.identity_of(place) == _hash(identity):
        print(f"{place} is there already, whole and from this source", file=sys.stderr)
        result |= {"resumed_files": len(target.units), **finish.summary(place)}
    else:
        aside = place.with_name(f".{place.name}.partial")
        done = _resume(aside, _hash(identity), target.units)
        _check_disk(aside, target.units, done)
        result["resumed_files"] = len(done)
        journal = _write_all(source, target, aside, done, config.convert.workers)
        ledger = account(source, target, journal, allow_equal=config.convert.allow_equal)
        ledger["identity"], ledger["r1mega"] = _hash(identity), __version__
        finish.publish(source, target, ledger, journal, aside, place)
        result |= finish.summary(place)
        size, seconds = result["bytes"] / 2**30, time.perf_counter() - began
        counts = f"{result['tensors']} tensors, {result['parameters']:,} parameters"
        print(f"wrote {place}: {counts}, {size:.2f} GiB in {result['files']} files, {seconds:.1f} s")
    if config.convert.verify:
        result["verified"] = found = verify.verify(Path(config.source), place, config)
        print(f"verified {found['tensors']} tensors in {found['seconds']:.1f} s; {verify.told(found['probe'])}")
    return result


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_place(place: Path, source: Path) -> None:
    """Only an earlier conversion is replaced."""
    here, there = place.resolve(), source.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise UserError(f"target: a folder beside the source; got {place} with source {source}; use another target=")
    if place.is_dir() and any(place.iterdir()) and finish.identity_of(place) is None:
        raise UserError(f"target: a new folder or an earlier conversion; got {place} with other files; use another target=")


def _resume(aside: Path, identity: str, units: list[Unit]) -> dict[str, dict[str, Any]]:
    """What an earlier call has finished, by file; anything of another conversion goes."""
    mark = aside / JOURNAL / "identity"
    if not mark.is_file() or mark.read_text() != identity:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / JOURNAL).mkdir(parents=True)
        mark.write_text(identity)
    done = {}
    for unit in units:
        entry, file = aside / JOURNAL / f"{unit.file}.json", weights_folder(aside, unit) / unit.file
        if entry.is_file() and file.is_file():
            kept = json.loads(entry.read_text())
            if file.stat().st_size == kept["bytes"]:
                done[unit.file] = kept
    return done


def weights_folder(folder: Path, unit: Unit) -> Path:
    """Where a unit's file lies below the target."""
    return folder / "weights" if unit.file.endswith(".distcp") else folder


def _check_disk(aside: Path, units: list[Unit], done: dict[str, Any]) -> None:
    needed = sum(unit.num_bytes for unit in units if unit.file not in done) + ROOM_BYTES
    free = shutil.disk_usage(aside).free
    if needed > free:
        raise UserError(
            f"target: {needed / 2**30:.1f} GiB of free disk for what is still to write; got {free / 2**30:.1f} GiB; make room, or "
            "use a target= on another disk"
        )


def _write_all(source, target, aside: Path, done: dict[str, Any], workers: int) -> list[dict[str, Any]]:
    """Write every unit that is not done; returns the journal in the order of the units."""
    from tqdm import tqdm

    todo = [unit for unit in target.units if unit.file not in done]
    total = sum(unit.num_bytes for unit in target.units)
    start = total - sum(unit.num_bytes for unit in todo)
    budget, stop = _Budget(source.largest_bytes), threading.Event()
    lock = threading.Lock()
    look = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "desc": f"convert to {target.format}", "disable": None}
    with tqdm(total=total, initial=start, file=sys.stderr, **look) as bar:  # none where stderr is no terminal

        @contextmanager
        def watched(item: Item):
            if stop.is_set():
                raise _Stopped
            with budget.hold(COPIES * math.prod(item.shape) * max(4, TORCH[item.dtype].itemsize)):
                yield
            with lock:
                bar.update(0 if item.kind == "copy" else item.num_bytes)

        def one(unit: Unit) -> None:
            folder = weights_folder(aside, unit)
            folder.mkdir(exist_ok=True)
            entry = target.write(unit, folder, watched)
            written = aside / JOURNAL / f".{unit.file}.part"
            written.write_text(json.dumps(entry))
            written.rename(aside / JOURNAL / f"{unit.file}.json")
            done[unit.file] = entry

        count = workers or min(LARGEST_WORKERS, os.cpu_count() or 1)
        with ThreadPoolExecutor(count) as pool:
            running = [pool.submit(one, unit) for unit in todo]
            finished, waiting = wait(running, return_when=FIRST_EXCEPTION)
            stop.set()
            for future in waiting:
                future.cancel()
        errors = [error for future in running if not future.cancelled() and (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
            raise error
    return [done[unit.file] for unit in target.units]


class _Stopped(Exception):
    """Another file has failed."""


class _Budget:
    """Bytes that all threads together may hold; a tensor above it is converted alone."""

    def __init__(self, limit: int):
        self._limit, self._held, self._free = limit, 0, threading.Condition()

    @contextmanager
    def hold(self, size: int):
        size = min(size, self._limit)
        with self._free:
            self._free.wait_for(lambda: self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._free:
                self._held -= size
                self._free.notify_all()
