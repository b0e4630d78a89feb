"""Shuffled orders and blends: every item once an epoch, any position alone, shares that hold at every moment."""

from __future__ import annotations

import numpy as np
import pytest

from r1mega.data.order import blend, epoch_items, shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000, 4097])
def test_each_item_comes_once(count):
    order = shuffled(np.arange(count), count, [1, 2])
    assert sorted(order.tolist()) == list(range(count))


def test_position_alone_equals_position_in_the_whole_order():
    whole = shuffled(np.arange(1000), 1000, [7])
    assert shuffled([999, 0, 5], 1000, [7]).tolist() == [whole[999], whole[0], whole[5]]
    assert 0 <= int(shuffled([3], 10**12, [7])[0]) < 10**12  # no array of that size


def test_keys_give_unrelated_orders():
    a, b = (shuffled(np.arange(1000), 1000, [seed]) for seed in (1, 2))
    assert (a == b).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), a)[0, 1]) < 0.1


def test_nothing_to_shuffle_is_refused():
    with pytest.raises(ValueError, match="count 0"):
        shuffled([], 0, [1])


def test_epoch_items_cross_the_end_of_an_epoch():
    whole = epoch_items(0, 25, 10, [3])
    assert sorted(whole[:10].tolist()) == sorted(whole[10:20].tolist()) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    assert epoch_items(7, 6, 10, [3]).tolist() == whole[7:13].tolist()
    assert epoch_items(20, 0, 10, [3]).tolist() == []


def test_blend_by_hand():
    # weights 2:1; deficits at n = 0: (2/3, 1/3) -> 0; n = 1: (1/3, 2/3) -> 1; n = 2: (1, 0) -> 0; then again
    assert blend([0, 0], [2, 1], 6).tolist() == [0, 1, 0, 0, 1, 0]


def test_blend_goes_on_from_any_point_and_keeps_shares():
    whole = blend([0, 0, 0], [5, 3, 2], 1000)
    taken = np.bincount(whole[:333], minlength=3)
    assert blend(taken, [5, 3, 2], 667).tolist() == whole[333:].tolist()
    counts = np.cumsum(np.eye(3)[whole], axis=0)
    assert np.abs(counts - np.outer(np.arange(1, 1001), [0.5, 0.3, 0.2])).max() <= 1.0
