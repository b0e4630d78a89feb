"""The end of a conversion: all that is not weights, the manifest or index, and the one rename by which the target appears.

In: what was written and its ledger, in the unfinished folder. Out: a published checkpoint that stock code loads, or a native one
that ``init=`` takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.data.tokenizer import copy_tokenizer, load_tokenizer
from r1mega.model.names import SCALE
from r1mega.model.published import published_config
from r1mega.train import lineage, manifest
from r1mega.train.convert import card
from r1mega.train.convert.disk import sync
from r1mega.train.convert.native import Chunk, write_metadata
from r1mega.train.convert.shards import write_index
from r1mega.train.convert.sources import KEPT_DERIVED, LEDGER, OWN, SCALES, STATED, PublishedSource, read_json

DTYPE = {name: dtype for dtype, name in STATED.items()}
"""Safetensors' dtypes to a config's."""
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
"""DeepSeek-R1's."""


def identity_of(place: Path) -> str | None:
    """Which conversion wrote a finished target; None where none did."""
    for file in (place / LEDGER, place / OWN / LEDGER):
        if file.is_file():
            try:
                return json.loads(file.read_text())["identity"]
            except (ValueError, KeyError, TypeError):
                return None
    return None


def ledger_of(place: Path) -> dict[str, Any]:
    """The ledger of a finished target. Raises UserError without one."""
    return read_json(next((file for file in (place / LEDGER, place / OWN / LEDGER) if file.is_file()), place / LEDGER))


def summary(place: Path) -> dict[str, int]:
    """Numbers of a finished target: tensors, parameters (scales and repetitions are none), bytes of its weights."""
    target = ledger_of(place)["target"]
    return {
        "tensors": len(target["tensors"]),
        "parameters": target["parameters"],
        "bytes": sum(file["bytes"] for file in target["files"].values()),
    }


def mend(place: Path) -> None:
    """End what a killed publication left between its renames."""
    old = place.with_name(f".{place.name}.old")
    if old.is_dir() and not place.exists():
        old.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    if identity_of(place) is not None:
        shutil.rmtree(place / "journal", ignore_errors=True)


def strangers(place: Path) -> list[str] | None:
    """Files in a finished target that its conversion did not write; None where none wrote it."""
    if identity_of(place) is None:
        return None
    known = set(ledger_of(place).get("files", ()))
    here = (path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir())
    return sorted(name for name in here if name not in known and not name.startswith("journal/"))


def publish(source, target, ledger: dict[str, Any], journal: list[dict[str, Any]], aside: Path, place: Path) -> None:
    """Write the rest into ``aside``, flush it, and let it appear as ``place``. The journal goes last: until then all can go on."""
    if target.format == "native":
        _native(source, target, ledger, journal, aside, place)
    else:
        _published(source, target, ledger, aside, place)
    for folder in (*(path for path in aside.rglob("*") if path.is_dir()), aside):
        sync(folder)
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        place.rename(old)
    aside.rename(place)
    sync(place.parent)
    shutil.rmtree(place / "journal")
    shutil.rmtree(old, ignore_errors=True)


def _files(aside: Path, *later: str) -> list[str]:
    """All that a conversion has written so far, and what it writes ``later``."""
    here = (path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
    return sorted({*(name for name in here if not name.startswith("journal/")), *later})


def _native(
    source: PublishedSource, target, ledger: dict[str, Any], journal: list[dict[str, Any]], aside: Path, place: Path
) -> None:
    from safetensors.torch import save_file

    chunks = [(entry["file"], Chunk(**chunk)) for entry in journal for chunk in entry["chunks"]]
    write_metadata(aside / "weights", target.shapes, chunks)
    own = aside / OWN
    own.mkdir(exist_ok=True)
    _copy_small(source, own)
    scales = [name for name in source.tensor_names if name.endswith(SCALE)]
    if scales:
        save_file({name: source.folder.read(name) for name in sorted(scales)}, own / SCALES, {"format": "pt"})
    if source.derived:
        save_file({name: source.folder.read(name) for name in source.derived}, own / KEPT_DERIVED, {"format": "pt"})
    if (source.path / "tokenizer.json").is_file():
        copy_tokenizer(source.path, aside / "tokenizer")
    state = {"step": 0, "tokens": 0, "cursor": {}, "extra": {}, "model": asdict(target.model), "degrees": {}}
    state["dtype"] = DTYPE[target.dtype]
    state |= lineage.converted(source.path, place, place.name, _digest(ledger["source"]["tensors"]))
    (aside / "state.json").write_text(json.dumps(state, indent=1))
    ledger["files"] = _files(aside, f"{OWN}/{LEDGER}", manifest.MANIFEST)
    _write_ledger(own / LEDGER, ledger)
    entries = {f"weights/{entry['file']}": {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in journal}
    for path in sorted(path for path in aside.rglob("*") if path.is_file()):
        name = path.relative_to(aside).as_posix()
        if name not in entries and not name.startswith("journal/") and name != manifest.MANIFEST:
            entries[name] = _flushed(path)
    manifest.write(aside, entries)


def _published(source, target, ledger: dict[str, Any], aside: Path, place: Path) -> None:
    tensors = ledger["target"]["tensors"]
    where = {name: entry["file"] for name, entry in tensors.items()}
    if len(set(where.values())) > 1 or "model.safetensors" not in where.values():
        total = sum(item.num_bytes for unit in target.units for item in unit.items)
        write_index(aside, where, total)
    _copy_small(source, aside)
    config = _config(source, target)
    if not (aside / "config.json").is_file() or read_json(aside / "config.json") != config:
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dtype = "fp8" if target.fp8 else DTYPE[target.stated]
    if source.format == "hf":
        record = lineage.recoded(source.path, place, dtype, _digest(ledger["source"]["tensors"]), _digest(tensors))
    else:
        record = lineage.exported(source.path, place, dtype, _digest(tensors))
    (aside / lineage.RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if source.format == "native":
        if (source.path / "tokenizer").is_dir() and not (aside / "tokenizer.json").is_file():
            copy_tokenizer(source.path / "tokenizer", aside)
        if not (aside / "generation_config.json").is_file():
            ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
            (aside / "generation_config.json").write_text(json.dumps(ends | GENERATION, indent=1) + "\n")
        if source.state.get("command") != "convert":
            (aside / "README.md").write_text(card.text(source, config, ledger), encoding="utf-8")
    ledger["files"] = _files(aside, LEDGER)
    _write_ledger(aside / LEDGER, ledger)
    for path in aside.rglob("*"):
        if path.is_file() and path.name not in ledger["target"]["files"]:
            _flushed(path)


def _config(source, target) -> dict[str, Any]:
    """``config.json`` of what is written: the source's own with its dtype changed, or ours."""
    dtype = DTYPE[target.stated]
    if source.format == "hf" or (source.own / "config.json").is_file():
        config = dict(source.config if source.format == "hf" else read_json(source.own / "config.json"))
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
    else:
        folder = source.path / "tokenizer"
        tokenizer = load_tokenizer(folder) if folder.is_dir() else None
        ids = {f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
        config = published_config(source.model, **ids, dtype=dtype)
    held = config.pop("quantization_config", None)
    if target.fp8:
        made = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
        made = held if held and target.keep_scales else made | ({"scale_fmt": "ue8m0"} if target.ue8m0 else {})
        config["quantization_config"] = made
    return config


def _digest(tensors: dict[str, Any]) -> str:
    """A published checkpoint's identity, from a ledger's side of it."""
    return manifest.tensors_digest((name, entry["dtype"], entry["shape"], entry["sha256"]) for name, entry in tensors.items())


def _copy_small(source, folder: Path) -> None:
    base = source.path if source.format == "hf" else source.own
    for path in source.small_files():
        copy = folder / path.relative_to(base)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _write_ledger(path: Path, ledger: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(ledger, file, indent=1)


def _flushed(path: Path) -> dict[str, Any]:
    """Put a file on the disk; its entry in the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_files(place: Path, *, hashes: bool) -> None:
    """Raise UserError where a file of a finished target is missing or has another size, or content, than its ledger says."""
    way = "remove the folder and run the same command"
    for name, entry in ledger_of(place)["target"]["files"].items():
        path = place / "weights" / name if name.endswith(".distcp") else place / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise UserError(f"target {place}: {name} has {entry['bytes']} bytes; got {got}; {way}")
        if hashes and _flushed(path)["sha256"] != entry["sha256"]:
            raise UserError(f"target {place}: {name} has its ledger's hash; got other content; {way}")
