"""What a benchmark has measured, and what is done with it: rows, the table, the roofline, the baseline and its check.

A *figure* is how near a row comes to the device's ceiling of the same run: rates of one machine vary, their ratio hardly does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.testing.bench import Bench
from r1mega.testing.measure.ceilings import UNITS


@dataclass(frozen=True)
class Row:
    """One bench, measured. ``microseconds``: ours, None where it failed (``fault``); ``peers``: microseconds, or why none.

    ``limit``: the ceiling's rate in this run, None where the device has none of it.
    """

    op: str
    case: str
    microseconds: float | None
    num_bytes: int
    flops: int
    ceiling: str
    limit: float | None
    peers: Mapping[str, float | str] = field(default_factory=dict)
    fault: str = ""

    @classmethod
    def of(cls, bench: Bench, times: Mapping[str, float], faults: Mapping[str, str], limit: float | None, ours: str) -> Row:
        """``ours``: the name of our own call among ``times`` and ``faults``."""
        peers = {name: times[name] if name in times else faults[name] for name in bench.peers}
        sizes = (bench.num_bytes, bench.flops, bench.ceiling)
        return cls(bench.op, bench.case, times.get(ours), *sizes, limit, peers, faults.get(ours, ""))

    @property
    def name(self) -> str:
        """Of its figure."""
        return f"{self.op}: {self.case}"

    @property
    def work(self) -> int:
        """Bytes or operations, whichever the ceiling counts; 0 where the bench does not say."""
        return self.num_bytes if self.ceiling == "copy" else self.flops

    @property
    def rate(self) -> float | None:
        """Work a second."""
        return self.work / (self.microseconds / 1e6) if self.microseconds and self.work else None

    @property
    def share(self) -> float | None:
        """Of the ceiling."""
        return self.rate / self.limit if self.rate and self.limit else None

    @property
    def ratios(self) -> dict[str, float]:
        """Peer to its time over ours: above 1 we are faster."""
        return {
            name: took / self.microseconds for name, took in self.peers.items() if self.microseconds and not isinstance(took, str)
        }

    @property
    def figure(self) -> float | None:
        """The share; without work, calls in the time in which the ceiling does one GB, or one TFLOP."""
        if self.share is not None:
            return self.share
        return UNITS[self.ceiling][1] / self.limit / (self.microseconds / 1e6) if self.microseconds and self.limit else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        kept = ("op", "case", "microseconds", "num_bytes", "flops", "ceiling", "share", "ratios", "figure", "fault")
        return {name: getattr(self, name) for name in kept} | {"peers": dict(self.peers), "rate": self.rate}


def table(rows: Sequence[Row]) -> str:
    """The rows as text: microseconds, rate, share of the ceiling, and of each peer its time over ours."""
    lines = [("op", "case", "us", "rate", "ceiling", "share", "peer time / ours"), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = (2, 3, 5)
    text = [
        "  ".join(line[at].rjust(wide) if at in right else line[at].ljust(wide) for at, wide in enumerate(widths)).rstrip()
        for line in lines
    ]
    notes = [f"{row.name}: ours failed: {row.fault}" for row in rows if row.fault]
    notes += [f"{row.name}: {name} failed: {took}" for row in rows for name, took in row.peers.items() if isinstance(took, str)]
    return "\n".join(text + notes)


def _cells(row: Row) -> tuple[str, ...]:
    unit, scale = UNITS[row.ceiling]
    rate = "" if row.rate is None else f"{row.rate / scale:,.{0 if row.rate >= 10 * scale else 2}f} {unit}"
    took = "failed" if row.microseconds is None else f"{row.microseconds:.1f}"
    share = "" if row.share is None else f"{100 * row.share:.0f}%"
    peers = "  ".join(f"{name} {row.ratios[name]:.2f}" if name in row.ratios else f"{name} -" for name in row.peers)
    return row.op, row.case, took, rate, row.ceiling if row.work else "", share, peers


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """Name to figure, of the rows that have one. Raises UserError where two rows have one name."""
    found: dict[str, float] = {}
    for row in rows:
        if row.name in found:
            raise UserError(f"bench: each case of an op has a name of its own; got {row.name!r} twice; rename one")
        if row.figure is not None:
            found[row.name] = row.figure
    return found


def baseline_name(hardware: str) -> str:
    """The file of a device model."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", hardware).strip("-") + ".json"


def read_baseline(path: Path) -> dict[str, float]:
    """Name to figure. Raises UserError where there is no such file, or another content."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in body["figures"].items()}
    except FileNotFoundError:
        raise UserError(f"baseline: a file of figures; got no such file {path}; measure one with write_baseline=true") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"baseline: a file of figures; got {path} with {type(error).__name__} {error}; measure it again") from None


def write_baseline(path: Path, figures: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Put ``figures`` among those that ``path`` holds. ``about``: device, torch, date."""
    held = read_baseline(path) if path.is_file() else {}
    body = {**about, "figures": {name: float(f"{value:.4g}") for name, value in sorted((held | dict(figures)).items())}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def regressions(figures: Mapping[str, float], baseline: Mapping[str, float], tolerance: float) -> list[str]:
    """A line for each figure that has fallen by more than ``tolerance`` of the baseline's; what one side lacks does not count."""
    return [
        f"{name}: {value:.3g}, {100 * (1 - value / baseline[name]):.0f}% below the baseline's {baseline[name]:.3g}"
        for name, value in figures.items()
        if name in baseline and value < (1 - tolerance) * baseline[name]
    ]
