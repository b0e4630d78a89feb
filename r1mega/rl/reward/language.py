"""The language reward: is the reasoning in one language; in: problem and response text, out: a share. Knows scripts, no grammar.

DeepSeek-R1 (arXiv 2501.12948, 2.3.2) adds to the accuracy reward the share of the target language's words in the reasoning:

    value = words of the target's scripts / all words of the reasoning

Code and formulas do not count. English and French have one script and are not told apart; English and Chinese, R1's case, are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from r1mega.config.knob import knob, one_of
from r1mega.registry import register
from r1mega.rl.reward.format import split_response
from r1mega.rl.reward.words import HAN, HANGUL, HIRAGANA, KATAKANA, LATIN, count_words, prose

QUESTION = "question"
JAPANESE = frozenset((HAN, HIRAGANA, KATAKANA))
SCRIPTS = {
    **dict.fromkeys(("en", "de", "es", "fr", "id", "it", "nl", "pl", "pt", "sv", "tr", "vi"), frozenset((LATIN,))),
    "zh": frozenset((HAN,)),
    "ja": JAPANESE,
    "ko": frozenset((HANGUL,)),
    **dict.fromkeys(("bg", "ru", "uk"), frozenset(("CYRILLIC",))),
    **dict.fromkeys(("ar", "fa", "ur"), frozenset(("ARABIC",))),
    **dict.fromkeys(("hi", "mr"), frozenset(("DEVANAGARI",))),
    "bn": frozenset(("BENGALI",)),
    "el": frozenset(("GREEK",)),
    "he": frozenset(("HEBREW",)),
    "ta": frozenset(("TAMIL",)),
    "th": frozenset(("THAI",)),
}
"""Language to the scripts that it is written in."""


@register("reward", "language")
@dataclass(frozen=True)
class LanguageReward:
    """Share of the target language's words in the reasoning (R1 2.3.2); 0 without words or in another form than asked for."""

    target: str = knob(
        QUESTION, "language of the reasoning; question: that of the question", "name", **one_of(QUESTION, *sorted(SCRIPTS))
    )
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def build(self) -> Callable[[Any, str], float]:
        """``(problem, response_text) -> share`` from 0 to 1."""

        def score(problem: Any, response: str) -> float:
            parts = split_response(response)
            if parts is None:
                return 0.0
            counts = count_words(prose(parts[0]))
            if self.target == QUESTION:  # a question without words (17 + 4 = ?) asks for no language: then for one alone
                wanted = main_scripts(count_words(prose(problem.question)) or counts)
            else:
                wanted = SCRIPTS[self.target]
            if HAN in wanted and HIRAGANA in wanted and not counts.keys() & {HIRAGANA, KATAKANA}:
                return 0.0  # Han without any kana is Chinese
            return sum(counts.get(script, 0.0) for script in wanted) / sum(counts.values()) if counts else 0.0

        return score


def main_scripts(counts: dict[str, float]) -> frozenset[str]:
    """The scripts of the language that most words are in: Japanese if there is kana, else one script; none of no words."""
    if not counts:
        return frozenset()
    first = max(sorted(counts), key=counts.__getitem__)
    return JAPANESE if first in JAPANESE and counts.keys() & {HIRAGANA, KATAKANA} else frozenset((first,))
