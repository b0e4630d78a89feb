"""The length reward: a penalty for responses near the longest allowed; in: a response's text, out: 0 to -1. Judges no content.

DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), with n characters instead of tokens, L = ``longest`` and C = ``margin``:

    value = 0                    for n <= L - C
            ((L - C) - n) / C    up to L
            -1                   beyond
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from r1mega.config.knob import at_least, knob
from r1mega.registry import register
from r1mega.rl.reward.format import split_response


@register("reward", "length")
@dataclass(frozen=True)
class LengthReward:
    """0 for a response of fitting length, falling to -1 at the longest (DAPO); -1 in another form than asked for.

    A response that was cut off has not the asked-for form. The defaults are DAPO's 20,480 and 4,096 tokens at four characters each.
    """

    longest: int = knob(81920, "L: from here on the value is -1", "characters", **at_least(1))
    margin: int = knob(16384, "C: the value falls over the last so many, at most L", "characters", **at_least(1))
    value_range: ClassVar[tuple[float, float]] = (-1.0, 0.0)

    def build(self) -> Callable[[Any, str], float]:
        """``(problem, response_text) -> value`` from -1 to 0; the problem is not looked at."""
        margin = min(self.margin, self.longest)

        def score(problem: Any, response: str) -> float:
            if split_response(response) is None:
                return -1.0
            return -min(max((len(response) - self.longest + margin) / margin, 0.0), 1.0)

        return score
