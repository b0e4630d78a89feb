"""``r1mega convert``: a checkpoint from one format into the other, file by file, with a ledger of every tensor.

In: a source folder; out: a target folder, which appears whole or not at all. Works in ``.NAME.partial`` beside it, where a finished
file has an entry in ``journal/``: the same command goes on after a kill. Memory: what ``workers`` threads hold of single tensors,
together at most the source's largest file, or one tensor's conversion where that takes more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from r1mega import __version__
from r1mega.config.convert import ConvertConfig
from r1mega.config.errors import UserError
from r1mega.train.convert import finish, verify
from r1mega.train.convert.ledger import account
from r1mega.train.convert.sources import open_source, told
from r1mega.train.convert.targets import Item, Unit, open_target

JOURNAL = "journal"
LARGEST_WORKERS = 4
ROOM_BYTES = 64 << 20
"""Free disk that is left."""
LEDGER_BYTES = 2000
"""Of the ledger and the journal, a tensor."""


def convert(config: ConvertConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Convert ``config.source`` to ``config.target``. Returns target, format, numbers of tensors, parameters, bytes and files.

    A target that this command has finished already is left alone; ``convert.verify`` then looks at both sides again. ``quiet``:
    no progress and no summary. Raises UserError, naming the tensor, for whatever is missing, too much, or not as config, index and
    ledger say.
    """
    began = time.perf_counter()
    place = Path(config.target).resolve()
    _check_place(place, Path(config.source))
    source = open_source(Path(config.source), allow_mixed=config.convert.allow_mixed)
    target = open_target(source, config)
    identity = _hash(
        {
            "source": source.identity(),
            "format": target.format,
            "dtype": config.dtype,
            "scale_format": config.convert.scale_format,
            "vocab_multiple": config.convert.vocab_multiple,
            "files": [[unit.file, len(unit.items), unit.num_bytes] for unit in target.units],
            "r1mega": __version__,
        }
    )
    result = {"target": config.target, "format": target.format, "files": len(target.units)}
    with _alone(place) as aside:
        finish.mend(place)
        if finish.identity_of(place) == identity:
            finish.check_files(place, hashes=not config.convert.verify)
            shutil.rmtree(aside)
            result["resumed_files"] = len(target.units)
            done = "is there already, whole and from this source"
        else:
            _check_contents(place, target.format)
            result["resumed_files"] = _work(config, source, target, identity, aside, place, quiet=quiet)
            done = f"written in {time.perf_counter() - began:.1f} s"
    result |= finish.summary(place)
    if not quiet:
        counts = f"{result['tensors']} tensors, {result['parameters']:,} parameters, {result['bytes'] / 2**30:.2f} GiB"
        print(f"{config.target}: {counts} in {result['files']} files, {done}")
    if config.convert.verify:
        result["verified"] = found = verify.verify(source.path, place, config)
        print(f"verified {found['tensors']} tensors in {found['seconds']:.1f} s; {verify.told(found['probe'])}")
    return result


def _work(config: ConvertConfig, source, target, identity: str, aside: Path, place: Path, *, quiet: bool) -> int:
    """Write and publish; returns how many files an earlier call had written."""
    done = _resume(aside, identity, target.units)
    resumed = len(done)
    _check_disk(source, aside, target.units, done)
    journal = _write_all(source, target, aside, done, config.convert.workers, quiet=quiet)
    ledger = account(source, target, journal, allow_equal=config.convert.allow_equal)
    ledger["identity"], ledger["r1mega"] = identity, __version__
    finish.publish(source, target, ledger, journal, aside, place)
    return resumed


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_place(place: Path, source: Path) -> None:
    """A folder that is not within the source, nor around it."""
    there = source.resolve()
    if place == there or there in place.parents or place in there.parents:
        raise UserError(f"target: a folder beside the source; got {place} with source {source}; use another target=")
    if place.exists() and not place.is_dir():
        raise UserError(f"target: a folder; got a file {place}; use another target=")


def _check_contents(place: Path, wanted: str) -> None:
    """Only an earlier conversion to the same format is replaced, and only where nobody has put anything of his own into it."""
    if not place.is_dir() or not any(place.iterdir()):
        return
    strangers = finish.strangers(place)
    if strangers is None:
        raise UserError(f"target: a new folder or an earlier conversion; got {place} with other files; use another target=")
    held = finish.ledger_of(place)["target"]["format"]
    if held != wanted:
        raise UserError(
            f"target: a new folder or an earlier conversion to {wanted}; got one to {held}, {place}; use another target="
        )
    if strangers:
        raise UserError(
            f"target: nothing but an earlier conversion; got {told(strangers)} in {place}; move it away, or use another target="
        )


@contextmanager
def _alone(place: Path):
    """The working folder beside the target, locked: one conversion at a time."""
    aside = place.with_name(f".{place.name}.partial")
    while True:
        aside.mkdir(parents=True, exist_ok=True)
        handle = os.open(aside, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if aside.is_dir() and os.path.samestat(os.fstat(handle), aside.stat()):
                yield aside
                return
        except BlockingIOError:
            raise UserError(f"target: one conversion at a time; got another one at work on {place}; wait for it") from None
        finally:
            os.close(handle)
            with suppress(OSError):
                aside.rmdir()  # where nothing was begun
        # another process has published this folder while it was opened here: once more


def _resume(aside: Path, identity: str, units: list[Unit]) -> dict[str, dict[str, Any]]:
    """What an earlier call has finished, by file. Anything of another conversion goes, and a changed file counts as not there."""
    mark = aside / JOURNAL / "identity"
    if not mark.is_file() or mark.read_text() != identity:
        for path in aside.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (aside / JOURNAL).mkdir()
        mark.write_text(identity)
    done = {}
    for unit in units:
        folder = weights_folder(aside, unit)
        entry, file = aside / JOURNAL / f"{unit.file}.json", folder / unit.file
        (folder / f".{unit.file}.part").unlink(missing_ok=True)
        if entry.is_file() and file.is_file():
            try:
                kept = json.loads(entry.read_text())
            except ValueError:  # a power cut
                continue
            with file.open("rb") as opened:
                if file.stat().st_size == kept["bytes"] and hashlib.file_digest(opened, "sha256").hexdigest() == kept["sha256"]:
                    done[unit.file] = kept
    return done


def weights_folder(folder: Path, unit: Unit) -> Path:
    """Where a unit's file lies below the target."""
    return folder / "weights" if unit.file.endswith(".distcp") else folder


def _check_disk(source, aside: Path, units: list[Unit], done: dict[str, Any]) -> None:
    needed = sum(unit.num_bytes for unit in units if unit.file not in done) + ROOM_BYTES + source.other_bytes
    needed += LEDGER_BYTES * sum(len(unit.items) for unit in units)
    free = shutil.disk_usage(aside).free
    if needed > free:
        raise UserError(
            f"target: {needed / 2**30:.1f} GiB of free disk for what is still to write; got {free / 2**30:.1f} GiB; make room, or "
            "use a target= on another disk"
        )


def _write_all(source, target, aside: Path, done: dict[str, Any], workers: int, *, quiet: bool) -> list[dict[str, Any]]:
    """Write every unit that is not done; returns the journal in the order of the units."""
    from tqdm import tqdm

    todo = [unit for unit in target.units if unit.file not in done]
    total = sum(unit.num_bytes for unit in target.units)
    start = total - sum(unit.num_bytes for unit in todo)
    budget, stop = _Budget(source.largest_bytes), threading.Event()
    lock = threading.Lock()
    look = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "desc": f"convert to {target.format}", "disable": quiet or None}
    with tqdm(total=total, initial=start, file=sys.stderr, **look) as bar:  # none where stderr is no terminal

        @contextmanager
        def watched(items: list[Item]):
            if stop.is_set():
                raise _Stopped
            with budget.hold(sum(target.working_bytes(item) for item in items)):
                yield
            with lock:
                bar.update(sum(item.num_bytes for item in items if item.kind != "copy"))

        def one(unit: Unit) -> None:
            folder = weights_folder(aside, unit)
            folder.mkdir(exist_ok=True)
            entry = target.write(unit, folder, watched)
            written = aside / JOURNAL / f".{unit.file}.part"
            with written.open("w") as file:
                json.dump(entry, file)
                file.flush()
                os.fsync(file.fileno())
            written.rename(aside / JOURNAL / f"{unit.file}.json")
            done[unit.file] = entry

        pool = ThreadPoolExecutor(workers or min(LARGEST_WORKERS, os.cpu_count() or 1))
        running = [pool.submit(one, unit) for unit in todo]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C ends the wait: each thread stops at its next tensor
            stop.set()
            pool.shutdown(cancel_futures=True)
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
