"""URLs of fsspec as local copies: what is there, what of it is wanted, and a cache that notices when it changes.

Owns the cache's folder (``R1MEGA_CACHE``, else ``~/.cache/r1mega``), its locks, and the wording of everything that a file system
may answer. In: a URL (``s3://...``, ``memory://...``, ``zip://a.jsonl::file:///x.zip``). Out: the path of a copy that is whole. A
copy is kept under the URL and the file system's own record of it (size, time, ETag, checksum), appears by one rename, and is made
by one process at a time. fsspec is imported when the first URL comes.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from r1mega.config.errors import UserError, nearest

CACHE_VARIABLE = "R1MEGA_CACHE"
MANIFEST = "manifest.json"
"""The file of a checkpoint that is written last (:mod:`r1mega.train.manifest`)."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_COLONS = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<!\\)(?:://|::)""")
_STEP = re.compile(r"(?:.*/)?step-(\d+)")
_PARTS = ("json", "bin", "idx", "mask")
_READ_OF_A_RUN = (".yaml", ".json", ".jsonl", ".html")


def is_url(text: str) -> bool:
    """True for a URL, or a chain of them (``a://...::b://...``)."""
    return _URL.match(text) is not None


def quoted(argument: Any) -> Any:
    """A command's argument with the colons of URLs inside ``{...}`` escaped: Hydra would take the first for the end of a key."""
    if not isinstance(argument, str) or "{" not in argument:
        return argument
    return _COLONS.sub(lambda match: match[0] if match[0][0] in "'\"" else match[0].replace(":", "\\:"), argument)


def cache_folder() -> Path:
    """Where copies and unsent results lie."""
    given = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given).absolute() if given else Path(base) / "r1mega"


def key(url: str) -> str:
    """A URL as the name of a folder: 16 hex digits."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time for ``name``; the others wait. The lock goes with the process that holds it."""
    path = cache_folder() / "locks" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise UserError(
            f"{CACHE_VARIABLE}: a folder for copies; got {cache_folder()} ({error.strerror}); set {CACHE_VARIABLE}=FOLDER"
        ) from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def filesystem(url: str, where: str) -> tuple[Any, str]:
    """fsspec's file system of ``url`` and the path in it. UserError for an unknown protocol, or one without its package."""
    import fsspec
    from fsspec.registry import known_implementations, registry

    known = {*known_implementations, *registry}
    for link in url.split("::"):
        protocol = link.partition("://")[0]
        if protocol not in known and "/" not in protocol:  # a chain may end in a plain path
            hint = nearest(protocol, known)
            raise UserError(
                f"{where}: a protocol that fsspec knows; got {protocol}:// in {url}; {hint}use s3://, gs://, https:// and so on"
            )
    with reaching(url, where):
        try:
            system, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(
                f"{where}: a package serves each protocol; got {url} without it; pip install {_package(url, error)}"
            ) from None
        system.invalidate_cache()
        return system, path


def fetch(url: str, where: str, kind: str = "data") -> tuple[Path, Path]:
    """A local copy of what ``url`` names: (its path, the copy's root, which stands for the URL in errors).

    kind: ``tokens`` is a token file's parts NAME.*; ``data`` a file, a folder with all below it, or a token file; ``checkpoint`` a
    checkpoint's folder or the newest one of a run; ``model`` that, or a published model's folder without weights in other formats;
    ``run`` what a report reads of a run. Raises UserError for what is not there or
    cannot be reached.
    """
    system, path = filesystem(url, where)
    name = _name(system, path)
    with reaching(url, where):
        parts = _token_parts(system, path) if kind == "tokens" else {}
        try:
            found = {} if parts else listing(system, path)
        except FileNotFoundError:
            parts = _token_parts(system, path) if kind == "data" else {}
            if not parts:
                raise UserError(
                    f"{where}: a file or folder at a URL; got no such {url}; {_near(system, path, url)}check the URL"
                ) from None
        if parts:
            root = copied(url, system, {f"{name}{rest}": entry for rest, entry in parts.items()}) / name
            return root, root
        within = ""
        if kind == "model" and "config.json" in found:
            found = {rel: entry for rel, entry in found.items() if is_of_model(rel)}
        elif kind in ("checkpoint", "model"):
            within = checkpoint_in(found, where, url)
            found = {rel: entry for rel, entry in found.items() if not within or rel.startswith(f"{within}/")}
        elif kind == "run":
            found = {rel: entry for rel, entry in found.items() if _is_read_of_a_run(rel)}
        if not found:
            raise UserError(f"{where}: a folder with files; got an empty one, {url}; check the URL")
        root = copied(url, system, {f"{name}/{rel}" if rel else name: entry for rel, entry in found.items()}) / name
        return root / within, root


def listing(system: Any, path: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Every file at or below ``path``: name below it ("" for a file itself) to (path, the file system's record of it)."""
    try:
        info = system.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__  # HTTP says so of every failure, a refused connection too
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None
        raise
    if info["type"] == "file":
        return {"": (path, info)}
    base = path.rstrip("/") + "/" if path else ""
    found = {}
    for full, entry in sorted(system.find(path, detail=True).items()):
        rel = full[len(base) :] if full.startswith(base) else full.lstrip("/")
        if not rel or rel.endswith("/"):
            continue  # object stores mark a folder by an empty object
        if rel.startswith("/") or ".." in PurePosixPath(rel).parts:
            raise UserError(f"{path}: names below a folder stay in it; got {rel}; unpack the archive by hand")
        found[rel] = (full, entry)
    return found


def checkpoint_in(names: Sequence[str] | Mapping[str, Any], where: str, url: str) -> str:
    """Where below a folder of ``names`` the checkpoint lies: "" or ``[checkpoints/]step-N``, the newest that is whole."""
    if MANIFEST in names:
        return ""
    steps = whole_steps(names, "") or whole_steps(names, "checkpoints/")
    if steps:
        return steps[max(steps)]
    if "config.json" in names:
        raise UserError(
            f"{where}: a checkpoint that r1mega wrote; got the Hugging Face model {url}; "
            f"run r1mega convert source={url} target=FOLDER, and give {where}=FOLDER"
        )
    raise UserError(f"{where}: a folder with {MANIFEST}, or a run's with checkpoints/; got neither in {url}; check the URL")


def is_of_model(name: str) -> bool:
    """True for what belongs to a published model: its safetensors and all that is no weight."""
    return not name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"))


def whole_steps(names: Sequence[str] | Mapping[str, Any], base: str) -> dict[int, str]:
    """Step to folder of every finished checkpoint right below ``base`` ("" or with its slash)."""
    folders = [
        name.removesuffix(f"/{MANIFEST}") for name in names if name.startswith(f"{base}step-") and name.endswith(f"/{MANIFEST}")
    ]
    return {
        int(match[1]): folder for folder in folders if (match := _STEP.fullmatch(folder)) and folder.count("/") == base.count("/")
    }


def copied(url: str, system: Any, files: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Path:
    """The folder with copies of ``files`` (name in it to remote path and record), made unless it is there."""
    state = hashlib.sha256(
        "\n".join(f"{name} {sorted(entry.items(), key=str)}" for name, (_, entry) in sorted(files.items())).encode()
    )
    home = cache_folder() / "fetched" / key(url)
    place = home / state.hexdigest()[:16]
    with locked(key(url)):
        if not place.is_dir():
            for rest in home.glob("*.tmp"):  # left by a process that was killed
                shutil.rmtree(rest)
            aside = place.with_suffix(".tmp")
            download(system, files, aside, url)
            aside.rename(place)
    return place


def download(system: Any, files: Mapping[str, tuple[str, Mapping[str, Any]]], folder: Path, url: str) -> None:
    """Copy remote files into ``folder`` by their names. Raises UserError where one comes shorter or longer than it is."""
    sizes = [entry.get("size") for _, entry in files.values()]
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"files: {url}, {sum(filter(None, sizes)) / 1e6:.1f} MB, to {folder.parent}", flush=True)
    paths = [folder / name for name in files]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    system.get([full for full, _ in files.values()], [str(path) for path in paths])
    for path, size in zip(paths, sizes, strict=True):
        if size is not None and path.stat().st_size != size:
            raise UserError(f"{url}: {path.name} has {size} bytes; got {path.stat().st_size}; run the same command again")


@contextlib.contextmanager
def reaching(url: str, where: str) -> Iterator[None]:
    """Word whatever a file system raises: each has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{where}: a file or folder at a URL; got no such {url}; check the URL") from None
    except Exception as error:
        said = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no more is known"
        raise UserError(
            f"{where}: a URL that can be reached; got {url} ({type(error).__name__}: {said}); check the URL, the network and the "
            "credentials"
        ) from error


def _name(system: Any, path: str) -> str:
    """The last part of a path: what a local copy is called."""
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    plain = re.split(r"[?#]", path)[0] if protocols & {"http", "https"} else path
    return PurePosixPath(plain.rstrip("/")).name or "files"


def _token_parts(system: Any, path: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The parts of a token file, which is named without suffix."""
    return {f".{part}": (f"{path}.{part}", system.info(f"{path}.{part}")) for part in _PARTS if system.exists(f"{path}.{part}")}


def _is_read_of_a_run(rel: str) -> bool:
    path = PurePosixPath(rel)
    return path.suffix in _READ_OF_A_RUN and not {"checkpoints", "tokenizer", "hf", "export"}.intersection(path.parts[:-1])


def _near(system: Any, path: str, url: str) -> str:
    """``did you mean URL? `` for the name beside ``path`` that is most alike; "" where the folder cannot be listed."""
    head, _, name = path.rstrip("/").rpartition("/")
    try:
        beside = [PurePosixPath(other).name for other in system.ls(head or "/", detail=False)]
    except Exception:  # noqa: BLE001 - only a hint is at stake
        return ""
    close = difflib.get_close_matches(name, beside, n=1)
    first, chain, rest = url.rstrip("/").partition("::")
    return f"did you mean {first[: -len(name)]}{close[0]}{chain}{rest}? " if close and name and first.endswith(name) else ""


def _package(url: str, error: ImportError) -> str:
    """What to install for a protocol: the package that fsspec's table names, or the module that its own code misses."""
    from fsspec.registry import known_implementations

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return cause.name.partition(".")[0]
        cause = cause.__cause__ or cause.__context__
    protocol = url.partition("://")[0].partition("::")[0]
    return known_implementations.get(protocol, {"class": protocol})["class"].partition(".")[0]
