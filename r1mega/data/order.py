"""Shuffled order without memory: a keyed permutation of 0..count-1 that is computed, not stored.

Owns the order in which loaders and prompt streams visit things, and the rule that blends sources by weight. A permutation array
of a trillion-token corpus would fill each rank's memory; a Feistel network over the smallest even number of bits that holds
``count``, with cycle walking for values past the end, needs none and any position is reached in constant time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 in, uint64 out, wrapping."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))


def shuffled(positions: Sequence[int] | np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """Items at ``positions`` of the shuffled order of 0..count-1 that ``key`` (whole numbers, such as seed and epoch) selects.

    positions: int, any shape [N], each in 0..count-1. Returns int64 [N]. The same key gives the same order on every machine; over
    all positions each item comes exactly once.
    """
    if count < 1:
        raise ValueError(f"order: nothing to shuffle; got count {count}")
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence([int(k) for k in key]).generate_state(_ROUNDS, np.uint64)
    values = np.asarray(positions, dtype=np.uint64).copy()
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():  # cycle walking: at least a quarter of the domain is inside, so it ends soon
        walk = values[outside]
        left, right = walk >> half, walk & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def epoch_items(start: int, num: int, count: int, key: Sequence[int]) -> np.ndarray:
    """Items ``start .. start+num-1`` of an endless stream of shuffled epochs over ``count`` items. Returns int64 [num]."""
    stream = np.arange(start, start + num, dtype=np.int64)
    items = np.empty(num, dtype=np.int64)
    for epoch in range(start // count, (start + num - 1) // count + 1 if num else start // count):
        here = stream // count == epoch
        items[here] = shuffled(stream[here] - epoch * count, count, [*key, epoch])
    return items


def blend(taken: Sequence[int], weights: Sequence[float], num: int) -> np.ndarray:
    """Which source each of the next ``num`` items comes from: always the one that is furthest behind its weight.

    taken: items each source has given so far [sources]; weights: positive, any sum [sources]. Returns int64 [num]. Item n goes to
    the source with the largest ``weight * (n + 1) - taken`` (weights scaled to sum 1), the first of equals; so after any number of
    items no source is off its share by more than one item a source.
    """
    counts = np.asarray(taken, dtype=np.int64).copy()
    if len(counts) == 1:
        return np.zeros(num, dtype=np.int64)
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    start = int(counts.sum())
    picks = np.empty(num, dtype=np.int64)
    for n in range(num):
        pick = int(np.argmax(share * (start + n + 1) - counts))
        picks[n] = pick
        counts[pick] += 1
    return picks
