"""What a push costs: seconds and GB/s of each way to a real SGLang server, with the proof and without.

    python tools/bench/push.py device=cuda model=moonlight_16b ways=tensor,distributed rounds=3 url=http://127.0.0.1:30000
    python tools/bench/push.py model=tiny python=.venv-sglang/bin/python

``url``: a server of this model's shape; empty: one is started with ``python`` and ``args`` (server arguments as name:value, apart
by commas) and random weights. The weights pushed are random, held on ``device`` in ``dtype`` and whole before the first push; a
second set of them is sent in turn where ``sets=2``, so that each push changes all that a server holds. ``backend``: of
push=distributed; two processes on one card want gloo. Also the rate of the hashes alone. Prints a table, then one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from r1mega.config.compose import preset
from r1mega.config.errors import UserError
from r1mega.device import DTYPES, fence, open_device
from r1mega.model.names import parts
from r1mega.model.published import published_config
from r1mega.registry import lookup
from r1mega.rl.engine.contract import EngineRuntime
from r1mega.rl.engine.sglang import SglangEngine
from r1mega.rl.push import PushRuntime
from r1mega.rl.push.hashing import Sha, Tiles

DEFAULTS = {
    "device": "cpu", "model": "tiny", "dtype": "", "ways": "tensor,distributed,disk", "proofs": "checksum,none", "bucket_mib": 512,
    "rounds": 3, "sets": 2, "url": "", "python": "", "args": "", "backend": "auto", "payload": "auto", "folder": "", "seed": 1,
}  # fmt: skip
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def weights(model, dtype: torch.dtype, device: torch.device, seed: int) -> list[tuple[str, torch.Tensor]]:
    """Every published tensor; copies are their owner's."""
    generator = torch.Generator(device).manual_seed(seed)
    owners: dict[Any, torch.Tensor] = {}
    made = []
    for part in parts(model):
        if (part.key, part.start) not in owners:
            kind = torch.float32 if part.role == "bias" else dtype
            owners[part.key, part.start] = torch.randn(part.shape, dtype=kind, device=device, generator=generator) * model.init_std
        made.append((part.name, owners[part.key, part.start]))
    return made


def hash_rate(kind: type, device: torch.device) -> float:
    """GB/s of one hash over pieces of an expert's size."""
    x = torch.randn(16, 1408, 2048, device=device).bfloat16()
    best = float("inf")
    for _ in range(3):
        began, size = time.perf_counter(), 2 * x[0].numel()
        taken = kind(2 * x.numel(), device)
        for at, piece in enumerate(x):
            taken.put(at * size, piece)
        taken.hex()
        fence(device)
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() / best / 1e9


def main(arguments: list[str]) -> None:
    """``key=value`` arguments over the defaults."""
    options: dict[str, Any] = dict(DEFAULTS)
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key not in options:
            sys.exit(f"push.py: one of {', '.join(options)}; got {key}; write key=value")
        options[key] = type(options[key])(value)
    model, device = preset("model", options["model"]), open_device(preset("device", options["device"])).torch_device
    dtype = options["dtype"] or ("fp32" if device.type == "cpu" else "bf16")
    hf_config = published_config(model, bos_id=0, eos_id=1, pad_id=2, dtype=NAMES[dtype])
    sets = [weights(model, DTYPES[dtype], device, options["seed"] + at) for at in range(options["sets"])]
    found: dict[str, Any] = {"options": options, "hash_gbps": {kind.__name__: hash_rate(kind, device) for kind in (Sha, Tiles)}}
    with tempfile.TemporaryDirectory(dir=options["folder"] or None, prefix="bench-push-") as place:
        choice = SglangEngine(
            url=options["url"] or None,
            python=options["python"] or None,
            args={key: json.loads(value) if value[:1].isdigit() else value for key, value in _pairs(options["args"])},
        )
        engine = choice.build(EngineRuntime(hf_config, str(device), NAMES[dtype], folder=place))
        try:
            runtime = PushRuntime(SimpleNamespace(version=-1), hf_config, lambda: engine.servers, str(device), None, Path(place))
            found["pushes"] = [row for way in options["ways"].split(",") for row in measured(way, options, runtime, sets)]
        finally:
            engine.close()
    print(f"{'way':<12} {'proof':<9} {'first s':>8} {'median s':>9} {'GB/s':>7} {'GB':>7} {'buckets':>7}")
    for row in found["pushes"]:
        print(
            f"{row['way']:<12} {row['proof']:<9} {row['first_seconds']:>8.3f} {row['seconds']:>9.3f} {row['gbps']:>7.2f} "
            f"{row['gigabytes']:>7.2f} {row['buckets']:>7}"
        )
    print(json.dumps(found))


def _pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(part.split(":", 1)) for part in text.split(",") if part]


def measured(way: str, options: dict[str, Any], runtime: PushRuntime, sets: list) -> list[dict[str, Any]]:
    """One row a proof: ``rounds`` pushes after a first one, which finds out what the server holds and makes groups and memory."""
    rows, own = [], {"distributed": {"backend": options["backend"]}, "tensor": {"payload": options["payload"]}}
    for proof in options["proofs"].split(","):
        push = lookup("push", way)(bucket_bytes=options["bucket_mib"] << 20, proof=proof, **own.get(way, {})).build(runtime)
        try:
            reports = [push.send(sets[at % len(sets)], at + 1) for at in range(1 + options["rounds"])]
        except UserError as error:
            sys.exit(f"push.py: {way}, proof {proof}: {error}")
        finally:
            push.close()
        seconds = statistics.median(report.seconds for report in reports[1:])
        rows.append({
            "way": way, "proof": proof, "first_seconds": reports[0].seconds, "seconds": seconds,
            "proof_seconds": statistics.median(report.proof_seconds for report in reports[1:]),
            "gigabytes": reports[0].num_bytes / 1e9, "gbps": reports[0].num_bytes / seconds / 1e9, "buckets": reports[0].buckets,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
