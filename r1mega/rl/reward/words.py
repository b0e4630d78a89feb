"""Words of a text, whatever its script; in: text; out: prose without code and formulas, runs of letters by script, units to count.

Scripts are read off Unicode's character names, so languages of one script are not told apart. Time grows linearly with the text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator

HAN, HIRAGANA, KATAKANA, HANGUL, LATIN, GREEK = "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "LATIN", "GREEK"
WITHOUT_BLANKS = {HAN: 2, HIRAGANA: 2, KATAKANA: 2, "THAI": 4, "LAO": 4, "KHMER": 4, "MYANMAR": 4}
"""Scripts that put no blanks between words, and about how many letters a word has."""
SYMBOLIC = frozenset((LATIN, GREEK))
"""Scripts whose letters are the names in formulas and code of any language."""
CLOSING = {"```": "```", "`": "`", "$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
OPENING = re.compile(r"```|`|\$\$|\$|\\\(|\\\[")
ADDRESS = re.compile(r"https?://\S+")
MARK = "mark"


def prose(text: str) -> str:
    """The text without code (backticks), formulas ($, $$, \\(, \\[) and web addresses; a mark that is not closed is left."""
    kept, start, pos, unclosed = [], 0, 0, set()
    while found := OPENING.search(text, pos):
        mark, pos = found.group(), found.end()
        end = -1 if mark in unclosed else text.find(CLOSING[mark], pos)
        if end < 0:
            unclosed.add(mark)
        elif mark not in ("$", "`") or "\n" not in text[pos:end]:
            kept.append(text[start : found.start()])
            start = pos = end + len(CLOSING[mark])
    kept.append(text[start:])
    return ADDRESS.sub(" ", " ".join(kept))


def runs(text: str) -> Iterator[tuple[str, int, int]]:
    """(script, start, end) of each run of letters of one script; marks and apostrophes between letters belong to the run."""
    script, start, end = "", 0, 0
    for idx, char in enumerate(text):
        kind = script_of(char)
        if script and (kind == script or (kind == MARK and end == idx)):
            end = idx + 1
        elif script and char in "'\u2019" and end == idx and script_of(text[idx + 1 : idx + 2]) == script:
            end = idx + 1
        else:
            if script:
                yield script, start, end
            script, start, end = (kind, idx, idx + 1) if kind not in ("", MARK) else ("", 0, 0)
    if script:
        yield script, start, end


def count_words(text: str) -> dict[str, float]:
    """Words by script. Where there are no blanks, letters are words by the script's usual word length.

    Not counted, since they are names in formulas and code of any language: single Latin and Greek letters, and Latin and Greek
    words that touch a digit or one of ``_\\^=+*/<>|@#&%~``.
    """
    text = unicodedata.normalize("NFKC", text)
    counts: dict[str, float] = {}
    for script, start, end in runs(text):
        if script in SYMBOLIC:
            around = text[max(start - 1, 0) : start] + text[end : end + 1]
            if end - start < 2 or any(char.isdigit() or char in "_\\^=+*/<>|@#&%~" for char in around):
                continue
        length = WITHOUT_BLANKS.get(script)
        counts[script] = counts.get(script, 0) + ((end - start) / length if length else 1)
    return counts


def units(text: str) -> list[str]:
    """What repetition is counted in: words, single letters where there are no blanks, numbers, every other visible character."""
    text = unicodedata.normalize("NFKC", text).casefold()
    found, pos = [], 0
    for script, start, end in runs(text):
        found += _between(text[pos:start])
        found += text[start:end] if script in WITHOUT_BLANKS else [text[start:end]]
        pos = end
    return found + _between(text[pos:])


def _between(text: str) -> list[str]:
    return re.findall(r"\d+|\S", text) if text.strip() else []


@functools.lru_cache(maxsize=1 << 16)
def script_of(char: str) -> str:
    """The script of a letter by the first word of its Unicode name, ``MARK`` for what joins letters, "" for anything else."""
    category = unicodedata.category(char) if char else "Zs"
    if category[0] == "M" or category == "Lm" and char != "\u3005":
        return MARK
    if category[0] != "L":
        return ""
    name = unicodedata.name(char, "").partition(" ")[0]
    return HAN if name in ("IDEOGRAPHIC", "KANGXI") else name
