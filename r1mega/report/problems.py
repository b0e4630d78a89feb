"""Problems with a model's answers before and after reinforcement, from two evaluations' examples. Pure: dicts in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from r1mega.report.readers import StageRun

KINDS = (
    ("newly solved", 3),
    ("solved before and after", 1),
    ("not solved", 1),
    ("no longer solved", 1),
)
"""What is shown and how many of each at most: gains, but what was lost too."""


@dataclass(frozen=True)
class Compared:
    """One question that both evaluations kept. ``before``, ``after``: its responses, each with text and correct."""

    question: str
    answer: str
    before: Sequence[Mapping[str, Any]]
    after: Sequence[Mapping[str, Any]]

    @property
    def kind(self) -> str:
        """Which of :data:`KINDS`: by the first response of each, which is the one shown."""
        was, now = bool(self.before[0].get("correct")), bool(self.after[0].get("correct"))
        return {(False, True): "newly solved", (True, True): "solved before and after", (False, False): "not solved"}.get(
            (was, now), "no longer solved"
        )


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Compared]:
    """Examples of two ``eval.json`` matched by question, in the order of ``after``; those without a response are left out."""
    earlier = {example.get("question"): example for example in _examples(before)}
    return [
        Compared(
            str(example.get("question")),
            str(example.get("answer", "")),
            _responses(earlier[example.get("question")]),
            _responses(example),
        )
        for example in _examples(after)
        if example.get("question") in earlier
    ]


def _examples(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = evaluation.get("examples")
    return [one for one in found if isinstance(one, dict) and _responses(one)] if isinstance(found, list) else []


def _responses(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = example.get("responses")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def choose(compared: Sequence[Compared]) -> list[Compared]:
    """A few of each kind, in the order of :data:`KINDS`."""
    return [one for kind, most in KINDS for one in [one for one in compared if one.kind == kind][:most]]


def problems_html(before: StageRun, after: StageRun) -> str:
    """Cards of a few problems; "" where the two evaluations share no example."""
    compared = compare(before.tested, after.tested)
    if not compared:
        return ""
    counts = ", ".join(f"{number} {kind}" for kind, _ in KINDS if (number := sum(one.kind == kind for one in compared)))
    cards = []
    for one in choose(compared):
        sides = "".join(_side(stage.name, responses) for stage, responses in ((before, one.before), (after, one.after)))
        cards.append(
            f'<article class="card problem"><p class="kind">{escape(one.kind)}</p>'
            f'<pre class="question">{escape(one.question.strip())}</pre>'
            f'<p>Answer: <b class="answer">{escape(one.answer)}</b></p><div class="sides">{sides}</div></article>'
        )
    says = f"The first response of each; of the {len(compared)} examples that both evaluations kept: {counts}."
    return f'<p class="says">{escape(says)}</p>' + "".join(cards)


def _side(name: str, responses: Sequence[Mapping[str, Any]]) -> str:
    right = bool(responses[0].get("correct"))
    solved = sum(bool(one.get("correct")) for one in responses)
    verdict = f'<span class="{"good" if right else "bad"}">{"✓ correct" if right else "✗ wrong"}</span>'
    of = f" ({solved} of {len(responses)} correct)" if len(responses) > 1 else ""
    text = escape(str(responses[0].get("text", "")).strip()) or "(empty)"
    return f'<div><p class="side">{escape(name)}: {verdict}{of}</p><pre>{text}</pre></div>'
