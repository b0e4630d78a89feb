"""Benchmarks of ``hash_words_``: an expert's matrix, and a bucket of a push."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops.hash_words import HASH_WORDS, TILE, hash_words_
from r1mega.testing.bench import Bench


def _bench(count: int, first: int) -> Bench:
    def make(device):
        words = torch.randint(-(1 << 31), 1 << 31, (count,), device=device).to(torch.int32)
        return torch.zeros(2, -(-(first + count) // TILE), dtype=torch.int32, device=device), words, first

    # read: the words; the sums are 1/1024 of them
    return Bench(
        "hash_words_", f"{count} words from {first}", make, hash_words_, num_bytes=4 * count, peers={"torch": HASH_WORDS.reference}
    )


def benches() -> Iterator[Bench]:
    """Aligned, and beginning inside a tile at a word of its own."""
    yield _bench(1408 * 2048 // 2, 0)
    yield _bench(128 << 20, 0)
    yield _bench(128 << 20, 4099)
