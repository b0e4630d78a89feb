"""``r1mega why``: where a rollout's tokens came from, by the ledger alone; without a rollout the run's lineage and its audit.

In: a run's folder. Out: tables, or one JSON object, and the same as a dict. Headers are read of all samples, arrays only of those
that are told about. A fault (exactly once does not hold, a frame is damaged) is told last, as :class:`Failed`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1mega.config.compose import load_config
from r1mega.config.errors import Failed, UserError
from r1mega.config.tools import WhyConfig
from r1mega.report.samples import DROPPED, USED, VOID, WAITING, Seen, seen
from r1mega.report.tables import table
from r1mega.rl.ledger import FOLDER, Frame, History
from r1mega.train import manifest


def why(cfg: WhyConfig) -> dict[str, Any]:
    """Print what is asked for and return it. Raises UserError where the run has no ledger, rollout or sample of that name, and
    Failed, at the end, for what is wrong in the ledger."""
    run = Path(cfg.run)
    history = History(run / FOLDER)
    samples = seen(history)
    if cfg.sample is not None:
        told, text = _sample(run, samples, cfg.sample)
    elif cfg.step is not None:
        told, text = _rollout(run, history, samples, cfg.step)
    else:
        told, text = _lineage(run, history, samples)
    print(json.dumps(told, indent=1, ensure_ascii=False) if cfg.json else text, flush=True)
    if told["faults"]:
        raise Failed("\n".join(f"{run / FOLDER}: {fault}" for fault in told["faults"]))
    return told


# One rollout.


def _rollout(run: Path, history: History, samples: Sequence[Seen], number: int) -> tuple[dict[str, Any], str]:
    uses = history.uses()
    frames = [frame for frame in uses.get(number, ()) if frame.kind == "use"]
    if not frames:
        last = max((rollout for rollout, found in uses.items() if any(frame.kind == "use" for frame in found)), default=0)
        there = f"use step=1 to {last}" if last else "it has none yet"
        raise UserError(f"step: a rollout that {run} was trained on; got {number}; {there}")
    names = [name for frame in frames for name in frame.values["samples"]]
    mine = {one.frame.id: one for one in samples if one.fate == USED and one.rollout == number}
    rows = [_row(mine[name]) for name in names if name in mine]
    faults = [f"rollout {number} used sample {name}, which is not in the ledger" for name in names if name not in mine]
    faults += [row["damage"] for row in rows if row["damage"]]
    updates = sorted({row["update"] for row in rows if row["update"] is not None})
    before = (updates[0] if updates else frames[0].values["update"]) - 1
    dropped = [one for one in samples if one.fate == DROPPED and one.rollout == number]
    left_out = [frame for frame in uses[number] if frame.kind == "drop"]
    told = {
        "rollout": number,
        "update": frames[0].values["update"],
        "updates": updates,
        "time": max((frame.values.get("time", 0.0) for frame in frames), default=0.0),
        "seconds": frames[0].values.get("seconds", {}),
        "questions": sum(len(frame.values["items"]) for frame in frames),
        "tokens": sum(row["tokens"] for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "staleness_tokens": _staleness(rows, before),
        "sources": _sources(rows),
        "finish_reasons": dict(Counter(row["finish_reason"] for row in rows)),
        "failures": dict(
            Counter(f"{name}: {one['failure']}" for row in rows for name, one in row["rewards"].items() if one["failure"])
        ),
        "dropped": {
            reason: {
                "questions": sum(len(frame.values["items"]) for frame in left_out if frame.values["reason"] == reason),
                "samples": sum(one.reason == reason for one in dropped),
            }
            for reason in dict.fromkeys(frame.values["reason"] for frame in left_out)
        },
        "samples": rows,
        "faults": faults,
    }
    return told, _rollout_text(run, told)


def _row(one: Seen) -> dict[str, Any]:
    """A sample as a flat record. ``damage``: why its arrays cannot be read, or ""."""
    values, damage, logprobs = one.values, "", {}
    try:
        logprobs = _logprobs(one.frame)
    except UserError as error:
        damage = str(error)
    return {
        "sample": one.frame.id,
        **{key: values[key] for key in ("item", "member", "problem", "source", "prompt_sha256")},
        "prompt_tokens": one.num_prompt_tokens,
        "tokens": one.num_tokens,
        **{key: values[key] for key in ("finish_reason", "versions", "turns")},
        "rewards": {name: asdict(said) for name, said in one.rewards.items()},
        "environment_reward": values["environment_reward"],
        "reward": values["reward"],
        "advantage": one.advantage,
        "update": one.update,
        "logprobs": logprobs,
        "routing_sha256": values["routing_sha256"],
        **{key: values[key] for key in ("began", "generated", "judged")},
        "used": one.ended,
        "damage": damage,
    }


def _logprobs(frame: Frame) -> dict[str, float | int]:
    """Of the tokens that the policy drew, as the engine gave them: how many, mean, smallest and its place in the response."""
    arrays = frame.arrays()
    values, own = arrays["logprobs"], arrays.get("own")
    places = own.nonzero()[0] if own is not None else range(len(values))
    drawn = values[places] if own is not None else values
    if not len(drawn):
        return {"count": 0}
    lowest = int(drawn.argmin())
    mean = float(drawn.mean(dtype="float64"))
    return {"count": len(drawn), "mean": mean, "min": float(drawn[lowest]), "min_place": int(places[lowest])}


def _staleness(rows: Sequence[Mapping[str, Any]], before: int) -> dict[str, int]:
    """Updates between the weights that drew a token and those before the rollout's first update, to how many tokens."""
    found: Counter[int] = Counter()
    for row in rows:
        for version, start, end in row["versions"]:
            found[before - version] += end - start
    return {str(stale): found[stale] for stale in sorted(found)}


def _sources(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for source in sorted({row["source"] for row in rows}):
        mine = [row for row in rows if row["source"] == source]
        found[source] = {
            "samples": len(mine),
            "questions": len({row["item"] for row in mine}),
            "tokens": sum(row["tokens"] for row in mine),
            "reward": sum(row["reward"] for row in mine) / len(mine),
        }
    return found


def _rollout_text(run: Path, told: Mapping[str, Any]) -> str:
    updates, rows = told["updates"], told["samples"]
    span = f"updates {updates[0]} to {updates[-1]}" if len(updates) > 1 else f"update {updates[0] if updates else told['update']}"
    lines = [
        f"rollout {told['rollout']} of {run}: {span}, {_count(len(rows), 'sample')} of {_count(told['questions'], 'question')}, "
        f"{told['prompt_tokens']:,} prompt and {told['tokens']:,} response tokens, trained on {_when(told['time'])}",
        "",
        table(
            [
                ["source", "questions", "samples", "tokens", "mean reward"],
                *(
                    [name, str(one["questions"]), str(one["samples"]), f"{one['tokens']:,}", f"{one['reward']:.4g}"]
                    for name, one in told["sources"].items()
                ),
            ]
        ),
        "",
        "updates behind   "
        + ", ".join(f"{stale}: {_count(tokens, 'token')}" for stale, tokens in told["staleness_tokens"].items()),
        "ended by         " + ", ".join(f"{name}: {count}" for name, count in told["finish_reasons"].items()),
    ]
    if told["seconds"]:
        lines.append("seconds          " + ", ".join(f"{name} {value:.3g}" for name, value in told["seconds"].items()))
    if told["failures"]:
        lines.append("failed rewards   " + ", ".join(f"{name} ({count})" for name, count in told["failures"].items()))
    dropped = [
        f"{_count(one['questions'], 'question')} with {_count(one['samples'], 'sample')} ({reason})"
        for reason, one in told["dropped"].items()
    ]
    lines.append("dropped          " + (", ".join(dropped) or "none"))
    heads = ["sample", "question", "problem", "source", "prompt", "tokens", "end", "weights", "update", "reward", "advantage"]
    heads += ["log p", "least", "routing"]
    return "\n".join([*lines, "", table([heads, *(_cells(row) for row in rows)])])


def _cells(row: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, one in row["rewards"].items():
        said = one["failure"] or one["note"]
        parts.append(f"{name} {one['value']:.4g}{f' ({said})' if said else ''}")
    parts += [f"environment {row['environment_reward']:.4g}"] if row["environment_reward"] else []
    stats = row["logprobs"]
    return [
        row["sample"],
        f"{row['item']}.{row['member']}",
        row["problem"],
        row["source"],
        row["prompt_sha256"],
        f"{row['prompt_tokens']}+{row['tokens']}",
        row["finish_reason"],
        _spans(row["versions"]),
        "-" if row["update"] is None else str(row["update"]),
        f"{row['reward']:.4g} = {' + '.join(parts) or 'nothing'}",
        "-" if row["advantage"] is None else f"{row['advantage']:+.4g}",
        f"{stats['mean']:.4g}" if "mean" in stats else "damaged" if row["damage"] else "-",
        f"{stats['min']:.4g}" if "min" in stats else "-",
        row["routing_sha256"] or "-",
    ]


def _spans(versions: Sequence[Sequence[int]]) -> str:
    """``4`` of one version, ``4:0-17 6:17-40`` of several."""
    if len(versions) == 1:
        return str(versions[0][0])
    return " ".join(f"{version}:{start}-{end}" for version, start, end in versions) or "-"


# One sample.


def _sample(run: Path, samples: Sequence[Seen], name: str) -> tuple[dict[str, Any], str]:
    one = next((one for one in samples if one.frame.id == name), None)
    if one is None:
        some = ", ".join(one.frame.id for one in samples[-3:]) or "none yet"
        raise UserError(f"sample: the id of a sample in {run / FOLDER}; got {name!r}; step=N lists them, for example {some}")
    row = _row(one)
    told = {**row, "fate": one.fate, "rollout": one.rollout, "reason": one.reason, "prompt": None, "response": None}
    told["faults"] = [row["damage"]] if row["damage"] else []
    tail = ["", f"damaged: {row['damage']}"]
    if not row["damage"]:
        arrays = one.frame.arrays()
        told |= {"prompt_ids": arrays["prompt"].tolist(), "token_ids": arrays["tokens"].tolist()}
        told["token_logprobs"] = arrays["logprobs"].tolist()
        tokenizer, missing = _tokenizer(run)
        if tokenizer is None:
            tail = ["", f"token ids, since {missing}", f"prompt: {told['prompt_ids']}", f"response: {told['token_ids']}"]
        else:
            told["prompt"], told["response"] = (
                tokenizer.decode(told[key], skip_special=False) for key in ("prompt_ids", "token_ids")
            )
            tail = ["", "prompt", told["prompt"], "", "response", told["response"]]
    pairs = [
        ("sample", f"{name}: {_fate(one)}"),
        ("problem", f"{row['problem']} of {row['source']}, question {row['item']}, response {row['member']}"),
        ("prompt", f"{_count(row['prompt_tokens'], 'token')}, sha256 {row['prompt_sha256']}"),
        ("response", f"{_count(row['tokens'], 'token')} in {_count(row['turns'], 'turn')}, ended by {row['finish_reason']}"),
        ("weights", " ".join(f"{version}:{start}-{end}" for version, start, end in row["versions"]) or "-"),
        ("rewards", _cells(row)[9]),
        ("log p", ", ".join(f"{key} {value:.4g}" for key, value in row["logprobs"].items()) or "-"),
        ("routing", row["routing_sha256"] or "not told by the engine"),
        ("began", _when(row["began"])),
        ("took", f"{row['generated'] - row['began']:.3g} s to generate, {row['judged'] - row['generated']:.3g} s to judge"),
    ]
    return told, "\n".join([*(f"{key:<10}{value}" for key, value in pairs), *tail])


def _fate(one: Seen) -> str:
    if one.fate == USED:
        update = "" if one.update is None else f", update {one.update}"
        return f"used by rollout {one.rollout}{update}, advantage {one.advantage:+.4g}"
    if one.fate == DROPPED:
        return f"dropped in rollout {one.rollout} ({one.reason})"
    return "not used yet" if one.fate == WAITING else "void: the run went back behind it"


def _tokenizer(run: Path) -> tuple[Any, str]:
    """The tokenizer of the run's newest checkpoint, else of what it started from; or None and why."""
    from r1mega.data.tokenizer import load_tokenizer

    try:
        held = manifest.latest_readable(run / "checkpoints") or manifest.resolve(load_config(run).init)
        return load_tokenizer(manifest.tokenizer_of(held)), ""
    except UserError as error:
        return None, str(error)


# The lineage.


def _lineage(run: Path, history: History, samples: Sequence[Seen]) -> tuple[dict[str, Any], str]:
    uses, fates = history.uses(), Counter(one.fate for one in samples)
    rollouts = []
    for number in sorted(uses):
        frames = [frame for frame in uses[number] if frame.kind == "use"]
        drops = [frame for frame in uses[number] if frame.kind == "drop"]
        if frames:
            rollouts.append(
                {
                    "rollout": number,
                    "update": frames[0].values["update"],
                    "start": frames[0].start,
                    "questions": sum(len(frame.values["items"]) for frame in frames),
                    "samples": sum(len(frame.values["samples"]) for frame in frames),
                    "dropped_questions": sum(len(frame.values["items"]) for frame in drops),
                    "time": max(frame.values.get("time", 0.0) for frame in frames),
                }
            )
    reasons = Counter(one.reason for one in samples if one.fate == DROPPED)
    told = {
        "run": str(run),
        "starts": _starts(history),
        "rollouts": rollouts,
        "samples": {fate: fates.get(fate, 0) for fate in (USED, DROPPED, WAITING, VOID)},
        "dropped": dict(reasons),
        "faults": history.audit(),
    }
    starts = [
        [
            str(one["start"]),
            str(one["ranks"]),
            f"rollout {one['rollout']}, update {one['update']}",
            ", ".join(f"to rollout {rollout}" for rollout in one["returns"]) or "-",
            f"{one['samples']:,}",
            f"{one['cut_bytes']:,}",
        ]
        for one in told["starts"]
    ]
    made = [
        [str(one["rollout"]), str(one["update"]), str(one["start"]), str(one["questions"]), str(one["samples"])]
        + [str(one["dropped_questions"]), _when(one["time"])]
        for one in rollouts
    ]
    why_dropped = f" ({', '.join(f'{reason}: {count}' for reason, count in reasons.items())})" if reasons else ""
    counts = ", ".join(f"{count:,} {fate}{why_dropped if fate == DROPPED else ''}" for fate, count in told["samples"].items())
    verdict = (
        "exactly once: holds" if not told["faults"] else f"exactly once: does not hold ({_count(len(told['faults']), 'fault')})"
    )
    parts = [
        table([["start", "ranks", "goes on after", "went back", "samples", "cut off bytes"], *starts]),
        table([["rollout", "update", "start", "questions", "samples", "dropped", "trained on"], *made])
        if made
        else "no rollout yet",
        f"samples: {counts}\n{verdict}",
    ]
    return told, "\n\n".join(parts)


def _starts(history: History) -> list[dict[str, Any]]:
    """The run's starts. ``cut_bytes``: after the last whole frames of its files, half written by what ended it, or damaged."""
    found = []
    for number in sorted({frame.start for frame in history.frames}):
        mine = [frame for frame in history.frames if frame.start == number]
        first = next(frame for frame in mine if frame.kind == "start")
        ends = {frame.path: frame.end for frame in mine}  # of the last one
        found.append(
            {
                "start": number,
                "ranks": len(ends),
                "rollout": first.values["rollout"],
                "update": first.values["update"],
                "returns": [frame.values["rollout"] for frame in mine if frame.kind == "back" and frame.rank == first.rank],
                "samples": sum(frame.kind == "sample" for frame in mine),
                "cut_bytes": sum(path.stat().st_size - end for path, end in ends.items()),
            }
        )
    return found


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC" if seconds else "at an unknown time"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
