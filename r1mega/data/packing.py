"""Packing whole samples into rows of a fixed length. Owns the best-fit rule; in: lengths; out: which samples share a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int, *, decreasing: bool = True) -> list[list[int]]:
    """Best-fit packing: each sample goes to the row whose free space it leaves smallest, or into a new row.

    lengths: 1..row_length each. decreasing: place long samples first (equal ones in the order given), which wastes least; False:
    in the order given. Returns rows of sample numbers, each row in the order of placing; every sample is in exactly one.
    """
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n]) if decreasing else range(len(lengths))
    rows: list[list[int]] = []
    with_free: dict[int, list[int]] = {}  # free space to the rows that have it
    spaces: list[int] = []  # the keys of with_free, sorted
    for n in order:
        length = lengths[n]
        if not 1 <= length <= row_length:
            raise ValueError(f"packing: a sample has 1..{row_length} tokens; got {length} for sample {n}")
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, free = len(rows), row_length
            rows.append([])
        else:
            free = spaces[at]
            row = with_free[free].pop()
            if not with_free[free]:
                del with_free[free], spaces[at]
        rows[row].append(n)
        free -= length
        if free:
            if free not in with_free:
                insort(spaces, free)
                with_free[free] = []
            with_free[free].append(row)
    return rows
