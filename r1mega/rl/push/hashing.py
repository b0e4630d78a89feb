"""The two 64-bit hashes that SGLang's /weights_checker knows, taken of tensors that come in pieces, so that nothing is assembled.

A server on a CPU hashes bytes with SHA-256, of which the first eight count. A server on a GPU sums, in tiles of 8192 words of 32
bits, ``mix(word ^ place(index))`` with murmur's finaliser ``mix`` and two seeds, mixes each tile's two sums with the length, and
adds up the tiles; places make it depend on the order. Sums do not care which piece comes first, so this one needs no order at all.
In: pieces with their offsets. Out: 16 hexadecimal digits, as the server writes them.
"""

from __future__ import annotations

import hashlib

import torch

TILE = 8192
"""Words of 32 bits."""
STEP = 512 * TILE
"""Words hashed at once: what it takes between is a few times that."""
SEED = 0x243F6A88
SEEDS = (SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))
"""Factor of the index, and how far it is turned."""
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


class Sha:
    """SHA-256 of bytes that come in order, or nearly: a piece before its turn is kept as a copy."""

    def __init__(self, nbytes: int, device: torch.device):
        self._hash, self._at, self._early = hashlib.sha256(), 0, {}

    def put(self, start: int, piece: torch.Tensor) -> None:
        """``piece``: its numbers are the bytes from ``start`` on."""
        if start != self._at:
            self._early[start] = octets(piece).clone()
            return
        self._take(octets(piece))
        while self._at in self._early:
            self._take(self._early.pop(self._at))

    def zeros(self, start: int, nbytes: int) -> None:
        """Bytes that no piece has."""
        self.put(start, torch.zeros(nbytes, dtype=torch.uint8))

    def hex(self) -> str:
        """Once every byte has come."""
        return self._hash.hexdigest()[:16]

    def _take(self, data: torch.Tensor) -> None:
        data = data.cpu()
        self._hash.update(memoryview(data.numpy()))
        self._at += data.numel()


class Tiles:
    """SGLang's hash of a GPU tensor, in plain torch on the pieces' own device. Bits are independent of the device."""

    def __init__(self, nbytes: int, device: torch.device):
        self._words = -(-nbytes // 4)
        self._sums = torch.zeros(2, -(-self._words // TILE), dtype=torch.int64, device=device)
        self._loose: torch.Tensor | None = None  # all bytes, where a piece does not begin or end with a word
        self._nbytes, self._device = nbytes, device

    def put(self, start: int, piece: torch.Tensor) -> None:
        """As :meth:`Sha.put`, in any order."""
        data = octets(piece)
        whole = not start % 4 and (not data.numel() % 4 or start + data.numel() == self._nbytes)
        if not whole:
            if self._loose is None:
                self._loose = torch.zeros(2, 4 * self._words, dtype=torch.uint8, device=self._device)
            self._loose[0, start : start + data.numel()] = data
            self._loose[1, start : start + data.numel()] = 255
            return
        if tail := data.numel() % 4:
            data = torch.nn.functional.pad(data, (0, 4 - tail))
        if data.storage_offset() % 4:
            data = data.clone()
        self._add(start // 4, data.view(torch.int32))

    def zeros(self, start: int, nbytes: int) -> None:
        """As :meth:`Sha.zeros`."""
        self.put(start, torch.zeros(nbytes, dtype=torch.uint8, device=self._device))

    def hex(self) -> str:
        """Once every byte has come."""
        if self._loose is not None:
            self._add_loose()
        if not self._words:
            return f"{0:016x}"
        nbytes = torch.tensor(_signed(self._words * 4), dtype=torch.int32, device=self._device)
        # sums are of 32 bits: what is above wraps
        first, second = (_mix(_low(sums) ^ nbytes).to(torch.int64) & MASK32 for sums in self._sums)
        total = (int(first.sum()) << 32) + int(second.sum())
        return f"{_spread(total & MASK64):016x}"

    def _add(self, start: int, words: torch.Tensor) -> None:
        """The sums of words that begin at word ``start``."""
        done = 0
        while done < words.numel():
            at = start + done
            part = words[done : done + STEP - at % TILE]
            index = torch.arange(at, at + part.numel(), dtype=torch.int32, device=self._device)
            begin, end = at // TILE, -(-(at + part.numel()) // TILE)
            for row, ((factor, turn), seed) in enumerate(zip(PLACES, SEEDS, strict=True)):
                mixed = _mix(part ^ _place(index, factor, turn, seed))
                mixed = torch.nn.functional.pad(mixed, (at % TILE, end * TILE - at - part.numel()))
                self._sums[row, begin:end] += mixed.view(-1, TILE).sum(1)
            done += part.numel()

    def _add_loose(self) -> None:
        """Words that pieces share; a word has either all its bytes here or none."""
        data, seen = self._loose[0].view(torch.int32), self._loose[1].view(torch.int32) != 0
        runs = torch.nonzero(seen).flatten().tolist()
        begin = 0
        for at in range(1, len(runs) + 1):
            if at == len(runs) or runs[at] != runs[at - 1] + 1:
                self._add(runs[begin], data[runs[begin] : runs[at - 1] + 1])
                begin = at
        self._loose = None


def octets(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes in order, flat: a view where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def content_hash(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes alone, whatever layout made it: 16 digits, of the kind that its device takes fastest."""
    taken = (Sha if tensor.device.type == "cpu" else Tiles)(tensor.numel() * tensor.element_size(), tensor.device)
    taken.put(0, tensor)
    return taken.hex()


def _place(index: torch.Tensor, factor: int, turn: int, seed: int) -> torch.Tensor:
    turned = (index << turn) | _right(index, 32 - turn)
    return (index * _signed(factor) + _signed(seed)).bitwise_xor_(turned)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Murmur3's finaliser of 32 bits, in int32 that wraps."""
    x = x ^ _right(x, 16)
    x = x.mul_(_signed(0x85EBCA6B))
    x = x.bitwise_xor_(_right(x, 13)).mul_(_signed(0xC2B2AE35))
    return x.bitwise_xor_(_right(x, 16))


def _right(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift without the sign."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def _low(sums: torch.Tensor) -> torch.Tensor:
    """The low 32 bits as int32."""
    low = sums & MASK32
    return torch.where(low > 0x7FFFFFFF, low - (1 << 32), low).to(torch.int32)


def _signed(value: int) -> int:
    """32 bits as int32 has them."""
    value &= MASK32
    return value - (1 << 32) if value > 0x7FFFFFFF else value


def _spread(x: int) -> int:
    """Splitmix64's finaliser."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31
