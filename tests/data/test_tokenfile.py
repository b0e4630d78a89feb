"""Token files: what is written is read back; what is damaged is refused with the file, the expected and the actual size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from r1mega.config.errors import UserError
from r1mega.data.tokenfile import TokenFile, TokenFileWriter, check_tokenizer


def write(path, docs, kind="text", vocab_size=100, masks=None):
    with TokenFileWriter(path, vocab_size=vocab_size, eos_id=1, tokenizer_hash="abc", kind=kind) as writer:
        for i, doc in enumerate(docs):
            writer.add(doc, masks[i] if masks else None)
    return path


def test_text_round_trip_ends_each_document_once(tmp_path):
    file = TokenFile(write(tmp_path / "a.b", [[5, 6], [7, 1]]))
    assert file.tokens.tolist() == [5, 6, 1, 7, 1]
    assert file.starts.tolist() == [0, 3, 5] and len(file) == 2
    assert file.document(1).tolist() == [7, 1] and file.document(0).dtype == np.int64
    assert file.mask is None
    assert (tmp_path / "a.b.bin").stat().st_size == 10
    assert file.meta["dtype"] == "uint16" and file.meta["num_tokens"] == 5 and file.meta["kind"] == "text"
    file.verify()
    with pytest.raises(ValueError, match="only samples"):
        file.document_mask(0)


def test_samples_keep_their_mask_and_large_vocabularies_take_four_bytes(tmp_path):
    file = TokenFile(write(tmp_path / "s", [[70000, 5, 1], [2, 1]], "samples", 70001, [[0, 1, 1], [0, 1]]))
    assert file.meta["dtype"] == "uint32" and file.document(0).tolist() == [70000, 5, 1]
    assert file.document_mask(0).tolist() == [0, 1, 1] and file.document_mask(1).tolist() == [0, 1]


@pytest.mark.parametrize("doc", [[], [100], [-1]])
def test_writer_refuses_tokens_outside_the_vocabulary(tmp_path, doc):
    with pytest.raises(ValueError, match=r"tokens in 0\.\.99"):
        write(tmp_path / "a", [[3], doc])
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_masks_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="0 or 1 a token"):
        write(tmp_path / "a", [[3, 4]], "samples", masks=[[1]])
    with pytest.raises(ValueError, match="samples have a mask"):
        write(tmp_path / "a", [[3, 4]], "samples")
    with pytest.raises(ValueError, match="kind is one of"):
        write(tmp_path / "a", [[3, 4]], "pictures")


def test_failed_rewrite_keeps_the_old_file(tmp_path):
    write(tmp_path / "a", [[3, 4]])
    with pytest.raises(RuntimeError), TokenFileWriter(tmp_path / "a", vocab_size=9, eos_id=1, tokenizer_hash="x") as writer:
        writer.add([2])
        raise RuntimeError("stopped")
    assert TokenFile(tmp_path / "a").document(0).tolist() == [3, 4, 1]
    assert len(list(tmp_path.iterdir())) == 3


def test_rewriting_samples_as_text_leaves_no_mask(tmp_path):
    write(tmp_path / "a", [[3, 1]], "samples", masks=[[0, 1]])
    write(tmp_path / "a", [[4]])
    assert not (tmp_path / "a.mask").exists() and TokenFile(tmp_path / "a").tokens.tolist() == [4, 1]


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(UserError, match="at least one document"):
        write(tmp_path / "a", [])
    assert list(tmp_path.iterdir()) == []


def test_truncated_empty_and_missing_parts_name_file_and_sizes(tmp_path):
    path = write(tmp_path / "a", [[3, 1], [4, 1]], "samples", masks=[[0, 1], [0, 1]])
    for part, size in (("bin", 8), ("idx", 24), ("mask", 4)):
        file = tmp_path / f"a.{part}"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=rf"a\.{part}: expected {size} bytes; got {size - 1} bytes"):
            TokenFile(path)
        file.write_bytes(b"")
        with pytest.raises(UserError, match=rf"a\.{part}: expected {size} bytes; got an empty file"):
            TokenFile(path)
        file.unlink()
        with pytest.raises(UserError, match=rf"a\.{part}: expected {size} bytes; got no such file"):
            TokenFile(path)
        file.write_bytes(whole)
    assert len(TokenFile(path)) == 2


def test_damaged_meta_index_and_tokens_are_refused(tmp_path):
    path = write(tmp_path / "a", [[3], [4]])
    meta_file = tmp_path / "a.json"
    meta = json.loads(meta_file.read_text())
    for text, says in (
        ("", "meta is JSON"),
        ("[]", "got no dtype"),
        (json.dumps({**meta, "dtype": "float"}), "dtype 'float'"),
        (json.dumps({**meta, "num_docs": 0}), "at least one document"),
    ):
        meta_file.write_text(text)
        with pytest.raises(UserError, match=says):
            TokenFile(path)
    meta_file.write_text(json.dumps(meta))
    np.array([0, 4, 3], "<i8").tofile(tmp_path / "a.idx")
    with pytest.raises(UserError, match="rise from 0 to 4"):
        TokenFile(path)
    np.array([0, 2, 4], "<i8").tofile(tmp_path / "a.idx")
    np.array([3, 1, 5, 1], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="sha256"):
        TokenFile(path).verify()
    with pytest.raises(UserError, match="no such file"):
        TokenFile(tmp_path / "other")


def test_check_tokenizer():
    meta = {"tokenizer_hash": "aaa", "vocab_size": 50}
    check_tokenizer(meta, tokenizer_hash="aaa", vocab_size=50)
    with pytest.raises(UserError, match="one tokenizer; got aaa for bbb"):
        check_tokenizer(meta, tokenizer_hash="bbb")
    with pytest.raises(UserError, match="got model.vocab_size 49; use at least 50"):
        check_tokenizer(meta, vocab_size=49)
