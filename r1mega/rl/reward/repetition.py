"""The repetition reward: a penalty for saying the same again; in: a response's text, out: 0 to -1. Judges no content.

The n-gram penalty of Open-R1 and of arXiv 2502.03373 (C.2), over the units u of :func:`r1mega.rl.reward.words.units`:

    value = -(1 - distinct n-grams / n-grams)

Words are units where words have blanks between them, letters where they have none, so that it works for Chinese as for English.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from r1mega.config.knob import at_least, knob
from r1mega.registry import register
from r1mega.rl.reward.format import split_response
from r1mega.rl.reward.words import units


@register("reward", "repetition")
@dataclass(frozen=True)
class RepetitionReward:
    """Minus the share of n-grams that are there already; 0 below n units, -1 in another form than asked for."""

    ngram_size: int = knob(
        20, "n; a few units (Open-R1: 3 words) come again in any text with formulas, many only in loops", "units", **at_least(1)
    )
    value_range: ClassVar[tuple[float, float]] = (-1.0, 0.0)

    def build(self) -> Callable[[Any, str], float]:
        """``(problem, response_text) -> value`` from -1 to 0; the problem is not looked at."""

        def score(problem: Any, response: str) -> float:
            parts = split_response(response)
            if parts is None:
                return -1.0
            found = units(" ".join(parts))
            count = len(found) - self.ngram_size + 1
            if count < 1:
                return 0.0
            return len({tuple(found[idx : idx + self.ngram_size]) for idx in range(count)}) / count - 1.0

        return score
