"""Results at a URL: a run works in a folder of the cache, and what is finished there is copied to the URL.

Owns what goes when: everything but checkpoints first, then each finished checkpoint with its manifest last, so that what is whole
at the URL can be gone on from and half an upload is never taken for whole; then what is gone here goes there. At the start the
newest whole checkpoint at the URL is fetched where this machine has none as new, so that the same command on another machine goes
on. A file ``.r1mega`` at the URL holds the run's id: a working folder of another id (the URL was emptied, or another machine began
it) is dropped. Two machines must not write to one URL at once: nothing here can notice it in time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from r1mega.config.errors import UserError
from r1mega.files import remote

MARK = ".r1mega"
CHECKPOINTS = "checkpoints"


def working_path(url: str) -> Path:
    """Where what goes to ``url`` is made."""
    return remote.cache_folder() / "staged" / remote.key(url) / (PurePosixPath(url.rstrip("/")).name or "files")


class Mirror:
    """One URL that a command writes, and its local path.

    whole: a folder there is replaced, not added to (an export). keep_last: checkpoints kept there; None: the command makes none.
    keep_every: those whose step is a multiple of it are kept too; 0: none.
    """

    def __init__(self, where: str, url: str, local: Path, *, whole: bool, keep_last: int | None = None, keep_every: int = 0):
        if "::" in url:
            raise UserError(f"{where}: one URL to write to; got the chain {url}; leave out what stands before or after ::")
        self.where, self.url, self.local, self.whole = where, url.rstrip("/"), local, whole
        self.keep_last, self.keep_every = keep_last, keep_every
        self.within: list[Path] = []
        """Local paths below this one that other mirrors send."""
        self._book = local.parent / f".{local.name}.sent.json"
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Look at the URL, fetch what the run goes on from, and leave the run's id there.

        Raises UserError where the URL cannot be reached or written, or a folder to be replaced is not ours.
        """
        system, path = remote.filesystem(self.url, self.where)
        with remote.locked(remote.key(self.url)), remote.reaching(self.url, self.where):
            there = _listing(system, path)
            mark = there.get(MARK)
            found = json.loads(system.cat_file(mark[0]))["id"] if mark else None
            if self.whole:
                if there and "" not in there and not mark:
                    rule = f"{self.where}: a new folder or an earlier result"
                    raise UserError(f"{rule}; got {self.url} with other files; use another {self.where}=")
                self.local.parent.mkdir(parents=True, exist_ok=True)
                return
            known = self._read()["id"]
            if found is None and known and self._whole_steps():  # the URL has lost what was sent: all is sent again
                self._write({"id": known, "files": {}})
            elif found is None or found != known:
                self._set_aside()
                self._write({"id": found or uuid.uuid4().hex, "files": {}})
            self.local.mkdir(parents=True, exist_ok=True)
            self._fetch_newest(system, there)
            if found is None:
                self._put_mark(system, path)

    def _whole_steps(self) -> dict[int, str]:
        """Step to name of the checkpoints here whose every hash holds."""
        found = remote.whole_steps(list(self._files()), f"{CHECKPOINTS}/")
        return {step: name for step, name in found.items() if _is_whole(self.local / name)}

    def _set_aside(self) -> None:
        """Make room for another run's files; checkpoints are kept under another name, which is told."""
        if not self._whole_steps():
            shutil.rmtree(self.local, ignore_errors=True)
            return
        kept = self.local.with_name(f"{self.local.name}.kept-{uuid.uuid4().hex[:8]}")
        self.local.rename(kept)
        print(f"{self.where}: {self.url} is another run's now; what was here is kept in {kept}", file=sys.stderr)

    def send(self) -> None:
        """Copy what is new here to the URL and remove there what is gone here. UserError, naming the URL, where that fails."""
        with self._lock, self._sending():
            system, path = remote.filesystem(self.url, self.where)
            if self.local.is_dir():
                self._send_folder(system, path)
            elif self.local.is_file():
                self._put(system, path, [""])

    def _send_folder(self, system: Any, path: str) -> None:
        book, files = self._read(), self._files()
        new = [name for name, stamp in files.items() if book["files"].get(name) != stamp]
        if self.whole:
            self._put(system, path, new)
            self._put_mark(system, path)
            _remove(system, [full for name, (full, _) in _listing(system, path).items() if name not in files and name != MARK])
            return
        steps: dict[str, list[str]] = {}
        for name in new:
            steps.setdefault(_step_of(name), []).append(name)
        self._put(system, path, steps.pop("", []), book, files)
        for step, names in sorted(steps.items()):
            manifest = f"{step}/{remote.MANIFEST}"
            sent = [name for name in book["files"] if name.startswith(f"{step}/")]
            if manifest in sent or not sent:  # written anew, or half an upload of another run, perhaps of other ranks
                _remove_step(system, f"{path}/{step}")
                book["files"] = {name: stamp for name, stamp in book["files"].items() if name not in sent}
                names = [name for name in files if name.startswith(f"{step}/")]
            self._put(system, path, [name for name in names if name != manifest], book, files)
            self._put(system, path, [manifest], book, files)
        gone = [name for name in book["files"] if name not in files]
        _remove(system, [f"{path}/{name}" for name in gone if not _step_of(name)])
        for step in {_step_of(name) for name in gone} - {_step_of(name) for name in files} - {""}:
            _remove_step(system, f"{path}/{step}")
        self._write({**book, "files": {name: stamp for name, stamp in book["files"].items() if name in files}})
        self._prune(system, path)

    def _prune(self, system: Any, path: str) -> None:
        """Remove older checkpoints that another machine sent, whose loop is not there to do it."""
        if self.keep_last is None:
            return
        found = remote.whole_steps(_listing(system, f"{path}/{CHECKPOINTS}"), "")
        for step in sorted(found)[: -self.keep_last]:
            is_kept = self.keep_every and step % self.keep_every == 0
            if not is_kept and not (self.local / CHECKPOINTS / found[step]).exists():
                _remove_step(system, f"{path}/{CHECKPOINTS}/{found[step]}")

    def _fetch_newest(self, system: Any, there: dict[str, tuple[str, Any]]) -> None:
        steps = remote.whole_steps(there, f"{CHECKPOINTS}/")
        here = self._whole_steps()
        if self.keep_last is None or not steps or max(steps) <= max(here, default=-1):
            return
        name = steps[max(steps)]
        step = {rel.removeprefix(f"{name}/"): entry for rel, entry in there.items() if rel.startswith(f"{name}/")}
        final = self.local / name
        aside = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        remote.download(system, step, aside, f"{self.url}/{name}")
        small = {rel: entry for rel, entry in there.items() if rel != MARK and ("/" not in rel or rel.startswith("tensorboard/"))}
        if small:
            remote.download(system, small, self.local, self.url)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        book, files = self._read(), self._files()
        fetched = {rel for rel in files if rel in small or rel.startswith(f"{name}/")}
        self._write({**book, "files": {**book["files"], **{rel: files[rel] for rel in fetched}}})

    def _files(self) -> dict[str, list[int]]:
        """Finished files below the local folder: name to [bytes, time of change].

        What starts with a dot is on its way in or out, but for the files inside a checkpoint, which are all its own.
        """
        found, finished = {}, {}
        for base, folders, files in os.walk(self.local):
            here = Path(base)
            folders[:] = [name for name in folders if not name.startswith((".", "damaged-")) and here / name not in self.within]
            for name in files:
                path, rel = here / name, (here / name).relative_to(self.local).as_posix()
                step = _step_of(rel)
                if step:
                    if not finished.setdefault(step, (self.local / step / remote.MANIFEST).is_file()):
                        continue
                elif name.startswith(".") or name.endswith(".tmp") or path in self.within:
                    continue
                with contextlib.suppress(FileNotFoundError):  # a log that was turned over meanwhile
                    stat = path.stat()
                    found[rel] = [stat.st_size, stat.st_mtime_ns]
        return dict(sorted(found.items()))

    def _put(self, system: Any, path: str, names: Sequence[str], book: dict[str, Any] | None = None, files: Any = None) -> None:
        """Upload files by their names below the folder ("" for a single file), and note them in the book."""
        if not names:
            return
        pairs = [(str(self.local / name), f"{path}/{name}" if name else path) for name in names]
        _make_folders(system, {full.rpartition("/")[0] for _, full in pairs})
        system.put([here for here, _ in pairs], [full for _, full in pairs])
        if book is not None:
            book["files"].update({name: files[name] for name in names})
            self._write(book)

    def _put_mark(self, system: Any, path: str) -> None:
        _make_folders(system, {path})
        system.pipe_file(f"{path}/{MARK}", json.dumps({"id": self._read()["id"] or uuid.uuid4().hex}).encode())

    def _read(self) -> dict[str, Any]:
        try:
            body = json.loads(self._book.read_text())
            return {"id": body["id"], "files": dict(body["files"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {"id": None, "files": {}}

    def _write(self, body: dict[str, Any]) -> None:
        self._book.parent.mkdir(parents=True, exist_ok=True)
        aside = self._book.with_suffix(".tmp")
        aside.write_text(json.dumps(body))
        aside.replace(self._book)

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            with remote.reaching(self.url, self.where):
                yield
        except UserError as error:
            reason = str(error).partition("; got ")[2].rpartition("; ")[0] or str(error)
            raise UserError(
                f"{self.where}: what is finished goes to its URL; got {reason}; all is kept in {self.local.parent}, mend the way "
                "there and run the same command"
            ) from error


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint's files are as its manifest has them. This floor is below the trainer's, whose manifest it is."""
    try:
        files = json.loads((folder / remote.MANIFEST).read_text())["files"]
        for name, entry in files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _step_of(name: str) -> str:
    """``checkpoints/step-N`` for a file of a checkpoint, else ""."""
    parts = PurePosixPath(name).parts
    return "/".join(parts[:2]) if len(parts) > 2 and parts[0] == CHECKPOINTS and parts[1].startswith("step-") else ""


def _listing(system: Any, path: str) -> dict[str, tuple[str, Any]]:
    try:
        return remote.listing(system, path)
    except FileNotFoundError:
        return {}


def _make_folders(system: Any, folders: Iterable[str]) -> None:
    """Folders on a file system, whose paths start with a slash. A store of objects has none, and would make a missing bucket."""
    for folder in sorted(folders):
        if folder.startswith("/"):
            system.makedirs(folder, exist_ok=True)


def _remove(system: Any, paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(path)


def _remove_step(system: Any, path: str) -> None:
    """A checkpoint's folder, its manifest first: half removed it is not whole."""
    _remove(system, [f"{path}/{remote.MANIFEST}"])
    with contextlib.suppress(FileNotFoundError):
        system.rm(path, recursive=True)
