"""Memory-mapped token files: NAME.bin, NAME.idx, NAME.json and, for samples, NAME.mask.

Owns the format. NAME.bin: tokens, little-endian uint16 (vocabulary up to 65,536) or uint32; NAME.idx: int64 document starts
[num_docs + 1], the last one num_tokens; NAME.mask: uint8 a token, 1 where it is to be learnt; NAME.json: the meta. A document of
kind "text" always ends with the end-of-sequence token, so the file is the training stream as it lies. Refuses files whose sizes
disagree with the meta. A file is written aside and renamed, the meta last: without a meta there is no token file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1mega.config.errors import UserError

KINDS = ("text", "samples")
_META_KEYS = ("dtype", "num_tokens", "num_docs", "vocab_size", "eos_id", "tokenizer_hash", "sha256", "kind")
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def _part(path: str | Path, suffix: str) -> Path:
    return Path(f"{path}.{suffix}")  # not with_suffix: a name may contain dots


class TokenFileWriter:
    """Writes one token file document by document; use as a context manager. An error inside leaves nothing behind."""

    def __init__(self, path: str | Path, *, vocab_size: int, eos_id: int, tokenizer_hash: str, kind: str = "text"):
        """``path`` without suffix; its folder is made. Raises ValueError for an unknown kind."""
        if kind not in KINDS:
            raise ValueError(f"tokenfile: kind is one of {', '.join(KINDS)}; got {kind!r}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._dtype = _DTYPES[dtype]
        self._meta: dict[str, Any] = {
            "dtype": dtype, "num_tokens": 0, "num_docs": 0, "vocab_size": vocab_size, "eos_id": eos_id,
            "tokenizer_hash": tokenizer_hash, "sha256": "", "kind": kind,
        }  # fmt: skip
        self._suffixes = ["bin", "idx", "mask"] if kind == "samples" else ["bin", "idx"]
        self._aside = {suffix: Path(f"{self.path}.{suffix}.{os.getpid()}.tmp") for suffix in self._suffixes}
        self._out = {suffix: aside.open("wb") for suffix, aside in self._aside.items()}
        self._hash = hashlib.sha256()
        self._out["idx"].write(np.zeros(1, "<i8").tobytes())

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._meta["num_tokens"]

    @property
    def num_docs(self) -> int:
        """Documents written so far."""
        return self._meta["num_docs"]

    def add(self, ids: Sequence[int] | np.ndarray, mask: Sequence[int] | np.ndarray | None = None) -> None:
        """Append one document. ids: [L], L above 0; mask: 0 or 1 [L], for samples only. Text gets its end of sequence here.

        Raises ValueError for an empty document, a token outside the vocabulary or a mask that does not fit.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        meta = self._meta
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= meta["vocab_size"]:
            span = f"{tokens.min()}..{tokens.max()}" if tokens.size else "no token"
            raise ValueError(f"{self.path}: a document has tokens in 0..{meta['vocab_size'] - 1}; got {span}; check the tokenizer")
        if (mask is not None) != (meta["kind"] == "samples"):
            raise ValueError(f"{self.path}: samples have a mask and text has none; got kind {meta['kind']}; give or drop mask")
        if meta["kind"] == "text" and tokens[-1] != meta["eos_id"]:
            tokens = np.append(tokens, meta["eos_id"])
        if mask is not None:
            learnt = np.asarray(mask, dtype=np.uint8)
            if learnt.shape != tokens.shape or learnt.max() > 1:
                raise ValueError(
                    f"{self.path}: a mask is 0 or 1 a token; got {learnt.shape} for {tokens.shape} tokens; check the sample"
                )
            self._out["mask"].write(learnt.tobytes())
        data = tokens.astype(self._dtype).tobytes()
        self._out["bin"].write(data)
        self._hash.update(data)
        meta["num_tokens"] += int(tokens.size)
        meta["num_docs"] += 1
        self._out["idx"].write(np.array([meta["num_tokens"]], "<i8").tobytes())

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        for out in self._out.values():
            out.close()
        try:
            if error is None:
                self._publish()
        finally:
            for aside in self._aside.values():
                aside.unlink(missing_ok=True)

    def _publish(self) -> None:
        if self.num_docs == 0:
            raise UserError(f"{self.path}: a token file holds at least one document; got none; check what it is made from")
        self._meta["sha256"] = self._hash.hexdigest()
        meta_aside = Path(f"{self.path}.json.{os.getpid()}.tmp")
        meta_aside.write_text(json.dumps(self._meta, indent=1) + "\n", encoding="utf-8")
        _part(self.path, "json").unlink(missing_ok=True)  # an old meta must not describe new tokens
        for suffix, aside in self._aside.items():
            os.replace(aside, _part(self.path, suffix))
        if self._meta["kind"] == "text":
            _part(self.path, "mask").unlink(missing_ok=True)
        os.replace(meta_aside, _part(self.path, "json"))


class TokenFile:
    """One token file, memory-mapped: ``tokens`` uint16/uint32 [num_tokens], ``starts`` int64 [num_docs + 1], ``mask`` uint8 or
    None."""

    def __init__(self, path: str | Path):
        """``path`` without suffix. Raises UserError for a part that is missing, empty or of another size than the meta says."""
        self.path = Path(path)
        self.meta = _read_meta(_part(path, "json"))
        dtype = _DTYPES[self.meta["dtype"]]
        num_tokens, num_docs = self.meta["num_tokens"], self.meta["num_docs"]
        self.tokens = _map(_part(path, "bin"), dtype, num_tokens)
        self.starts = _map(_part(path, "idx"), np.dtype("<i8"), num_docs + 1)
        self.mask = _map(_part(path, "mask"), np.dtype("u1"), num_tokens) if self.meta["kind"] == "samples" else None
        if self.starts[0] != 0 or self.starts[-1] != num_tokens or (np.diff(self.starts) <= 0).any():
            raise UserError(
                f"{_part(path, 'idx')}: document starts rise from 0 to {num_tokens}; got {self.starts[0]} to {self.starts[-1]} or "
                "a step back; write the token file again"
            )

    def __len__(self) -> int:
        return self.meta["num_docs"]

    def document(self, doc_idx: int) -> np.ndarray:
        """Tokens of one document, int64 [L]."""
        return self.tokens[self.starts[doc_idx] : self.starts[doc_idx + 1]].astype(np.int64)

    def document_mask(self, doc_idx: int) -> np.ndarray:
        """Mask of one sample, uint8 [L]. Raises ValueError for a text file."""
        if self.mask is None:
            raise ValueError(f"{self.path}: only samples have a mask; got kind text; use document")
        return np.asarray(self.mask[self.starts[doc_idx] : self.starts[doc_idx + 1]])

    def verify(self) -> None:
        """Read all tokens and compare their sha256 with the meta. Raises UserError when they differ."""
        digest = hashlib.sha256(self.tokens).hexdigest()
        if digest != self.meta["sha256"]:
            raise UserError(f"{_part(self.path, 'bin')}: sha256 is {self.meta['sha256']}; got {digest}; write the token file again")


def check_tokenizer(
    meta: dict[str, Any], *, tokenizer_hash: str | None = None, vocab_size: int | None = None, where: str = "data"
) -> None:
    """Refuse a token file of another tokenizer, or of a vocabulary that the model's embedding does not hold.

    vocab_size: rows of the model's embedding. Raises UserError.
    """
    if tokenizer_hash is not None and meta["tokenizer_hash"] != tokenizer_hash:
        raise UserError(
            f"{where}: all token files and the model share one tokenizer; got {meta['tokenizer_hash'][:12]} for "
            f"{tokenizer_hash[:12]}; prepare the data with tokenizer.path of that tokenizer"
        )
    if vocab_size is not None and meta["vocab_size"] > vocab_size:
        raise UserError(
            f"{where}: the model's vocabulary holds the tokenizer's {meta['vocab_size']} tokens; got model.vocab_size {vocab_size}"
            f"; use at least {meta['vocab_size']}"
        )


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: a token file is NAME.json with NAME.bin and NAME.idx; got no such file; give NAME without suffix")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: a token file's meta is JSON; got {error}; write the token file again") from None
    missing = [key for key in _META_KEYS if not isinstance(meta, dict) or key not in meta]
    if missing or meta["dtype"] not in _DTYPES or meta["kind"] not in KINDS:
        got = f"no {missing[0]}" if missing else f"dtype {meta['dtype']!r}, kind {meta['kind']!r}"
        raise UserError(f"{path}: a token file's meta has {', '.join(_META_KEYS)}; got {got}; write the token file again")
    if meta["num_tokens"] < 1 or meta["num_docs"] < 1:
        raise UserError(f"{path}: a token file holds at least one document; got {meta['num_docs']}; write the token file again")
    return meta


def _map(path: Path, dtype: np.dtype, num: int) -> np.ndarray:
    """``num`` items of ``path`` as a read-only memory map, or a UserError with expected and actual bytes."""
    expected = num * dtype.itemsize
    if not path.is_file():
        raise UserError(f"{path}: expected {expected} bytes; got no such file; write the token file again")
    actual = path.stat().st_size
    if actual != expected:
        state = "an empty file" if actual == 0 else f"{actual} bytes"
        raise UserError(f"{path}: expected {expected} bytes; got {state}; write or copy the token file again")
    return np.memmap(path, dtype=dtype, mode="r", shape=(num,))
