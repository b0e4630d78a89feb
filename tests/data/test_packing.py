"""Best-fit packing against rows worked out by hand."""

from __future__ import annotations

import random

import pytest

from r1mega.data.packing import pack


def test_best_fit_decreasing_by_hand():
    # row of 10: 7 opens, 6 opens; 4 fits beside 6 exactly; 3 fits beside 7 exactly; 2 opens
    assert pack([2, 7, 3, 6, 4], 10) == [[1, 2], [3, 4], [0]]


def test_in_the_given_order_takes_the_tightest_row():
    # 5 and 7 open rows with 5 and 3 left; 3 goes to the second, where it leaves 0, not to the first
    assert pack([5, 7, 3], 10, decreasing=False) == [[0], [1, 2]]


def test_every_sample_once_and_rows_not_overfull():
    rng = random.Random(0)
    lengths = [rng.randint(1, 64) for _ in range(2000)]
    rows = pack(lengths, 64)
    assert sorted(n for row in rows for n in row) == list(range(2000))
    assert all(sum(lengths[n] for n in row) <= 64 for row in rows)
    assert sum(lengths) / (64 * len(rows)) > 0.99


@pytest.mark.parametrize("length", [0, 11])
def test_a_sample_that_cannot_fit_is_refused(length):
    with pytest.raises(ValueError, match=f"got {length} for sample 1"):
        pack([3, length], 10)
