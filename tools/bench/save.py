"""What saving costs the training thread: a run without checkpoints, one that saves beside the training, one that stands still.

    python tools/bench/save.py device=cuda model=small steps=60 save_every=20 batch=32 micro=8 length=4096 rounds=1

Side by side in one process on one disk, in another order each round. Prints a table and then one JSON object: the share of the time
between saves that the training thread stood still (``save_stall_seconds`` over it), of the first save alone (host memory is
taken then) and of the later ones, and the step's time beside a write and without. ``out=DIR`` chooses the disk, ``modes=async``
one of the three runs.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from r1mega.api import pretrain
from r1mega.data.tokenfile import TokenFileWriter

DEFAULTS = {
    "device": "cpu", "model": "tiny", "steps": 12, "save_every": 4, "batch": 8, "micro": 4, "length": 128, "rounds": 2, "out": "",
    "modes": "none,async,sync",
}  # fmt: skip


def tokens(folder: Path, length: int) -> Path:
    """A token file of random numbers."""
    rng = np.random.default_rng(1)
    with TokenFileWriter(folder / "text", vocab_size=256, eos_id=0, tokenizer_hash="none") as out:
        for _ in range(64):
            out.add(rng.integers(1, 256, 4 * length).tolist())
    return folder / "text"


def run(sizes: dict[str, Any], folder: Path, text: Path, mode: str) -> dict[str, float]:
    """One training; seconds of wall time, of stall, of steps."""
    shutil.rmtree(folder / mode, ignore_errors=True)
    every = 0 if mode == "none" else sizes["save_every"]
    dtype = "fp32" if sizes["device"] == "cpu" else "bf16"
    began = time.perf_counter()
    result = pretrain(
        f"model={sizes['model']}", f"device={sizes['device']}", f"precision={dtype}", f"out={folder / mode}",
        f"data.train={{{text}: 1}}", f"data.sequence_length={sizes['length']}", f"trainer.steps={sizes['steps']}",
        f"trainer.global_batch_size={sizes['batch']}", f"trainer.micro_batch_size={sizes['micro']}", f"trainer.save_every={every}",
        f"trainer.async_save={str(mode != 'sync').lower()}", "trainer.log_every=1", "trainer.keep_last=1", "trainer.peak_tflops=1",
        "optim.warmup_steps=0",
    )  # fmt: skip
    wall = time.perf_counter() - began
    lines = [json.loads(line) for line in (folder / mode / "metrics.jsonl").read_text().splitlines()]
    lines = lines[1:]  # the first step compiles and allocates
    stalls = [line.get("save_stall_seconds", 0.0) for line in lines]
    saved = [at for at, line in enumerate(lines) if every and line["step"] % every == 0 and line["step"] < sizes["steps"]]
    # from one save to just before the next: what it cost, over how long that took
    ends = [*saved[1:], len(lines) - 1][: len(saved)]
    shares = [
        sum(stalls[at:end]) / sum(line["step_seconds"] + stall for line, stall in zip(lines[at:end], stalls[at:end], strict=True))
        for at, end in zip(saved, ends, strict=True)
        if end > at
    ]
    steps = [line["step_seconds"] for line in lines]
    size = sum(file.stat().st_size for file in (folder / mode / "checkpoints").rglob("*.distcp")) / 2**30
    return {
        "wall_seconds": wall,
        "stall_seconds": result["save_stall_seconds"],
        "first_share": shares[0] if shares else 0.0,
        "later_share": statistics.mean(shares[1:]) if shares[1:] else 0.0,
        "step_seconds": statistics.median(steps),
        "slowest_step_seconds": max(steps),
        "checkpoint_gib": size,
    }


def main(arguments: list[str]) -> None:
    """``key=value`` arguments over the defaults."""
    sizes: dict[str, Any] = dict(DEFAULTS)
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key not in sizes:
            sys.exit(f"save.py: one of {', '.join(sizes)}; got {key}; write key=value")
        sizes[key] = type(sizes[key])(value)
    with tempfile.TemporaryDirectory(dir=sizes["out"] or None, prefix="bench-save-") as place:
        modes = sizes["modes"].split(",")
        folder, found = Path(place), {mode: [] for mode in modes}
        text, order = tokens(folder, sizes["length"]), random.Random(1)
        for _ in range(sizes["rounds"]):
            for mode in order.sample(modes, len(modes)):
                found[mode].append(run(sizes, folder, text, mode))
    names = list(found[modes[0]][0])
    medians = {mode: {name: statistics.median(one[name] for one in runs) for name in names} for mode, runs in found.items()}
    print("  ".join(["mode ", *names]))
    for mode in modes:
        print("  ".join([f"{mode:<5}", *(f"{medians[mode][name]:>{len(name)}.4f}" for name in names)]))
    print(json.dumps({"sizes": sizes, "median": medians, "runs": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
