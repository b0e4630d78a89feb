"""``hf:`` names: data sets, tokenizers and r1mega's own checkpoints from a hub, through huggingface_hub and its cache.

    hf:OWNER/NAME[@REVISION][:PART]

PART, of data sets only: ``CONFIG/SPLIT``, ``SPLIT``, ``CONFIG``, or a file's path in the repository. What configs and splits a data
set has is read from its card's header, else from the names of its files. Owns this grammar and the choice of files; refuses by one
line what is ambiguous, absent, of another format, or out of reach. Which hub, which token, where copies lie and whether the network
may be used is huggingface_hub's: ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from r1mega.config.errors import UserError, either, nearest
from r1mega.files import records, remote

PREFIX = "hf:"
GRAMMAR = "hf:OWNER/NAME[@REVISION][:CONFIG/SPLIT]"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@]+))?(?::(?P<part>[^:]+))?", re.ASCII)
_TEXT = ".txt"
_CONVERTED = "refs/convert/parquet"
"""The revision in which a hub keeps data sets of other formats as Parquet, CONFIG/SPLIT/NUMBER.parquet."""

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(?P<split>[\w.-]*?)-?(?P<number>\d{5})-of-(?P<count>\d{5})(?:-\w+)?")

Layout = dict[str, dict[str, list[str]]]
"""Config to split to the files that make it up, in order."""


class HubName(NamedTuple):
    """A parsed ``hf:`` name."""

    repo: str
    revision: str | None = None
    part: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "") + (f":{self.part}" if self.part else "")


def is_hub(text: str) -> bool:
    """True for an ``hf:`` name; ``hf://...`` is a URL of fsspec."""
    return text.startswith(PREFIX) and not text.startswith(f"{PREFIX}//")


def parse(text: str, where: str) -> HubName:
    """``text`` by its grammar. Raises UserError for anything else."""
    match = _NAME.fullmatch(text)
    if not match:
        raise UserError(f"{where}: {GRAMMAR}; got {text!r}; write {where}=hf:OWNER/NAME")
    return HubName(match["repo"], match["revision"], match["part"])


def fetch(text: str, where: str, kind: str) -> tuple[Path, Path]:
    """A local copy of what an ``hf:`` name stands for: (its path, the root that stands for the name in errors).

    kind: ``data`` (a file of records, or a folder with a split's files), ``tokenizer``, ``checkpoint`` or ``model`` (a folder: a
    checkpoint, or a published model with its safetensors). UserError for everything else.
    """
    name = parse(text, where)
    if kind == "data":
        return _data(name, where)
    if kind not in ("tokenizer", "checkpoint", "model"):
        way = f"use a path, or a URL such as hf://datasets/{name.repo}/FILE"
        raise UserError(f"{where}: hf: names data sets, tokenizers and models to read; got {text}; {way}")
    if name.part:
        raise UserError(f"{where}: hf:OWNER/NAME[@REVISION] of a model; got {text}; leave out :{name.part}")
    names = _names(name, "model", where)
    if kind == "tokenizer":
        if "tokenizer.json" not in names:
            raise UserError(f"{where}: a model with tokenizer.json; got {text} without it; use another model's, or train one")
        folder = _snapshot(name, "model", [file for file in TOKENIZER_FILES if file in names], where)
        return folder, folder
    if kind == "model" and "config.json" in names:
        folder = _snapshot(name, "model", [file for file in names if remote.is_of_model(file)], where)
        return folder, folder
    within = remote.checkpoint_in(names, where, text)
    wanted = [file for file in names if not within or file.startswith(f"{within}/")]
    folder = _snapshot(name, "model", wanted, where)
    return folder / within, folder


def layout(names: Sequence[str], card: Mapping[str, Any]) -> Layout:
    """Configs and splits of a data set by its card's header, or by the names of its files where the header has none."""
    readable = sorted(filter(records.is_rows, names)) or sorted(name for name in names if records.suffix(name) == _TEXT)
    found: Layout = {}
    for entry in card.get("configs") or []:
        if isinstance(entry, dict) and (splits := _declared(entry, readable)):
            found[str(entry.get("config_name", "default"))] = splits
    return found or _by_names(readable)


def choose(found: Layout, part: str | None, where: str, name: HubName) -> list[str]:
    """The files of ``part``. Without a config the only one or ``default``, without a split the only one or ``train``."""
    config, split = _selected(found, part)
    if config is None:
        known = either(sorted(found))
        got = f"{name}, whose configs are {known}" if part is None else f"{part!r} of hf:{name.repo}, whose configs are {known}"
        raise UserError(f"{where}: one config of a data set; got {got}; {_near_part(found, part)}use {_example(found, name)}")
    splits = found[config]
    if split is None:
        got = f"{name} with {', '.join(sorted(splits))}"
        raise UserError(
            f"{where}: one split of a data set; got {got}; {_near_part(found, part)}use {_example({config: splits}, name)}"
        )
    files = splits[split]
    shards = [match for file in files if (match := _SHARD.search(PurePosixPath(file).name))]
    if shards and len(files) < int(shards[0]["count"]):
        missing = f"{len(files)} of {int(shards[0]['count'])} files"
        raise UserError(
            f"{where}: all files of a split; got {missing} of {name}; fetch it once with the network (HF_HUB_OFFLINE=0)"
        )
    return files


def _selected(found: Layout, part: str | None) -> tuple[str | None, str | None]:
    """(config, split) that ``part`` names; None for what it leaves open."""
    alone = next(iter(found)) if len(found) == 1 else "default" if "default" in found else None
    if part is None:
        return alone, _split_of(found.get(alone or "", {}), None)
    if part in found:
        return part, _split_of(found[part], None)
    head, slash, tail = part.rpartition("/")
    if slash and head in found:
        return head, _split_of(found[head], tail)
    if not slash and alone is not None:
        return alone, _split_of(found[alone], part)
    return None, None


def _split_of(splits: Mapping[str, Any], wanted: str | None) -> str | None:
    if wanted is None:
        return next(iter(splits)) if len(splits) == 1 else "train" if "train" in splits else None
    return next((name for name in (wanted, _SPLITS.get(wanted.lower(), wanted)) if name in splits), None)


def _example(found: Layout, name: HubName) -> str:
    config, splits = next(iter(sorted(found.items())))
    split = _split_of(splits, None) or sorted(splits)[0]
    return str(name._replace(part=split if config == "default" else f"{config}/{split}"))


def _near_part(found: Layout, part: str | None) -> str:
    every = [f"{config}/{split}" for config, splits in found.items() for split in splits]
    return nearest(part, [*found, *every, *(name.rpartition("/")[2] for name in every)]) if part else ""


def _declared(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """Splits of one config of a card's header; its ``data_files`` are patterns, a list of them, or a list of split and path."""
    base = str(entry.get("data_dir") or "").strip("/")
    given = entry.get("data_files")
    if given is None:
        inside = [name for name in names if not base or name.startswith(f"{base}/")]
        return {split: files for splits in _by_names(inside).values() for split, files in splits.items()}
    items = given if isinstance(given, list) else [given]
    splits: dict[str, list[str]] = {}
    for item in items:
        split, paths = (str(item.get("split", "train")), item.get("path")) if isinstance(item, dict) else ("train", item)
        patterns = [
            re.compile(_regex(f"{base}/{path}" if base else path)) for path in (paths if isinstance(paths, list) else [paths])
        ]
        files = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
        if files:
            splits.setdefault(split, []).extend(files)
    return splits


def _regex(pattern: Any) -> str:
    """A path with wildcards as a regular expression: ``*`` within a name, ``**`` over folders."""
    text = re.escape(str(pattern).removeprefix("./"))
    return text.replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")


def _by_names(names: Sequence[str]) -> Layout:
    """Configs are folders (``data`` and the root: ``default``); a split is a word in a folder's or file's name, else ``train``."""
    found: Layout = {}
    for name in names:
        path = PurePosixPath(name)
        folders, split = list(path.parts[:-1]), _split_word(records.stem(path.name))
        if split is None and folders and folders[-1].lower() in _SPLITS:
            split = _SPLITS[folders.pop().lower()]
        config = "/".join(folder for folder in folders if folder != "data") or "default"
        found.setdefault(config, {}).setdefault(split or "train", []).append(name)
    return found


def _split_word(stem: str) -> str | None:
    if shard := _SHARD.fullmatch(stem):
        return _SPLITS.get(shard["split"].lower(), shard["split"]) or None
    words = [_SPLITS[word] for word in re.split(r"[\W_]+", stem.lower()) if word in _SPLITS]
    return words[-1] if words else None


def _data(name: HubName, where: str) -> tuple[Path, Path]:
    names = _names(name, "dataset", where)
    if name.part and records.suffix(name.part) in (*records.ROWS, _TEXT):
        if name.part not in names:
            raise UserError(f"{where}: a file of hf:{name.repo}; got {name.part!r}; {nearest(name.part, names)}check the name")
        files = [name.part]
    else:
        card = _card(name, names, where)
        found = layout(names, card)
        if not found:
            kinds = ", ".join(sorted({records.suffix(file) for file in names} - {""})) or "no files"
            way = f"use {name._replace(revision=_CONVERTED)}, where the hub may keep it as Parquet"
            raise UserError(f"{where}: a data set of .parquet, .jsonl or .txt files; got {name} with {kinds}; {way}")
        files = choose(found, name.part, where, name)
    folder = _snapshot(name, "dataset", files, where)
    if len(files) == 1:
        return folder / files[0], folder
    return _together(name, folder, files), folder


def _together(name: HubName, folder: Path, files: Sequence[str]) -> Path:
    """A folder with these files alone, as links in order; readers take a folder whole."""
    state = hashlib.sha256("\n".join([str(folder), *files]).encode()).hexdigest()[:16]
    place = remote.cache_folder() / "hub" / state / name.repo.partition("/")[2]
    with remote.locked(state):
        place.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(files):
            link, target = place / f"{number:05d}-{PurePosixPath(file).name}", folder / file
            if not link.is_symlink():
                link.symlink_to(target.absolute())
    return place


def _card(name: HubName, names: Sequence[str], where: str) -> Mapping[str, Any]:
    """The header of a data set's README.md; empty where it has none or a broken one."""
    if "README.md" not in names:
        return {}
    import yaml

    text = (_snapshot(name, "dataset", ["README.md"], where) / "README.md").read_text(encoding="utf-8", errors="replace")
    match = re.match(r"\ufeff?\s*---[^\S\n]*\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}


def _names(name: HubName, repo_type: str, where: str) -> list[str]:
    """All files of the repository; where the hub is out of reach, those that its copy in the cache has."""
    import huggingface_hub
    from huggingface_hub import errors

    with _reaching(name, repo_type, where):
        try:
            info = huggingface_hub.HfApi().repo_info(name.repo, repo_type=repo_type, revision=name.revision)
            return [file.rfilename for file in info.siblings or []]
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
            raise
        except Exception as error:  # no network, a proxy, TLS: the transport below the library has its own
            try:
                copy = huggingface_hub.snapshot_download(
                    name.repo, repo_type=repo_type, revision=name.revision, local_files_only=True, allow_patterns=[]
                )
            except FileNotFoundError:
                raise error from None
            return sorted(path.relative_to(copy).as_posix() for path in Path(copy).rglob("*") if path.is_file())


def _snapshot(name: HubName, repo_type: str, files: Sequence[str], where: str) -> Path:
    """A folder that holds ``files``, from the hub or its local cache."""
    import huggingface_hub

    with _reaching(name, repo_type, where):
        folder = huggingface_hub.snapshot_download(
            name.repo, repo_type=repo_type, revision=name.revision, allow_patterns=list(files)
        )
    missing = [file for file in files if not Path(folder, file).is_file()]
    if missing:
        raise UserError(f"{where}: all files of {name}; got no {missing[0]}; fetch it once with the network (HF_HUB_OFFLINE=0)")
    return Path(folder)


@contextlib.contextmanager
def _reaching(name: HubName, repo_type: str, where: str) -> Iterator[None]:
    """Word what huggingface_hub raises."""
    from huggingface_hub import errors

    what = "data set" if repo_type == "dataset" else "model"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        way = "ask for access on its page and set HF_TOKEN"
        raise UserError(f"{where}: a {what} that you may read; got {name}, whose owner admits readers one by one; {way}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{where}: a {what} on the hub; got no such {PREFIX}{name.repo}; check the name, or set HF_TOKEN for a private one"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: a branch, tag or commit of {PREFIX}{name.repo}; got no {name.revision}; check it") from None
    except errors.HFValidationError:
        raise UserError(f"{where}: {GRAMMAR}; got {name}; check the name") from None
    except Exception as error:  # transport, proxy, TLS, a full disk: each library below has its own
        offline = " with HF_HUB_OFFLINE set" if isinstance(error, errors.OfflineModeIsEnabled) else ""
        status = getattr(getattr(error, "response", None), "status_code", None)
        got = f"{type(error).__name__}{f' {status}' if status else ''}{offline}"
        raise UserError(
            f"{where}: a hub within reach, or {name} in its cache; got {got}; set HF_ENDPOINT to a hub that you reach, or fill "
            "HF_HOME on a machine with network, copy it here and set HF_HUB_OFFLINE=1, or give a local path"
        ) from error
