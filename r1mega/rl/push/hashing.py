"""The two 64-bit hashes that SGLang's /weights_checker knows, taken of tensors that come in pieces, so that nothing is assembled.

A server on a CPU hashes bytes with SHA-256, of which the first eight count. A server on a GPU sums, in tiles of 8192 words of 32
bits, ``mix(word ^ place(index))`` with murmur's finaliser ``mix`` and two seeds, mixes each tile's two sums with the length, and
adds up the tiles; places make it depend on the order. Sums do not care which piece comes first, so this one needs no order at all.
In: pieces with their offsets. Out: 16 hexadecimal digits, as the server writes them.
"""

from __future__ import annotations

import hashlib

import torch

from r1mega.ops.hash_words import TILE, hash_words_, mix, signed

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
    """SGLang's hash of a GPU tensor, taken on the pieces' own device; the same bits on every device."""

    def __init__(self, nbytes: int, device: torch.device):
        self._words = -(-nbytes // 4)
        self._sums = torch.zeros(2, -(-self._words // TILE), dtype=torch.int32, device=device)
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
        if data.data_ptr() % 4:
            data = data.clone()
        hash_words_(self._sums, data.view(torch.int32), start // 4)

    def zeros(self, start: int, nbytes: int) -> None:
        """As :meth:`Sha.zeros`."""
        self.put(start, torch.zeros(nbytes, dtype=torch.uint8, device=self._device))

    def hex(self) -> str:
        """Once every byte has come."""
        if self._loose is not None:
            self._add_loose()
        if not self._words:
            return f"{0:016x}"
        mixed = mix(self._sums ^ signed(self._words * 4)).to(torch.int64) & MASK32
        first, second = mixed.sum(1).tolist()
        return f"{_spread((first << 32) + second & MASK64):016x}"

    def _add_loose(self) -> None:
        """Words that pieces share; a word has either all its bytes here or none."""
        data, seen = self._loose[0].view(torch.int32), self._loose[1].view(torch.int32) != 0
        runs = torch.nonzero(seen).flatten().tolist()
        begin = 0
        for at in range(1, len(runs) + 1):
            if at == len(runs) or runs[at] != runs[at - 1] + 1:
                hash_words_(self._sums, data[runs[begin] : runs[at - 1] + 1], runs[begin])
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


def _spread(x: int) -> int:
    """Splitmix64's finaliser."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31
