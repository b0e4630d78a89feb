"""Token files to batches: the pretraining stream cut into windows, and samples packed whole. numpy only.

Owns what a step learns from, and the cursor: its state is the same on every rank and does not depend on how many there are, so a
run goes on exactly where it stopped, also on another number of ranks. Out: :class:`TokenBatch`, this rank's rows ``[b, S]`` with
``b = global_batch_size / world``; rank r has rows ``r*b .. (r+1)*b`` of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1mega.config.errors import UserError
from r1mega.data.order import blend, epoch_items, shuffled
from r1mega.data.packing import pack
from r1mega.data.tokenfile import TokenFile, check_tokenizer

_WINDOWS, _SAMPLES, _ROWS = 0, 1, 2  # keep the orders of one seed apart
_BLOCK_PIECES = 1 << 16  # pieces packed at a time at most; an epoch of fewer is packed as one block


@dataclass(frozen=True)
class TokenBatch:
    """One rank's part of a global batch, all [B, S].

    tokens_BS int64: inputs; labels_BS int64: the next token of the same segment; loss_mask_BS float32: 1 where the label is learnt;
    segment_ids_BS int32: 1, 2, .. for the samples of a row, which do not see each other; 0 is padding. Where there is no label (a
    segment's end, padding) labels_BS holds the end-of-sequence token and loss_mask_BS is 0.
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray
    loss_mask_BS: np.ndarray
    segment_ids_BS: np.ndarray


class _Loader:
    """What both loaders share: files with weights, ranks, the cursor's identity."""

    kind: str
    packing: str

    def __init__(
        self, files: Mapping[str, float], sequence_length: int, global_batch_size: int, seed: int, rank: int = 0, world: int = 1
    ):
        if not files:
            raise UserError("data.train: at least one token file; got none; set data.train={PATH: 1}")
        self.sequence_length, self.global_batch_size = sequence_length, global_batch_size
        self.seed, self.rank, self.world = seed, rank, world
        _rows_of_rank(global_batch_size, rank, world)
        self.files = [_open(path, self.kind) for path in files]
        for file in self.files:
            check_tokenizer(file.meta, tokenizer_hash=self.files[0].meta["tokenizer_hash"], where=str(file.path))
        self.weights = [float(weight) for weight in files.values()]
        for path, weight in files.items():
            if weight <= 0:
                raise UserError(f"data.train: weights are above 0; got {path}: {weight}; drop the file or raise its weight")
        self.consumed = [0] * len(self.files)

    @property
    def metas(self) -> list[dict[str, Any]]:
        """The files' metas, for :func:`r1mega.data.tokenfile.check_tokenizer`."""
        return [file.meta for file in self.files]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON values; equal on all ranks."""
        sources = [
            {"name": file.path.name, "sha256": file.meta["sha256"], "weight": weight, "consumed": consumed}
            for file, weight, consumed in zip(self.files, self.weights, self.consumed, strict=True)
        ]
        which = {"kind": self.kind, "packing": self.packing}
        return {**which, "seed": self.seed, "sequence_length": self.sequence_length, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved cursor. Raises UserError when the files' tokens, weights, sequence length or seed are others."""
        mine = self.state_dict()
        for key in ("kind", "packing", "seed", "sequence_length"):
            if state.get(key, mine[key]) != mine[key]:
                raise UserError(
                    f"data: a run goes on with the {key} it began with; got {mine[key]} for {state[key]}; restore it or start anew"
                )
        saved, now = ([(s["sha256"], s["weight"]) for s in x["sources"]] for x in (state, mine))
        if saved != now:
            names = [", ".join(f"{s['name']}: {s['weight']}" for s in x["sources"]) for x in (state, mine)]
            raise UserError(
                f"data.train: a run goes on with the token files and weights it began with; got {names[1]} for {names[0]} or other "
                "tokens in them; restore them, or start a new run"
            )
        self.consumed = [int(source["consumed"]) for source in state["sources"]]

    def _rows(self, global_batch_size: int | None) -> tuple[int, slice]:
        size = self.global_batch_size if global_batch_size is None else global_batch_size
        return size, _rows_of_rank(size, self.rank, self.world)


class PretrainLoader(_Loader):
    """The files' documents as one stream each, cut into windows of S + 1 tokens (the last is the next one's first), shuffled every
    epoch, blended by weight. Documents are not masked from each other (V3 4.1): segment ids are all 1, every label is learnt."""

    kind, packing = "text", "windows"

    def __init__(
        self, files: Mapping[str, float], sequence_length: int, global_batch_size: int, seed: int, rank: int = 0, world: int = 1
    ):
        """files: path without suffix to weight of its share of windows. Raises UserError for a file shorter than one window."""
        super().__init__(files, sequence_length, global_batch_size, seed, rank, world)
        self.num_windows = [_num_windows(file, sequence_length) for file in self.files]

    def next(self, global_batch_size: int | None = None) -> TokenBatch:
        """This rank's rows of the next global batch; the size may differ from step to step (a multiple of ``world``)."""
        size, mine = self._rows(global_batch_size)
        picks = blend(self.consumed, self.weights, size)
        windows = np.empty((mine.stop - mine.start, self.sequence_length + 1), dtype=np.int64)
        for source, file in enumerate(self.files):
            rows = np.flatnonzero(picks == source)
            items = epoch_items(self.consumed[source], len(rows), self.num_windows[source], [self.seed, _WINDOWS, source])
            for row, item in zip(rows, items, strict=True):
                if mine.start <= row < mine.stop:
                    windows[row - mine.start] = _window(file, item, self.sequence_length)
            self.consumed[source] += len(rows)
        return _text_batch(windows)


class _PackedLoader(_Loader):
    """Pieces packed whole into rows of S tokens: a piece is a document, or a part of one that is longer than a row.

    Pieces come in shuffled epochs, blended by weight. A block of them (one epoch when there are fewer than 65,536) is packed
    best-fit and its rows are shuffled.
    """

    def __init__(
        self, files: Mapping[str, float], sequence_length: int, global_batch_size: int, seed: int, rank: int = 0, world: int = 1
    ):
        """files: path without suffix to weight of its share of pieces."""
        super().__init__(files, sequence_length, global_batch_size, seed, rank, world)
        self.pieces = [_pieces(file, sequence_length) for file in self.files]
        self._block_pieces = min(sum(len(pieces) for pieces in self.pieces), _BLOCK_PIECES)
        self._row = 0
        self._pack_block()

    def next(self, global_batch_size: int | None = None) -> TokenBatch:
        """This rank's rows of the next global batch; the size may differ from step to step (a multiple of ``world``)."""
        size, mine = self._rows(global_batch_size)
        rows = []
        for row in range(size):
            if self._row == len(self._block):
                self.consumed, self._row = self._after_block, 0
                self._pack_block()
            if mine.start <= row < mine.stop:
                rows.append([(self.files[source], self.pieces[source][item]) for source, item in self._block[self._row]])
            self._row += 1
        return _packed_batch(rows, self.sequence_length, self.files[0].meta["eos_id"])

    def state_dict(self) -> dict[str, Any]:
        """The cursor: pieces consumed by the blocks before this one, and rows given of this one."""
        return {**super().state_dict(), "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved cursor. Raises UserError when the files' tokens, weights, sequence length or seed are others."""
        super().load_state_dict(state)
        self._pack_block()
        self._row = int(state["row"])

    def _pack_block(self) -> None:
        """Pack the block that starts at ``consumed`` into ``_block``: for each row a list of (source, piece)."""
        picks = blend(self.consumed, self.weights, self._block_pieces)
        items = np.empty(len(picks), dtype=np.int64)
        after = list(self.consumed)
        for source in range(len(self.files)):
            here = picks == source
            num = int(here.sum())
            items[here] = epoch_items(self.consumed[source], num, len(self.pieces[source]), [self.seed, _SAMPLES, source])
            after[source] += num
        ends = [self.pieces[source][item] for source, item in zip(picks, items, strict=True)]
        rows = pack([int(stop - start) for start, stop, _ in ends], self.sequence_length)
        order = shuffled(np.arange(len(rows)), len(rows), [self.seed, _ROWS, *self.consumed])
        self._block = [[(int(picks[n]), int(items[n])) for n in rows[r]] for r in order]
        self._after_block = after


class DocumentLoader(_PackedLoader):
    """Whole documents of text in rows (V3 4.1; best fit after arXiv 2404.10830); one that is longer than a row is cut into pieces.

    Every label is learnt but that of a document's end. Segment ids count the pieces of a row; here they see each other.
    """

    kind, packing = "text", "documents"


class IsolatedLoader(DocumentLoader):
    """The same rows for a trainer that keeps the documents from each other."""

    packing = "isolated"


class SftLoader(_PackedLoader):
    """Samples packed whole, masked from each other; only answers are learnt. UserError for a sample that is longer than S."""

    kind, packing = "samples", "isolated"


def validation_batches(
    path: str | Path,
    sequence_length: int,
    global_batch_size: int,
    num_batches: int,
    *,
    rank: int = 0,
    world: int = 1,
    windows: bool = True,
) -> list[TokenBatch]:
    """At most ``num_batches`` batches of a text or sample file, the same at every call: windows spread evenly over a text, or, for
    samples and with ``windows`` False, pieces in file order. The last batch is filled up with rows of padding; a text shorter than
    one window is padded as well.
    """
    file = _open(path, None)
    windows = windows and file.meta["kind"] == "text"
    eos = file.meta["eos_id"]
    mine = _rows_of_rank(global_batch_size, rank, world)
    most = num_batches * global_batch_size
    if windows:
        num = max(1, (len(file.tokens) - 1) // sequence_length)
        chosen = np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(np.int64))
        rows: list[Any] = [_window(file, item, sequence_length) for item in chosen]
    else:
        pieces = _pieces(file, sequence_length)
        packed = pack([int(stop - start) for start, stop, _ in pieces], sequence_length, decreasing=False)
        rows = [[(file, pieces[item]) for item in row] for row in packed[:most]]
    batches = []
    for start in range(0, len(rows), global_batch_size):
        part = rows[start : start + global_batch_size]
        part = (part + [[]] * (global_batch_size - len(part)))[mine]
        if windows:
            batches.append(_padded_text_batch(part, sequence_length, eos))
        else:
            batches.append(_packed_batch(part, sequence_length, eos))
    return batches


def _open(path: str | Path, kind: str | None) -> TokenFile:
    file = TokenFile(path)
    if kind is not None and file.meta["kind"] != kind:
        way_out = "pretrain reads text files, sft reads sample files"
        raise UserError(f"{path}: a token file of kind {kind}; got kind {file.meta['kind']}; {way_out}")
    return file


def _rows_of_rank(global_batch_size: int, rank: int, world: int) -> slice:
    if global_batch_size < 1 or global_batch_size % world:
        raise UserError(
            f"trainer.global_batch_size: a multiple of the {world} data-parallel ranks; got {global_batch_size}; "
            f"use {max(1, round(global_batch_size / world)) * world}"
        )
    size = global_batch_size // world
    return slice(rank * size, (rank + 1) * size)


def _num_windows(file: TokenFile, sequence_length: int) -> int:
    num = (len(file.tokens) - 1) // sequence_length
    if num < 1:
        raise UserError(
            f"{file.path}: at least data.sequence_length + 1 = {sequence_length + 1} tokens; got {len(file.tokens)}; "
            "lower data.sequence_length or prepare more text"
        )
    return num


def _check_lengths(file: TokenFile, sequence_length: int) -> None:
    lengths = np.diff(file.starts)
    longest = int(lengths.argmax())
    if lengths[longest] > sequence_length:
        raise UserError(
            f"{file.path} sample {int(np.flatnonzero(lengths > sequence_length)[0])}: a sample fits data.sequence_length "
            f"{sequence_length}; got {int(lengths[lengths > sequence_length][0])} tokens; use at least {int(lengths[longest])}"
        )


def _window(file: TokenFile, item: int, sequence_length: int) -> np.ndarray:
    """Window ``item``: S + 1 tokens, int64; fewer in a text that is shorter."""
    start = int(item) * sequence_length
    return file.tokens[start : start + sequence_length + 1].astype(np.int64)


def _text_batch(windows: np.ndarray) -> TokenBatch:
    tokens, labels = windows[:, :-1].copy(), windows[:, 1:].copy()
    return TokenBatch(tokens, labels, np.ones(tokens.shape, np.float32), np.ones(tokens.shape, np.int32))


def _empty(num_rows: int, sequence_length: int, eos: int) -> TokenBatch:
    shape = (num_rows, sequence_length)
    return TokenBatch(
        np.full(shape, eos, np.int64), np.full(shape, eos, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    )


def _padded_text_batch(rows: list[Any], sequence_length: int, eos: int) -> TokenBatch:
    batch = _empty(len(rows), sequence_length, eos)
    for row, window in enumerate(rows):
        num = max(len(window) - 1, 0)
        if num:
            batch.tokens_BS[row, :num], batch.labels_BS[row, :num] = window[:-1], window[1:]
            batch.loss_mask_BS[row, :num], batch.segment_ids_BS[row, :num] = 1.0, 1
    return batch


def _pieces(file: TokenFile, sequence_length: int) -> np.ndarray:
    """int64 ``[pieces, 3]``: first token, end, and end of what has labels: one more where the document goes on after the piece."""
    starts = np.asarray(file.starts, dtype=np.int64)
    if file.meta["kind"] != "text":
        _check_lengths(file, sequence_length)
    counts = -(-np.diff(starts) // sequence_length)
    doc = np.repeat(np.arange(len(counts)), counts)
    first = starts[doc] + sequence_length * (np.arange(len(doc)) - np.repeat(np.cumsum(counts) - counts, counts))
    stop = np.minimum(first + sequence_length, starts[doc + 1])
    return np.stack([first, stop, np.minimum(stop + 1, starts[doc + 1])], axis=1)


def _packed_batch(rows: list[list[tuple[TokenFile, np.ndarray]]], sequence_length: int, eos: int) -> TokenBatch:
    batch = _empty(len(rows), sequence_length, eos)
    for row, pieces in enumerate(rows):
        start = 0
        for segment, (file, (first, stop, last)) in enumerate(pieces, start=1):
            tokens = file.tokens[first:last]
            learnt = np.ones(last - first, np.float32) if file.mask is None else file.mask[first:last]
            end, labels = start + int(stop - first), int(last - first) - 1
            batch.tokens_BS[row, start:end] = tokens[: stop - first]
            batch.segment_ids_BS[row, start:end] = segment
            batch.labels_BS[row, start : start + labels] = tokens[1:]
            batch.loss_mask_BS[row, start : start + labels] = learnt[1:]
            start = end
    return batch
