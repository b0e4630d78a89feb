"""Held-out problems share nothing with those trained on; splits are deterministic."""

from __future__ import annotations

import itertools
import json

import pytest

from r1mega.config.data import ProblemSourceConfig
from r1mega.config.errors import UserError
from r1mega.data.problems import Problem, load_problems, write_problems
from r1mega.data.split import generate, make_split, normal_text, same_as


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is 2+2?", "what  is\n2 + 2"),
        ("It's “fine”, isn't it", "it s fine isn t it"),
        ("4 \u2212 1", "4 - 1"),
        ("well-known", "Well known"),
        ("STRASSE", "straße"),
        ("１２ ³", "12 3"),
    ],
)
def test_same_text(a, b):
    assert normal_text(a) == normal_text(b)


@pytest.mark.parametrize(
    ("a", "b"), [("4 - 1", "4 + 1"), ("4 - 1", "4 1"), ("1.5", "15"), ("a*b", "a b c"), ("3 / 2", "3 * 2"), ("5!", "5")]
)
def test_other_text(a, b):
    if (a, b) == ("5!", "5"):
        assert normal_text(a) == normal_text(b)  # punctuation folds: an exclamation mark is not worth a leak
    else:
        assert normal_text(a) != normal_text(b)


def test_the_same_sum_in_other_words_is_the_same_problem():
    made = {"expression": "1 + 2", "num_terms": 2}
    a = Problem("a", "Calculate 1 + 2.", "3", "reasoning_gym:chain_sum", {**made, "source_index": 1})
    b = Problem("b", "How much is 1 + 2?", "3", "reasoning_gym:chain_sum", {**made, "source_index": 2})
    assert set(same_as(a)) & set(same_as(b)) and same_as(a)[0] != same_as(b)[0]
    c = Problem("c", "How much is 1 + 3?", "4", "reasoning_gym:chain_sum", {"expression": "1 + 3", "num_terms": 2})
    assert not set(same_as(b)) & set(same_as(c))


def small(**numbers):
    # 200 expressions of two digits: a careless split would overlap at once
    return ProblemSourceConfig(
        dataset="chain_sum", options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, **numbers
    )


def test_parts_are_disjoint_and_deterministic():
    sources = {"a": small(num_train=90, num_valid=20, num_test=60), "b": small(num_train=0, num_valid=0, num_test=20)}
    split = make_split(sources, seed=4)
    assert {part: len(problems) for part, problems in split.items()} == {"train": 90, "valid": 20, "test": 80}
    texts = [normal_text(p.question) for problems in split.values() for p in problems]
    assert len(set(texts)) == len(texts) == 190
    assert make_split(sources, seed=4) == split
    assert {p.question for p in make_split(sources, seed=5)["test"]} != {p.question for p in split["test"]}


def test_too_few_distinct_problems_are_an_error():
    with pytest.raises(UserError, match=r"problems\.a\.num_train: .*; got 140 of 150; lower num_test"):
        make_split({"a": small(num_train=150, num_test=60)}, seed=1)
    with pytest.raises(UserError, match="-1 .all. is for kind file"):
        make_split({"a": small(num_train=-1)}, seed=1)


def test_jsonl_sources_drop_what_another_part_holds(tmp_path):
    train = [Problem(str(i), f"Question {i}?", str(i), "x") for i in range(10)]
    write_problems(tmp_path / "train.jsonl", [*train, Problem("again", "question  3", "3", "x")])
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"question": f"QUESTION {i}", "answer": str(i)}) for i in (1, 2, 77)))
    sources = {
        "train": ProblemSourceConfig(kind="file", path=str(tmp_path / "train.jsonl"), num_train=-1),
        "test": ProblemSourceConfig(kind="jsonl", path=str(tmp_path / "test.jsonl"), num_train=0, num_test=3),
    }
    split = make_split(sources, seed=1)
    assert sorted(p.answer for p in split["train"]) == sorted(str(i) for i in range(10) if i not in (1, 2))
    assert sorted(p.answer for p in split["test"]) == ["1", "2", "77"]
    assert [p.answer for p in split["train"]] != sorted(p.answer for p in split["train"])


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"problems\.x\.dataset: a data set of reasoning-gym; got 'chain_sums'; did you mean chain_sum"
    ):
        make_split({"x": ProblemSourceConfig(dataset="chain_sums")}, seed=1)
    with pytest.raises(UserError, match=r"problems\.x\.options: .*no_such"):
        make_split({"x": ProblemSourceConfig(options={"no_such": 1})}, seed=1)
    with pytest.raises(UserError, match=r"problems\.x\.options: .*min_terms"):
        make_split({"x": ProblemSourceConfig(options={"min_terms": 9, "max_terms": 2})}, seed=1)
    with pytest.raises(UserError, match="seed and size follow"):
        make_split({"x": ProblemSourceConfig(options={"seed": 1})}, seed=1)
    with pytest.raises(UserError, match=r"problems\.x\.path: kind file reads a file; got None"):
        make_split({"x": ProblemSourceConfig(kind="jsonl")}, seed=1)
    with pytest.raises(UserError, match=r"problems\.x\.dataset: problems are kept as JSON; got rearc"):
        make_split({"x": ProblemSourceConfig(dataset="rearc", num_train=1)}, seed=1)


@pytest.mark.parametrize("dataset", ["chain_sum", "number_sorting", "graph_color", "countdown"])
def test_generated_problems_are_scored_after_a_round_trip_through_a_file(tmp_path, dataset):
    from reasoning_gym import get_score_answer_fn

    problems = list(itertools.islice(generate(dataset, {}, seed=3), 5))
    write_problems(tmp_path / "p.jsonl", problems)
    loaded = load_problems(tmp_path / "p.jsonl")
    assert loaded == problems and loaded[0].dataset == dataset
    score = get_score_answer_fn(dataset)
    assert [score(p.answer, p.entry()) for p in loaded if p.answer] == [1.0 for p in loaded if p.answer]
    assert all(score("no answer at all", p.entry()) < 0.1 for p in loaded)


def test_generation_goes_on_past_one_chunk():
    stream = generate("chain_sum", {}, seed=3)
    ids = [next(stream).id for _ in range(1002)]
    assert len(set(ids)) == 1002 and ids[-1] == "chain_sum:3:1001"
