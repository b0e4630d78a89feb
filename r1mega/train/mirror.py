"""The metric lines once more on Weights & Biases, where ``log.wandb`` asks for it. Imports ``wandb`` when it starts, never before.

Owns the run's id there (``wandb.json`` in the run's folder), so that a resumed run goes on as the same one. WANDB_MODE=offline
keeps everything on this machine. Refuses only at the first start; what fails later is told once, and the training goes on without.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError

FILE_NAME = "wandb.json"


class Mirror:
    """One run on Weights & Biases. ``key``: the name of a line's place on the x axis; ``config``: the command's dataclass."""

    def __init__(self, folder: Path, key: str, config: Any):
        import wandb

        place, in_recipe = folder / FILE_NAME, folder.parent.name == "stages"
        held = _held_id(place)
        run_id = held or secrets.token_hex(6)
        self._run = None
        try:
            run = wandb.init(
                project=config.log.project,
                name=config.name,
                group=folder.parent.parent.name if in_recipe else None,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dataclasses.asdict(config),
                settings={"console": "off"},
            )
            run.define_metric("*", step_metric=key)  # wandb's own count would refuse a step that a resumed run makes again
        except Exception as error:  # noqa: BLE001 - wandb has its own, and those of the network below it
            if held is None:
                got = f"{type(error).__name__} {error}".splitlines()[0]
                way = "use wandb login, WANDB_MODE=offline or log.wandb=false"
                raise UserError(f"log.wandb: W&B starts; got {got}; {way}") from error
            self._tell(error)
            return
        self._run = run
        aside = place.with_suffix(".tmp")
        aside.write_text(json.dumps({"id": run_id}) + "\n")
        aside.replace(place)

    def log(self, values: dict[str, Any]) -> None:
        """Send one line: its numbers and texts, not its lists."""
        if self._run is not None:
            try:
                self._run.log({name: value for name, value in values.items() if isinstance(value, int | float | str)})
            except Exception as error:  # noqa: BLE001
                self._tell(error)

    def close(self) -> None:
        """End the run there; waits until what is left has been sent."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001
                self._tell(error)
            self._run = None

    def _tell(self, error: Exception) -> None:
        from tqdm import tqdm

        self._run = None
        said = f"{type(error).__name__} {error}".splitlines()[0]
        tqdm.write(f"log.wandb: {said}; the training goes on without W&B", file=sys.stderr)


def _held_id(place: Path) -> str | None:
    """The id that an earlier start left; None without one, or where the file cannot be read."""
    try:
        return json.loads(place.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
