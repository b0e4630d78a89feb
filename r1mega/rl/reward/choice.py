"""Multiple choice: which letter a reference and an answer mean; in: texts and a problem's choices. Judges no formula itself.

Choices come from the problem's metadata (``choices`` or ``options``: a list, label to text, or ``{"label": [..], "text": [..]}``),
else from its question: texts labelled A, B, C, ... in a row, at least two (``A) Paris B) Rome``, on lines of their own or not).

A reference is a choice where it is a letter alone, ``B`` or ``(B)``, or a letter with a mark and a text, ``B) Paris``; where
choices are known the letter is one of theirs, and where none are it is a capital from A to J, alone.

An answer means a letter where the whole of it is

- the letter, bare or in brackets or with a mark: ``B``, ``(b)``, ``B.``;
- the letter with a mark and a text, ``B) Paris``: the choice's own where choices are known, else one that names no other letter;
- a sentence that ends in one of these: ``the answer is B``, ``answer: B) Paris``. There the letter is a capital or has a bracket,
  so that "the answer is a dog" means none, nor does "the answer is a";
- the text of one choice and of no other, alone or at the end of such a sentence.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.,:\u3002]*")
WITH_TEXT = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:]?\s*|([A-Za-z])(?:\)\s*|[.:]\s+|\s+[-\u2013\u2014]\s+))(\S.*)", re.DOTALL)
LEAD = re.compile(r"(?:\b(?:answer|option|choice)\b(?:\s+is\b)?|\u7b54\u6848(?:\u662f|\u4e3a)?|\u9009)\s*:?\s*", re.IGNORECASE)
NAMED = re.compile(r"[(\[][A-Za-z][)\]]|(?<![A-Za-z])[A-Za-z](?:\)|[.:](?=\s|$))|(?<![A-Za-z'])[B-HJ](?![A-Za-z'])")
"""A letter meant as a label. A and I are words too and need a mark."""
LABEL = re.compile(r"[(\[]([A-Za-z])[)\]]\s*|(?:(?<=[\s,;|])|^)([A-Za-z])(?:\)\s*|[.:]\s+)", re.MULTILINE)


def choices_of(problem: Any) -> dict[str, str]:
    """Capital letter to text of the problem's choices, in order; empty where there are none."""
    given = problem.metadata.get("choices") or problem.metadata.get("options")
    if isinstance(given, dict) and {"label", "text"} <= given.keys():
        given = dict(zip(given["label"], given["text"], strict=False))
    if isinstance(given, list):
        given = {chr(ord("A") + idx): text for idx, text in enumerate(given)}
    if isinstance(given, dict):
        return {str(label).strip("()[]. ").upper(): str(text) for label, text in given.items()}
    return labelled(problem.question)


def labelled(question: str) -> dict[str, str]:
    """The last texts of the question that are labelled A, B, ... in a row, at least two; a text ends at the next label or line."""
    found: list[re.Match] = []
    best: list[re.Match] = []
    for match in LABEL.finditer(question):
        letter = (match[1] or match[2]).upper()
        if letter == "A":
            found = [match]
        elif found and letter == chr(ord("A") + len(found)):
            found.append(match)
            best = found
    if not best:
        return {}
    ends = [match.start() for match in best[1:]] + [len(question)]
    texts = [question[match.end() : end].partition("\n")[0].strip(" \t,;|") for match, end in zip(best, ends, strict=True)]
    return {chr(ord("A") + idx): text for idx, text in enumerate(texts)}


def reference_letter(problem: Any) -> tuple[str | None, dict[str, str]]:
    """The capital letter that a problem's reference means, or None where it is no choice; and the choices."""
    text = clean(problem.answer)
    alone = ALONE.fullmatch(text)
    match = alone or WITH_TEXT.fullmatch(text)
    if not match:
        return None, {}
    choices = choices_of(problem)
    letter = match[1] or match[2]
    if choices:
        return (letter.upper() if letter.upper() in choices else None), choices
    return (letter if alone and "A" <= letter <= "J" else None), {}


def answer_letter(answer: str, choices: dict[str, str], same: Callable[[str, str], bool]) -> str | None:
    """The capital letter that an answer means, or None. ``same``: whether a choice's text and a text say the same."""
    text = clean(answer)
    stated = [text[lead.end() :] for lead in LEAD.finditer(text)]
    certain = [rest for rest in stated if rest[:1].isupper() or rest[:1] in ("(", "[") or rest[1:2] == ")"]
    for part in (text, *certain):
        if letter := _letter(part, choices, same):
            return letter
    meant = [label for label, choice in choices.items() if any(same(choice, part) for part in (text, *stated))]
    return meant[0] if len(meant) == 1 else None


def _letter(text: str, choices: dict[str, str], same: Callable[[str, str], bool]) -> str | None:
    """The letter of a text that is a label, or a label with its text."""
    match = ALONE.fullmatch(text)
    if match:
        return match[1].upper()
    match = WITH_TEXT.fullmatch(text)
    if not match:
        return None
    letter, rest = (match[1] or match[2]).upper(), match[3]
    fits = letter in choices and same(choices[letter], rest) if choices else not NAMED.search(rest)
    return letter if fits else None


def clean(text: str) -> str:
    """Without Unicode's compatibility forms, math delimiters, \\boxed, \\text and its kin, quotes and emphasis around it."""
    text = unicodedata.normalize("NFKC", text).strip()
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"), ("**", "**"), ('"', '"')):
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
            text = text[len(start) : len(text) - len(end)].strip()
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text).strip()
