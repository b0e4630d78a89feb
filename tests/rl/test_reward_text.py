"""Language, length and repetition: hand-counted values, several scripts, code and formulas, texts made to be slow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from r1mega.rl.reward import LanguageReward, LengthReward, RepetitionReward
from r1mega.rl.reward.words import count_words, prose, units

END = "</think><answer>1</answer>"


def language(reasoning, question="?", target="question"):
    problem = SimpleNamespace(question=question, answer="1", source="s", metadata={})
    return LanguageReward(target).build()(problem, reasoning + END)


@pytest.mark.parametrize("target, reasoning, value", [
    ("en", "Let me think about it: the caf\u00e9 isn't open.", 1.0),
    ("en", "Let me see \u6211\u89c9\u5f97 now", 4 / 5.5),  # three Han letters are a word and a half
    ("zh", "Let me see \u6211\u89c9\u5f97 now", 1.5 / 5.5),
    ("zh", "\u8bbe x \u4e3a\u6570, $f(x) = sin x$, `print(foo)`, \\(ab + cd\\), var_1 = 2, \u56e0\u6b64", 1.0),
    ("zh", "\u8bbe\u4e3a\n```python\nfor word in words:\n    pass\n```\n\u6570", 1.0),
    ("ja", "\u3053\u308c\u306f\u6f22\u5b57\u3068\u30ab\u30ca", 1.0),
    ("ja", "\u6211\u89c9\u5f97\u5f88\u96be", 0.0),  # Han without kana is Chinese
    ("ko", "\ub098\ub294 \uc0dd\uac01 hello", 2 / 3),
    ("ru", "\u0414\u0430\u0432\u0430\u0439 \u043f\u043e\u0434\u0443\u043c\u0430\u0435\u043c", 1.0),
    ("hi", "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902", 1.0),
    ("th", "\u0e1c\u0e21\u0e04\u0e34\u0e14\u0e27\u0e48\u0e32", 1.0),
    ("el", "\u03bb\u03cc\u03b3\u03bf\u03c2 \u03b1 word", 0.5),
    ("en", "3 + 4 = 7", 0.0),  # no word at all
    ("en", "costs $5 in all", 1.0),  # a $ that opens nothing
])  # fmt: skip
def test_share_of_the_targets_words(target, reasoning, value):
    assert language(reasoning, target=target) == pytest.approx(value)


@pytest.mark.parametrize("question, reasoning, value", [
    ("What is it?", "Let me think", 1.0),
    ("What is it?", "\u6211\u89c9\u5f97", 0.0),
    ("$x + y$ \u662f\u591a\u5c11?", "\u6211\u89c9\u5f97", 1.0),
    ("\u3053\u308c\u306f\u4f55\u3067\u3059\u304b", "\u308f\u304b\u308a\u307e\u305b\u3093", 1.0),
    ("17 + 4 = ?", "eight and three \u6211\u89c9", 0.75),  # no language asked for: then one alone
])  # fmt: skip
def test_the_questions_own_language(question, reasoning, value):
    assert language(reasoning, question) == pytest.approx(value)


def test_words_are_counted_by_script():
    assert count_words("It's na\u00efve, don't") == {"LATIN": 3}
    assert count_words("x a1 2b f_name y=mx I see") == {"LATIN": 1}, "names in formulas and code"
    assert count_words("\uff21\uff22\uff23 word") == {"LATIN": 2}, "full-width letters are Latin"
    assert count_words("\u0e1c\u0e21\u0e04\u0e34\u0e14") == {"THAI": 5 / 4}
    assert prose("a `b` c $d$ e $$f\n$$ g \\[h\\] i ```j") == "a   c   e   g   i ```j"
    assert prose("see https://a.b/c?d now $5\nor $6") == "see   now $5\nor $6"


def test_units_are_words_letters_numbers_and_signs():
    assert units("Don't add 12+3, \u6211\u89c9\u5f97 x\u0301.") == [
        "don't",
        "add",
        "12",
        "+",
        "3",
        ",",
        *"\u6211\u89c9\u5f97",
        "x\u0301",
        ".",
    ]


def repetition(reasoning, size=3):
    return RepetitionReward(size).build()(None, reasoning + END)


def test_repetition_by_hand():
    assert repetition("one two three four five") == 0.0
    # a b a b a b 1: 5 trigrams, of which aba, bab and ab1 are distinct
    assert repetition("a b a b a b") == pytest.approx(-(1 - 3 / 5))
    # the same with four Han letters in a loop and no blanks: 12 + "1" = 13 units, 11 trigrams, 5 distinct
    assert repetition("\u6211\u89c9\u5f97\u5f88" * 3) == pytest.approx(-(1 - 5 / 11))
    assert repetition("again", size=20) == 0.0, "too short to repeat"
    assert repetition("again and " * 1000, size=20) == pytest.approx(-(1 - 3 / 1982))
    assert RepetitionReward().build()(None, "cut off in the middle of it") == -1.0


def test_length_by_hand():
    score = LengthReward(longest=100, margin=40).build()

    def response(length):
        return "r" * (length - len(END)) + END

    values = [score(None, response(length)) for length in (40, 60, 61, 80, 99, 100, 101, 500)]
    assert values == pytest.approx([0, 0, -1 / 40, -0.5, -39 / 40, -1, -1, -1])
    assert score(None, "r" * 50) == -1.0, "cut off"
    assert LengthReward(longest=100, margin=1000).build()(None, response(50)) == -0.5, "the margin is at most the whole"


@pytest.mark.parametrize("piece", ["\\(", "$", "`$", "$\n", "```$", "a ", "\u0301", "\u6211", "'", "a1", "https://"])
def test_time_grows_linearly(piece):
    """Texts made to be slow: quadratic code would take far longer than a call's limit for these."""
    text = piece * (60_000 // len(piece)) + "a" + END
    problem = SimpleNamespace(question="?", answer="1", source="s", metadata={})
    for reward in (LanguageReward(), RepetitionReward()):
        low, high = reward.value_range
        assert low <= reward.build()(problem, text) <= high
