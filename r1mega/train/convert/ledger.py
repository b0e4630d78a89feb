"""The ledger of a conversion: each tensor of the source and where it went, each of the target and where it came from.

In: the journal of the files written. Out: a JSON object, or UserError naming what was not read, not written, or read twice alike.
"""

from __future__ import annotations

import math
from typing import Any

from r1mega.config.errors import UserError
from r1mega.train.convert.sources import OWN, told


def account(source, target, journal: list[dict[str, Any]], *, allow_equal: bool) -> dict[str, Any]:
    """Balance the books. ``source``, ``target``: as opened and planned; ``journal``: what each file's writer kept."""
    read: dict[str, dict[str, Any]] = {}
    written: dict[str, dict[str, Any]] = {}
    for entry in journal:
        for name, record in entry["read"].items():
            earlier = read.setdefault(name, {**record, "to": []})
            if earlier["sha256"] != record["sha256"]:
                raise UserError(f"source {source.path}: stays as it is while it is read; got another {name}; convert again")
        for name, record in entry["written"].items():
            if name in written:
                raise UserError(f"target: each tensor is written once; got {name} twice; this is a defect of r1mega, report it")
            written[name] = record
            for origin in record["from"]:
                read[origin]["to"].append(name)
    for name in source.derived if target.format == "native" else ():  # kept beside the weights, in no file of them
        read |= {
            origin: {**record, "to": [f"{OWN}/derived.safetensors"]} for origin, record in source.read_derived(name)[1].items()
        }
    _complete(source, target, read, written)
    _copies(source, read)
    if not allow_equal:
        _no_twins(source, read)
    files = {entry["file"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in journal}
    return {
        "source": {"format": source.format, "path": str(source.path.resolve()), "digest": source.digest(), "tensors": read},
        "target": {
            "format": target.format,
            "parameters": sum(math.prod(part.shape) for part in source.parts if not part.copy),
            "files": files,
            "tensors": written,
        },
    }


def _complete(source, target, read: dict[str, Any], written: dict[str, Any]) -> None:
    """Nothing unread, nothing unwritten, and nothing read in vain."""
    unread = sorted(source.tensor_names - read.keys())
    if unread:
        raise UserError(
            f"source {source.path}: every tensor is read; got {told(unread)} unread; this is a defect of r1mega, report it"
        )
    planned = target.tensor_names
    unwritten = sorted(planned - written.keys())
    if unwritten:
        raise UserError(f"target: every tensor is written; got no {told(unwritten)}; this is a defect of r1mega, report it")
    copies = {part.name for part in source.parts if part.copy}
    vain = sorted(name for name, record in read.items() if not record["to"] and name not in copies)
    if vain:
        raise UserError(f"source {source.path}: every tensor goes somewhere; got {told(vain)} that did not; report it")


def _copies(source, read: dict[str, Any]) -> None:
    """What a published checkpoint repeats (MTP's embedding and head, a tied head) is the same as what it repeats."""
    if source.format != "hf":
        return
    owners = {(part.key, part.start): part.name for part in source.parts if not part.copy}
    for part in source.parts:
        if part.copy:
            owner = owners[part.key, part.start]
            if read[part.name]["sha256"] != read[owner]["sha256"]:
                raise UserError(
                    f"source {source.path}: {part.name} repeats {owner}, which the model shares; got other numbers; "
                    "a checkpoint that has not shared them cannot be converted"
                )
            read[part.name]["same_as"] = owner


def _no_twins(source, read: dict[str, Any]) -> None:
    """Two experts with the very same weights are one expert written twice, or a model grown from a dense one."""
    seen: dict[str, str] = {}
    for part in source.parts:
        if part.copy or ".experts." not in part.name:
            continue
        name = source.stored_name(part)
        twin = seen.setdefault(read[name]["sha256"], part.name)
        if twin != part.name and not _is_constant(source, part):
            raise UserError(
                f"source {source.path}: experts differ; got {part.name} with the very content of {twin}; fetch it again, or use "
                "convert.allow_equal=true for a model that was grown from a dense one"
            )


def _is_constant(source, part) -> bool:
    value = source.read(part).value.float()
    return bool(value.min() == value.max())
