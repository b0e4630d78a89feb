"""Is a step's loss sound? In: loss and gradient norm of a step before it is applied; out: what is wrong, or nothing.

Owns the memory of recent losses, which is saved with a checkpoint, and the limit on troubles. What follows (skip, roll back, stop)
is the loop's. A loss is a spike when it lies ``sigma`` standard deviations above the mean of the last ``window`` sound losses, the
deviation counted as at least 1% of the mean; nothing is called a spike before half a window is known.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from r1mega.config.errors import UserError

LEAST_DEVIATION = 0.01
"""Smallest standard deviation, as a share of the mean: a loss that hardly moves must not make noise a spike."""


class Health:
    """Judge of one run. ``sigma`` 0: only what is not finite is wrong. ``limit``: see :meth:`trouble`."""

    def __init__(self, sigma: float = 0.0, window: int = 128, limit: int = 10):
        self.sigma, self.limit = sigma, limit
        self.losses: deque[float] = deque(maxlen=window)
        self.troubles = self.sound_steps = 0

    def judge(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, or ""; changes nothing, so that ranks may agree before it counts."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:.4g} and gradient norm {grad_norm:.4g} are not both finite"
        if self.sigma and 2 * len(self.losses) >= self.losses.maxlen:
            mean = statistics.fmean(self.losses)
            deviation = max(statistics.pstdev(self.losses), LEAST_DEVIATION * abs(mean))
            if loss > mean + self.sigma * deviation:
                above = (loss - mean) / deviation
                return f"loss {loss:.4g} is {above:.1f} standard deviations above {mean:.4g}, the mean of {len(self.losses)} steps"
        return ""

    def sound(self, loss: float) -> None:
        """Take a sound step into account; after a window of them earlier troubles are forgotten."""
        self.losses.append(loss)
        self.sound_steps += 1
        if self.sound_steps >= self.losses.maxlen:
            self.troubles = 0

    def trouble(self, reason: str) -> None:
        """Count a trouble. Raises UserError at more than ``limit`` of them, less than a window of sound steps between each two."""
        self.troubles += 1
        self.sound_steps = 0
        if self.troubles > self.limit:
            raise UserError(
                f"training: at most {self.limit} spikes in a row; got one more, {reason}; lower optim.lr or set optim.clip_grad; "
                "the same command goes on from the last checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        return {"losses": list(self.losses), "troubles": self.troubles, "sound_steps": self.sound_steps}

    def load_state_dict(self, state: dict[str, Any], *, keep_troubles: bool = False) -> None:
        """What :meth:`state_dict` gave. ``keep_troubles``: after a roll-back the count goes on."""
        self.losses = deque(state.get("losses", ()), maxlen=self.losses.maxlen)
        if not keep_troubles:
            self.troubles, self.sound_steps = state.get("troubles", 0), state.get("sound_steps", 0)
