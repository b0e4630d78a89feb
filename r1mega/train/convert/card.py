"""The model card of an exported checkpoint: what it is, from which data and config, after whom, with which figures.

In: a checkpoint of a run, whose folder holds config.yaml, environment.json and metrics.jsonl. Out: Markdown with the front matter
that hubs read. What a folder does not hold is left out, never guessed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

SHOWN = ("step", "tokens", "loss", "lm_loss", "mtp_loss", "valid_loss", "reward", "accuracy", "grad_norm", "lr", "mfu")
"""Figures of a metric line that stand in a card, where the run has them."""


def text(source: Any, config: dict[str, Any], ledger: dict[str, Any]) -> str:
    """The card of a native ``source``. ``config``: the published one; ``ledger``: of the conversion."""
    state, run = source.state, _run_of(source.path)
    rows = [
        ("Architecture", f"{config['architectures'][0]}: {source.model.num_layers} layers, {source.model.num_experts} experts"),
        ("Written by", f"`r1mega {state.get('command', '?')}`, step {state['step']}, {state['tokens']:,} tokens"),
        ("Checkpoint", f"`{source.path.name}`, sha256 of its manifest `{ledger['source']['digest']}`"),
    ]
    parts = [_front(config), f"# {_name(source, run)}\n", _table(("", ""), rows)]
    chain = state.get("lineage") or []
    if chain:
        ancestors = [
            (str(link.get("command", "?")), f"step {link.get('step', '?')}, `{str(link.get('digest'))[:12]}`") for link in chain
        ]
        parts.append(
            "## Lineage\n\nThe first ancestor stands first; `r1mega lineage` checks them.\n\n"
            + _table(("by", "checkpoint"), ancestors)
        )
    if run is not None:
        parts += [part for part in (_data(run), _metrics(run, state), _config(run)) if part]
    ours = "`ledger.json` names each tensor with its sha256 and where its numbers came from; `r1mega.json` names the checkpoint."
    parts.append(f"## Files\n\n{ours}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _front(config: dict[str, Any]) -> str:
    tags = ["r1mega", config["model_type"], "mixture-of-experts"]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _name(source: Any, run: Path | None) -> str:
    return f"{run.name if run else source.path.name}, step {source.state['step']}"


def _run_of(checkpoint: Path) -> Path | None:
    """The run's folder, where the checkpoint lies in one."""
    run = checkpoint.resolve().parent.parent
    return run if checkpoint.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def _data(run: Path) -> str:
    """The inputs that the newest start of the run recorded."""
    try:
        starts = json.loads((run / "environment.json").read_text())
        starts = starts["starts"] if isinstance(starts, dict) else starts
        inputs = starts[-1]["inputs"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""
    rows = []
    for key, held in sorted(inputs.items()):
        for path, identity in held.items() if isinstance(held, dict) else ():
            found = identity.get("sha256") or identity.get("digest") or "" if isinstance(identity, dict) else ""
            rows.append((f"`{key}`", f"`{Path(path).name}`" + (f" `{str(found)[:12]}`" if found else "")))
    return "## Data\n\n" + _table(("key", "input"), rows) if rows else ""


def _metrics(run: Path, state: dict[str, Any]) -> str:
    """The newest metric line that is not after the checkpoint."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.strip()]
    except (OSError, ValueError):
        return ""
    there = [line for line in lines if isinstance(line.get("step", line.get("rollout")), int)]
    there = [line for line in there if line.get("step", line.get("update", 0)) <= state["step"]]
    if not there:
        return ""
    found: dict[str, Any] = {}
    for line in there:
        found |= {name: value for name, value in line.items() if name in SHOWN and isinstance(value, int | float)}
    rows = [(name, f"{found[name]:,}" if isinstance(found[name], int) else f"{found[name]:.6g}") for name in SHOWN if name in found]
    return "## Metrics\n\n" + _table(("at this checkpoint", ""), rows)


def _config(run: Path) -> str:
    try:
        held = (run / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return ""
    return f"## Config\n\n```yaml\n{held.strip()}\n```"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)]
    return "\n".join(lines)
