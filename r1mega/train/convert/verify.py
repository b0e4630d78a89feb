"""A conversion looked at again: both sides read anew, every tensor compared, and the same logits from both.

In: source and finished target. Out: counts and differences; UserError that names the first tensor that is not what it should be.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r1mega.config.convert import ConvertConfig
from r1mega.config.errors import UserError
from r1mega.model.names import Part
from r1mega.train.convert import finish, fp8
from r1mega.train.convert.shards import TORCH
from r1mega.train.convert.sources import NativeSource, Piece, open_source

TOLERANCE = 1e-4
"""Of fp32 logits, against transformers, relative to the largest of them where that is above 1."""
PROBES, PROBE_TOKENS = 2, 24


def verify(source: Path, place: Path, config: ConvertConfig) -> dict[str, Any]:
    """Compare a finished target with its source. Returns tensors compared, seconds, and what the probe found."""
    began = time.perf_counter()
    finish.check_files(place, hashes=False)
    ledger = finish.ledger_of(place)
    left, right = open_source(source, allow_mixed=config.convert.allow_mixed), open_source(place, allow_mixed=True)
    held = {part.name: part for part in right.parts}
    compared = 0
    for part in left.parts:
        theirs = held.get(part.name)
        if theirs is None:
            raise UserError(f"target {place}: holds {part.name}; got none; convert again")
        ours, found = left.read(part), right.read(theirs)
        _check_records(ledger["source"]["tensors"], ours.records, f"source {source}")
        _check_records(ledger["target"]["tensors"], found.records, f"target {place}")
        _check_numbers(part, ours, found, place)
        compared += 1
    for name in left.derived:
        _check_records(ledger["source"]["tensors"], left.read_derived(name)[1], f"source {source}")
    result = {"tensors": compared, "seconds": time.perf_counter() - began}
    rounded = next((name for name, record in ledger["target"]["tensors"].items() if _is_rounded(record, ledger)), None)
    if rounded:
        return result | {"probe": {"skipped": f"the target's numbers are rounded, {rounded} for one, and its logits with them"}}
    return result | {"probe": probe(left, right, place, config)}


def _is_rounded(record: dict[str, Any], ledger: dict[str, Any]) -> bool:
    """True where a tensor of the target cannot have the source's exact numbers."""
    if record["how"] == "quantised":
        return True
    width = TORCH[record["dtype"]].itemsize
    return record["how"] == "cast" and any(
        TORCH[ledger["source"]["tensors"][name]["dtype"]].itemsize > width for name in record["from"]
    )


def _check_records(wanted: dict[str, Any], found: dict[str, Any], where: str) -> None:
    for name, record in found.items():
        if name not in wanted:
            raise UserError(f"{where}: {name} is in the ledger; got it in no line of it; convert again")
        if wanted[name]["sha256"] != record["sha256"]:
            raise UserError(f"{where}: {name} is what the ledger says; got other content; fetch or convert it again")


def _check_numbers(part: Part, ours: Piece, found: Piece, place: Path) -> None:
    """What was written is what the source's numbers become in its dtype."""
    if found.scale is None:
        wanted = (
            fp8.dequantise(ours.value, ours.scale, found.value.dtype)
            if ours.scale is not None
            else ours.value.to(found.value.dtype)
        )
        same = torch.equal(wanted.view(torch.uint8), found.value.view(torch.uint8))
    elif ours.scale is not None and torch.equal(ours.scale, found.scale):
        same = torch.equal(ours.value.view(torch.uint8), found.value.view(torch.uint8))
    else:
        exact = fp8.dequantise(ours.value, ours.scale, torch.float32) if ours.scale is not None else ours.value.float()
        same = torch.equal(fp8.quantise_with(exact, found.scale).view(torch.uint8), found.value.view(torch.uint8))
    if not same:
        raise UserError(f"target {place}: {part.name} has the source's numbers; got others; convert again")


def probe(left, right, place: Path, config: ConvertConfig) -> dict[str, Any]:
    """Largest difference of fp32 logits between transformers' model of the published side and ours of the native one."""
    if left.format == right.format:
        return {"skipped": "both sides are published: every tensor is compared, and there is one reader of them"}
    published, native = (left, right) if left.format == "hf" else (right, left)
    needed = 2 * 4 * sum(math.prod(part.shape) for part in published.parts)
    if needed > config.convert.probe_bytes:
        return {"skipped": f"convert.probe_bytes {config.convert.probe_bytes}; the model twice in fp32 needs {needed}"}
    with tempfile.TemporaryDirectory(prefix="probe-", dir=place.parent) as folder:
        readable = published.path
        if published.quantization:  # transformers runs FP8 on GPUs alone
            from r1mega.train.convert.run import convert

            readable, dtype = Path(folder) / "plain", "fp32" if native.state["dtype"] == "float32" else "bf16"
            plain = replace(config.convert, verify=False)
            asked = ConvertConfig(source=str(published.path), target=str(readable), format="hf", dtype=dtype, convert=plain)
            convert(asked, quiet=True)
        draw = torch.Generator().manual_seed(1)
        size = native.model.vocab_size - native.model.vocab_padding
        tokens_BS = torch.randint(0, size, (PROBES, PROBE_TOKENS), generator=draw)
        theirs, ours = _published_logits(readable, tokens_BS), _native_logits(native, tokens_BS)
    allowed = TOLERANCE * max(1.0, float(theirs.abs().max()))
    off_BS = (ours - theirs).abs().amax(-1)
    if not float(off_BS.max()) <= allowed:
        raise UserError(
            f"target {place}: logits of transformers' model within {allowed:.1e}; got a difference of {float(off_BS.max()):.2e} at "
            f"{int((off_BS > allowed).sum())} of {off_BS.numel()} positions; report it with the config.json"
        )
    return {"max_difference": float(off_BS.max()), "largest_logit": float(theirs.abs().max()), "tokens": tokens_BS.numel()}


def told(found: dict[str, Any]) -> str:
    """What a probe found, in words."""
    if "skipped" in found:
        return f"no probe of logits: {found['skipped']}"
    return f"logits of transformers and ours differ by {found['max_difference']:.1e} at most, of {found['largest_logit']:.3g}"


def _published_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # that it leaves MTP out is known
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(tokens_BS).logits


def _native_logits(source: NativeSource, tokens_BS: torch.Tensor) -> torch.Tensor:
    from types import SimpleNamespace

    from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig
    from r1mega.device import open_device
    from r1mega.mesh import close_mesh, open_mesh
    from r1mega.train.policy import Policy

    mesh = open_mesh(open_device(DeviceConfig(kind="cpu")), ParallelConfig(), LaunchConfig(), 1)
    try:
        policy = Policy(source.model, None, mesh, "fp32")
        policy.load(source.path, weights_only=True)
        return policy.score([SimpleNamespace(tokens_BS=tokens_BS)], lambda logits, batch: logits)[0]
    finally:
        close_mesh()
