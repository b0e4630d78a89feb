"""One metric line a step: to ``metrics.jsonl``, TensorBoard, a progress bar and, if wanted, Weights & Biases and Prometheus.

Rank 0 only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from r1mega.config.run import LogConfig
from r1mega.train.mirror import Mirror
from r1mega.train.prometheus import Exporter


class Metrics:
    """Writer of one run's metrics. ``total``: steps of the run, for the bar; ``done``: steps that an earlier process made;

    ``config``: the command's dataclass, whose ``log`` says what else gets the lines; None: nothing else.

    Lines of steps after ``done`` (a run that was cut off after its last checkpoint) are dropped from the file first, so that a step
    stands once; none is left where ``done`` is 0.
    """

    def __init__(self, folder: Path, key: str, total: int, done: int, *, active: bool, config: Any = None):
        self.active, self.key = active, key
        if not active:
            return
        from tqdm import tqdm

        self._folder = folder
        wanted = config.log if config is not None else LogConfig()
        self._exporter = Exporter(wanted.prometheus_host, wanted.prometheus_port, config.name) if wanted.prometheus_port else None
        self._mirror = Mirror(folder, key, config) if wanted.wandb else None
        self._open(done, keep_events=False)
        self._bar = tqdm(total=total, initial=done, unit=key, dynamic_ncols=True, mininterval=1.0, desc=folder.name)

    def log(self, values: dict[str, Any]) -> None:
        """Append one line; numbers also go to TensorBoard, a few to the bar."""
        if not self.active:
            return
        self._file.write(json.dumps({name: _short(value) for name, value in values.items()}) + "\n")
        self._file.flush()
        if self._exporter:
            self._exporter.line(values)
        if self._mirror:
            self._mirror.log(values)
        for name, value in values.items():
            if isinstance(value, int | float) and name != self.key:
                self._board.add_scalar(name, value, values[self.key])
        shown = {
            name: f"{values[name]:.3g}" for name in ("loss", "reward", "accuracy", "tokens_per_second", "mfu") if name in values
        }
        self._bar.set_postfix(shown, refresh=False)

    def event(self, kind: str, step: int, reason: str) -> None:
        """Append a line ``{"event": kind, key: step, "reason": ...}`` and show it."""
        if self.active:
            self._file.write(json.dumps({"event": kind, self.key: step, "reason": reason}) + "\n")
            self._file.flush()
            self._bar.write(f"{self.key} {step}: {reason}; {kind}", file=sys.stderr)
            self.count(events=1)
            if self._mirror:
                self._mirror.log({"event": kind, self.key: step, "reason": reason})

    def count(self, **more: float) -> None:
        """Add to counters that are told to Prometheus alone: :data:`r1mega.train.prometheus.COUNTERS`."""
        if self.active and self._exporter:
            self._exporter.count(**more)

    def rewind(self, done: int) -> None:
        """The run goes back to step ``done``: later lines are dropped, events stay."""
        if self.active:
            self._file.close()
            self._board.close()
            self._open(done, keep_events=True)
            self._bar.n = done
            self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """Move the bar."""
        if self.active:
            self._bar.update(count)

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self._file.close()
            self._board.close()
            self._bar.close()
            if self._exporter:
                self._exporter.close()
            if self._mirror:
                self._mirror.close()

    def _open(self, done: int, *, keep_events: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = self._folder / "metrics.jsonl"
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(_lines_before(path, self.key, done, keep_events=keep_events)))
        aside.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=done + 1)


def _lines_before(path: Path, key: str, done: int, *, keep_events: bool) -> list[str]:
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            values = json.loads(line)
            if 0 < done >= values[key] or (keep_events and "event" in values):
                kept.append(line)
        except (json.JSONDecodeError, KeyError):  # a half line that a killed process left
            continue
    return kept


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_short(item) for item in value] if isinstance(value, list) else value
