"""Op ``hash_words_``: the sums of a 64-bit hash over 32-bit words, of which pieces may come in any order.

For tiles of 8192 words, in arithmetic modulo 2**32, with murmur3's finaliser mix and two pairs of a factor and a seed:

    sums[k, i // 8192] += mix(word_i ^ (i factor_k + seed_k) ^ rotate_left(i, turn_k))

It is what SGLang's ``gpu_tensor_hash`` sums; :mod:`r1mega.rl.push.hashing` makes the hash of the sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from r1mega.ops.library import Case, Op

TILE = 8192
"""Words of 32 bits."""
SEED = 0x243F6A88
KINDS = ((0x27D4EB2D, 15, SEED), (0x165667B1, 13, (SEED * 0x9E3779B1) ^ 0xDEADBEEF))
"""Factor of the index, how far it is turned, seed."""
STEP = 512 * TILE
"""Words that the reference mixes at once."""


def hash_words_(sums: torch.Tensor, words_N: torch.Tensor, first: int) -> None:
    """Add words ``first`` to ``first + N`` of a tensor to its sums, in place.

    ``sums``: int32 ``[2, tiles]``, contiguous, zeros before the first words; ``words_N``: int32, any stride, on the same device;
    ``first`` at least 0, below 2**32 with N. The same bits on every device, whatever pieces the words come in. No gradient, no wait
    for the device. Raises ValueError for words beyond the last tile.
    """
    HASH_WORDS.packet(sums, words_N, first)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Murmur3's finaliser of 32 bits, in int32 that wraps."""
    x = x ^ _right(x, 16)
    x = x.mul_(signed(0x85EBCA6B))
    x = x.bitwise_xor_(_right(x, 13)).mul_(signed(0xC2B2AE35))
    return x.bitwise_xor_(_right(x, 16))


def signed(value: int) -> int:
    """The low 32 bits as int32 has them."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value > 0x7FFFFFFF else value


def _right(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift without the sign."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def _reference(sums, words, first):
    done = 0
    while done < words.numel():
        at = first + done
        part = words[done : done + STEP - at % TILE]
        index = torch.arange(at, at + part.numel(), device=words.device)
        index = torch.where(index > 0x7FFFFFFF, index - (1 << 32), index).to(torch.int32)
        begin, end = at // TILE, -(-(at + part.numel()) // TILE)
        for row, (factor, turn, seed) in enumerate(KINDS):
            turned = (index << turn) | _right(index, 32 - turn)
            mixed = mix(part ^ (index * signed(factor) + signed(seed)) ^ turned)
            mixed = F.pad(mixed, (at % TILE, end * TILE - at - part.numel()))
            total = sums[row, begin:end] + mixed.view(-1, TILE).sum(1)
            total = total & 0xFFFFFFFF
            sums[row, begin:end] = torch.where(total > 0x7FFFFFFF, total - (1 << 32), total).to(torch.int32)
        done += part.numel()


def _fake(*args):
    """In place: there is no output to describe."""


def _case(count: int, first: int = 0, tiles: int | None = None, *, strided: bool = False, offset: int = 0, fill: int | None = None):
    def make(dtype, device):
        draw = torch.Generator().manual_seed(count)
        words = torch.randint(-(1 << 31), 1 << 31, (offset + count,), generator=draw).to(torch.int32)
        words = words if fill is None else torch.full_like(words, fill)
        sums = torch.randint(-(1 << 31), 1 << 31, (2, -(-(first + count) // TILE) if tiles is None else tiles), generator=draw)
        words = words.to(device)[offset:]
        return sums.to(device, torch.int32), torch.stack([words, words], 1)[:, 0] if strided else words, first

    return make


HASH_WORDS = Op(
    "hash_words_(Tensor(a!) sums, Tensor words, int first) -> ()",
    _reference,
    _fake,
    cases=(
        Case("ordinary", _case(2 * TILE)),
        Case("none", _case(0, 5, 1)),
        Case("no tiles", _case(0)),
        Case("one word", _case(1, 8191)),
        Case("within a tile", _case(1000, 3000, 3)),
        Case("ragged", _case(3 * TILE + 17, 8190)),
        Case("not aligned", _case(TILE + 9, 5, offset=3)),
        Case("non-contiguous", _case(9000, strided=True)),
        Case("zeros", _case(9000, fill=0)),
        Case("all bits", _case(9000, fill=-1)),
    ),
    dtypes=(torch.float32,),
)
OPS = (HASH_WORDS,)
