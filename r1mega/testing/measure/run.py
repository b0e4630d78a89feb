"""The command ``r1mega bench``: measure, print, keep, compare with the baseline.

In: BenchConfig. Out: what was measured as a dict, ``out/bench.json``, and for ops ``out/roofline.svg``. Raises Failed (exit status
1) where a figure has fallen below the baseline or an op of ours failed, after everything is printed and kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from r1mega import registry
from r1mega.config.bench import BenchConfig
from r1mega.config.errors import Failed, UserError, nearest
from r1mega.device import Device, open_device
from r1mega.testing.bench import Bench, all_benches
from r1mega.testing.measure import ceilings, clock, results, roofline
from r1mega.testing.measure.results import Row

OURS = "r1mega"
"""Our own call among the peers."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what ``config.bench`` names; returns ``{"device", "ceilings", "figures"}`` and the rows or the pass's numbers."""
    device = open_device(config.device)
    baseline = _baseline_path(config, device)
    held = results.read_baseline(baseline) if config.check else {}  # a wrong one is told before anything is measured
    chosen = _chosen(config.op) if config.bench == "ops" else []
    found = {"bench": config.bench, "device": device.hardware, "torch": torch.__version__, "date": date.today().isoformat()}
    limits = ceilings.measure(device)
    found["ceilings"] = limits
    if config.bench == "ops":
        rows = measure_ops(chosen, device, limits, config.rounds or 30, config.warmup)
        found["rows"] = [row.as_dict() for row in rows]
        print(_told(found, limits))
        print(results.table(rows))
    else:
        numbers, rows = _of_model(config, device, limits)
        found |= numbers
        print(json.dumps(numbers | {"device": device.hardware}), flush=True)
    found["figures"] = results.figures_of(rows)
    _keep(Path(config.out), found, roofline.roofline(rows, limits, f"Roofline of {device.hardware}"))
    _judge(rows, found, held, config, baseline)
    return found


def measure_ops(benches: Sequence[Bench], device: Device, limits: dict[str, float], rounds: int, warmup: int = 3) -> list[Row]:
    """Each bench and its peers, in turns, on the same inputs."""
    rows = []
    for one in benches:
        inputs = clock.rotation(one.make, device)
        times, faults = clock.medians({OURS: one.run, **one.peers}, inputs, device, rounds, warmup)
        rows.append(Row.of(one, times, faults, limits.get(one.ceiling), OURS))
        del inputs
    return rows


def _chosen(pattern: str | None) -> list[Bench]:
    found = all_benches(pattern)
    if not found:
        names = sorted({one.op for one in all_benches()})
        known = ", ".join(names) or "(none is there)"
        raise UserError(f"op: an op with a benchmark; got {pattern}; {nearest(pattern or '', names)}use one of {known}")
    return found


def _of_model(config: BenchConfig, device: Device, limits: dict[str, float]) -> tuple[dict[str, Any], list[Row]]:
    from r1mega.testing.measure.model import moe_layer, training_step, with_peer

    model, rounds = config.model, config.rounds or 10
    if config.bench == "moe":
        numbers, flops = moe_layer(config, device, rounds)
        size = f"{config.tokens} tokens{' from permute to unpermute' if config.routed_only else ''}"
    else:
        numbers, flops = training_step(config, device, rounds)
        size = f"{model.num_layers} layers, {config.microbatches} x {config.micro_batch_size} x {config.sequence_length} tokens"
    case = f"{model.name}, {model.num_experts} experts, {size}, {numbers['precision']}"
    case += f", recompute {' '.join(config.recompute)}" if config.recompute else ""
    took = numbers["forward_backward_ms"]
    row = Row(config.bench, case, 1e3 * took, 0, round(flops), "bf16", limits.get("bf16"))
    numbers["share_of_bf16_product"] = None if row.share is None else float(f"{row.share:.4g}")
    return with_peer(config, device, rounds, numbers) if config.peer else numbers, [row]


def _told(found: dict[str, Any], limits: dict[str, float]) -> str:
    rates = [f"{name} {rate / ceilings.UNITS[name][1]:,.4g} {ceilings.UNITS[name][0]}" for name, rate in limits.items()]
    return f"{found['device']}, torch {found['torch']}; ceilings: {', '.join(rates)}"


def _keep(out: Path, found: dict[str, Any], picture: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if picture:
        (out / "roofline.svg").write_text(picture, encoding="utf-8")


def _baseline_path(config: BenchConfig, device: Device) -> Path:
    if config.baseline is not None:
        return Path(config.baseline)
    tools = Path(registry.__file__).resolve().parent.parent / "tools" / "bench"
    if not tools.is_dir() and (config.check or config.write_baseline):
        raise UserError("baseline: a file, since this is no checkout with tools/bench; got null; give baseline=FILE")
    return tools / "baseline" / results.baseline_name(device.hardware)


def _judge(rows: Sequence[Row], found: dict[str, Any], held: dict[str, float], config: BenchConfig, baseline: Path) -> None:
    """Raise Failed, a line a fault; without one the figures go to the baseline where that is wanted."""
    lines = [f"{row.name}: failed: {row.fault}" for row in rows if row.fault]
    fallen = results.regressions(found["figures"], held, config.tolerance) if config.check else []
    known = [name for name in found["figures"] if name in held]
    if config.check and not known:
        lines.append(f"check: a figure that {baseline} has too; got {', '.join(found['figures']) or 'none'}; measure what it has")
    elif config.check and not fallen:
        print(f"none of {len(known)} figures has fallen by more than {100 * config.tolerance:g}% of {baseline}")
    if lines or fallen:
        raise Failed("\n".join(lines + fallen))
    if config.write_baseline:
        about = {name: found[name] for name in ("device", "torch", "date")}
        results.write_baseline(baseline, found["figures"], about)
        print(f"kept {len(found['figures'])} figures in {baseline}")
