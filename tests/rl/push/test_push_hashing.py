"""The hashes of /weights_checker against their definitions, word by word, and whatever pieces a tensor comes in."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

from r1mega.rl.push.hashing import Sha, Tiles, content_hash

MASK = (1 << 32) - 1


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK
    x ^= x >> 13
    x = x * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def tiled(data: bytes) -> str:
    """SGLang's gpu_tensor_hash in plain Python."""
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    seed, total, whole = 0x243F6A88, 0, (1 << 64) - 1
    kinds = ((0x27D4EB2D, 15, seed), (0x165667B1, 13, ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & MASK))
    for tile in range(0, len(words), 8192):
        halves = []
        for factor, turn, start in kinds:
            sums = 0
            for index in range(tile, min(tile + 8192, len(words))):
                place = (index * factor + start & MASK) ^ ((index << turn | index >> (32 - turn)) & MASK)
                sums = sums + mix(words[index] ^ place) & MASK
            halves.append(mix(sums ^ (len(words) * 4 & MASK)))
        total = total + (halves[0] << 32 | halves[1]) & whole
    total ^= total >> 30
    total = total * 0xBF58476D1CE4E5B9 & whole
    total ^= total >> 27
    total = total * 0x94D049BB133111EB & whole
    return f"{total ^ total >> 31:016x}"


@pytest.mark.parametrize("size", [1, 3, 4, 100, 8192 * 4, 8192 * 4 * 2 + 10])
def test_any_pieces_give_the_hash_of_the_whole(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    raw = data.numpy().tobytes()
    for cuts in ([0, size], [0, size // 3, size // 2, size], [0, size // 8 * 4, size]):
        pieces = [(first, data[first:last]) for first, last in itertools.pairwise(cuts) if last > first]
        for kind, expected in ((Sha, hashlib.sha256(raw).hexdigest()[:16]), (Tiles, tiled(raw))):
            for order in (pieces, pieces[::-1]):
                taken = kind(size, data.device)
                for start, piece in order:
                    taken.put(start, piece)
                assert taken.hex() == expected, (kind, cuts)


def test_zeros_count_and_layout_does_not():
    x = torch.randn(6, 10)
    for kind in (Sha, Tiles):
        whole, parts = kind(400, x.device), kind(400, x.device)
        whole.put(0, torch.cat([x.flatten(), torch.zeros(40)]))
        parts.put(0, x)
        parts.zeros(240, 160)
        assert whole.hex() == parts.hex()
    assert content_hash(x) == content_hash(x.t().contiguous().t()) != content_hash(x.t())
    assert content_hash(x) != content_hash(x.double())


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits():
    x = torch.randn(1000, 333)
    taken = [Tiles(x.numel() * 4, device) for device in (torch.device("cpu"), torch.device("cuda"))]
    for one, tensor in zip(taken, (x, x.cuda()), strict=True):
        one.put(0, tensor)
    assert taken[0].hex() == taken[1].hex()
