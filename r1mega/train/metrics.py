"""One metric line a step: appended to ``metrics.jsonl``, shown on TensorBoard and on a progress bar. Rank 0 only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Metrics:
    """Writer of one run's metrics. ``total``: steps of the run, for the bar; ``done``: steps that an earlier process made.

    Lines of steps after ``done`` (a run that was cut off after its last checkpoint) are dropped from the file first, so that a step
    stands once.
    """

    def __init__(self, folder: Path, key: str, total: int, done: int, *, active: bool):
        self.active, self.key = active, key
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        path = folder / "metrics.jsonl"
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(_lines_before(path, key, done)))
        aside.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._bar = tqdm(total=total, initial=done, unit=key, dynamic_ncols=True, mininterval=1.0, desc=folder.name)

    def log(self, values: dict[str, Any]) -> None:
        """Append one line; numbers also go to TensorBoard, a few to the bar."""
        if not self.active:
            return
        self._file.write(json.dumps({name: _short(value) for name, value in values.items()}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and name != self.key:
                self._board.add_scalar(name, value, values[self.key])
        shown = {
            name: f"{values[name]:.3g}" for name in ("loss", "reward", "accuracy", "tokens_per_second", "mfu") if name in values
        }
        self._bar.set_postfix(shown, refresh=False)

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


def _lines_before(path: Path, key: str, done: int) -> list[str]:
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)[key] <= done:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):  # a half line that a killed process left
            continue
    return kept


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_short(item) for item in value] if isinstance(value, list) else value
