"""Loaders: windows, blends, packed rows and cursors that go on exactly, on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from r1mega.config.errors import UserError
from r1mega.data.loader import DocumentLoader, IsolatedLoader, PretrainLoader, SftLoader, validation_batches
from r1mega.data.tokenfile import TokenFileWriter

EOS = 1


def text_file(path, num_tokens, first=10, tokenizer_hash="h"):
    """One document of rising tokens, so that a token says where it stands."""
    with TokenFileWriter(path, vocab_size=60000, eos_id=EOS, tokenizer_hash=tokenizer_hash) as writer:
        writer.add(np.arange(first, first + num_tokens - 1))
    return str(path)


def sample_file(path, lengths, first=100):
    """Samples whose tokens are all ``first + sample``; prompt one token, the rest learnt, eos last."""
    with TokenFileWriter(path, vocab_size=60000, eos_id=EOS, tokenizer_hash="h", kind="samples") as writer:
        for i, length in enumerate(lengths):
            writer.add([first + i] * (length - 1) + [EOS], [0] + [1] * (length - 1))
    return str(path)


def joined(loaders, **kwargs):
    batches = [loader.next(**kwargs) for loader in loaders]
    return np.concatenate([batch.tokens_BS for batch in batches])


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "segment_ids_BS")
    )


def test_windows_by_hand(tmp_path):
    loader = PretrainLoader({text_file(tmp_path / "t", 13): 1.0}, 4, 3, seed=0)
    batch = loader.next()  # 13 tokens: windows 10..14, 14..18, 18..21 and the end of sequence
    assert sorted(batch.tokens_BS[:, 0].tolist()) == [10, 14, 18]
    for tokens, labels in zip(batch.tokens_BS, batch.labels_BS, strict=True):
        start = tokens[0]
        assert tokens.tolist() == [start, start + 1, start + 2, start + 3]
        assert labels.tolist() == [start + 1, start + 2, start + 3, start + 4 if start < 18 else EOS]
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == np.int64
    assert batch.loss_mask_BS.dtype == np.float32 and (batch.loss_mask_BS == 1).all()
    assert batch.segment_ids_BS.dtype == np.int32 and (batch.segment_ids_BS == 1).all()


def test_epochs_are_complete_and_shuffled_anew(tmp_path):
    loader = PretrainLoader({text_file(tmp_path / "t", 10 * 8 + 1): 1.0}, 8, 10, seed=5)
    epochs = [loader.next().tokens_BS[:, 0].tolist() for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10, 90, 8))
    assert epochs[0] != epochs[1] != epochs[2]
    other = PretrainLoader({str(tmp_path / "t"): 1.0}, 8, 10, seed=6)
    assert other.next().tokens_BS[:, 0].tolist() != epochs[0]


def test_blend_keeps_weights(tmp_path):
    files = {text_file(tmp_path / "a", 401): 3.0, text_file(tmp_path / "b", 401, first=5000): 1.0}
    loader = PretrainLoader(files, 4, 8, seed=0)
    for _ in range(5):
        assert (loader.next().tokens_BS[:, 0] >= 5000).sum() == 2  # a quarter of every 8


@pytest.mark.parametrize("kind", ["text", "samples"])
def test_cursor_goes_on_exactly_across_world_sizes(tmp_path, kind):
    if kind == "text":
        files = {text_file(tmp_path / "a", 120): 2.0, text_file(tmp_path / "b", 90, first=5000): 1.0}
        make = PretrainLoader
    else:
        files = {sample_file(tmp_path / "a", [3, 5, 4, 6, 2, 8, 7]): 2.0, sample_file(tmp_path / "b", [4, 4, 3], first=5000): 1.0}
        make = SftLoader
    sizes = [4, 4, 8, 8, 12, 12, 4, 8]  # a ramp, over several epochs
    straight = make(files, 8, 4, seed=3)
    expected = [straight.next(size) for size in sizes]
    for stop in (1, 3, 5):
        first = [make(files, 8, 4, seed=3, rank=rank, world=2) for rank in range(2)]
        for size in sizes[:stop]:
            for loader in first:
                loader.next(size)
        states = [json.loads(json.dumps(loader.state_dict())) for loader in first]
        assert states[0] == states[1]
        second = [make(files, 8, 4, seed=3, rank=rank, world=4) for rank in range(4)]
        for loader in second:
            loader.load_state_dict(states[0])
        for size, batch in zip(sizes[stop:], expected[stop:], strict=True):
            assert np.array_equal(joined(second, global_batch_size=size), batch.tokens_BS)
        assert second[0].state_dict() == straight.state_dict()


def test_state_of_other_data_is_refused(tmp_path):
    a, b = text_file(tmp_path / "a", 100), text_file(tmp_path / "b", 100, first=50)
    state = PretrainLoader({a: 1.0}, 8, 2, seed=1).state_dict()
    for loader, says in (
        (PretrainLoader({b: 1.0}, 8, 2, seed=1), "token files and weights"),
        (PretrainLoader({a: 1.0, b: 1.0}, 8, 2, seed=1), "token files and weights"),
        (PretrainLoader({a: 1.0}, 4, 2, seed=1), "sequence_length it began with; got 4 for 8"),
        (PretrainLoader({a: 1.0}, 8, 2, seed=2), "seed it began with"),
        (DocumentLoader({a: 1.0}, 8, 2, seed=1), "packing it began with; got documents for windows"),
    ):
        with pytest.raises(UserError, match=says):
            loader.load_state_dict(state)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for suffix in ("bin", "idx", "json"):
        (moved / f"a.{suffix}").write_bytes((tmp_path / f"a.{suffix}").read_bytes())
    PretrainLoader({str(moved / "a"): 1.0}, 8, 2, seed=1).load_state_dict(state)  # the same tokens in another folder are the same


@pytest.mark.parametrize(("one", "other"), [(DocumentLoader, PretrainLoader), (DocumentLoader, IsolatedLoader)])
def test_a_run_keeps_its_packing(tmp_path, one, other):
    path = text_file(tmp_path / "a", 100)
    for begun, now in ((one, other), (other, one)):
        with pytest.raises(UserError, match=f"packing it began with; got {now.packing} for {begun.packing}"):
            now({path: 1.0}, 8, 2, seed=1).load_state_dict(begun({path: 1.0}, 8, 2, seed=1).state_dict())


def documents_file(path, lengths):
    """Text with documents of these lengths, the end token not counted; document n is n times 100 + 0, 1, 2, ..."""
    with TokenFileWriter(path, vocab_size=1000, eos_id=EOS, tokenizer_hash="h") as out:
        for number, length in enumerate(lengths, start=1):
            out.add([100 * number + place for place in range(length)])
    return str(path)


def test_documents_in_rows_by_hand(tmp_path):
    """Two short documents share a row; one of 9 + 1 tokens is cut after the eighth, whose label is still the ninth."""
    loader = DocumentLoader({documents_file(tmp_path / "d", [3, 2, 9]): 1.0}, 8, 3, seed=0)
    batch = loader.next()
    rows = {tuple(row): place for place, row in enumerate(batch.tokens_BS.tolist())}
    assert (
        set(rows)
        == {
            (300, 301, 302, 303, 304, 305, 306, 307),
            (100, 101, 102, EOS, 200, 201, EOS, EOS),
            (308, EOS, EOS, EOS, EOS, EOS, EOS, EOS),
        }
        or len(rows) == 2
    )
    long = rows[(300, 301, 302, 303, 304, 305, 306, 307)]
    assert batch.labels_BS[long].tolist() == [301, 302, 303, 304, 305, 306, 307, 308] and batch.loss_mask_BS[long].all()
    assert batch.segment_ids_BS[long].tolist() == [1] * 8


def test_every_token_of_every_document_comes_once_an_epoch(tmp_path):
    lengths = [5, 1, 19, 7, 3, 3, 12, 2, 6]
    loader = DocumentLoader({documents_file(tmp_path / "d", lengths): 1.0}, 8, 1, seed=3)
    rows = len(loader._block)
    seen = []
    for _ in range(rows):
        batch = loader.next()
        tokens, segments = batch.tokens_BS[0], batch.segment_ids_BS[0]
        seen += tokens[(segments > 0) & (tokens != EOS)].tolist()
        inside = batch.loss_mask_BS[0] == 1
        ends = (segments > 0) & ~inside
        assert (tokens[ends] == EOS).all(), "only a document's end has no label"
        assert not inside[segments == 0].any()
    assert sorted(seen) == sorted(100 * number + place for number, length in enumerate(lengths, start=1) for place in range(length))


@pytest.mark.parametrize("kind", [DocumentLoader, IsolatedLoader])
def test_documents_are_the_same_on_any_number_of_ranks_and_after_a_resume(tmp_path, kind):
    path = documents_file(tmp_path / "d", [5, 1, 19, 7, 3, 3, 12, 2, 6])
    whole = kind({path: 1.0}, 8, 4, seed=3)
    parts = [kind({path: 1.0}, 8, 4, seed=3, rank=rank, world=2) for rank in range(2)]
    for _ in range(5):
        batch, halves = whole.next(), [part.next() for part in parts]
        assert (batch.tokens_BS == np.concatenate([half.tokens_BS for half in halves])).all()
    again = kind({path: 1.0}, 8, 4, seed=3)
    again.load_state_dict(whole.state_dict())
    assert (again.next().tokens_BS == whole.next().tokens_BS).all()


def test_validation_of_documents_sees_every_piece_in_order(tmp_path):
    path = documents_file(tmp_path / "d", [3, 2, 9])
    batches = validation_batches(path, 8, 2, 4, windows=False)
    tokens = np.concatenate([batch.tokens_BS[batch.segment_ids_BS > 0] for batch in batches])
    assert sorted(tokens[tokens != EOS].tolist()) == [100, 101, 102, 200, 201, *range(300, 309)]


def test_packed_row_by_hand(tmp_path):
    loader = SftLoader({sample_file(tmp_path / "s", [4, 3]): 1.0}, 8, 1, seed=0)
    batch = loader.next()
    assert batch.tokens_BS.tolist() == [[100, 100, 100, EOS, 101, 101, EOS, EOS]]
    assert batch.segment_ids_BS.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch.labels_BS.tolist() == [[100, 100, EOS, EOS, 101, EOS, EOS, EOS]]
    assert batch.loss_mask_BS.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]  # nothing is learnt across the border or of padding
    assert batch.loss_mask_BS.dtype == np.float32 and batch.segment_ids_BS.dtype == np.int32


def test_prompt_is_not_learnt_and_its_last_position_predicts_the_first_answer_token(tmp_path):
    with TokenFileWriter(tmp_path / "s", vocab_size=99, eos_id=EOS, tokenizer_hash="h", kind="samples") as writer:
        writer.add([7, 8, 9, 20, 21, EOS], [0, 0, 0, 1, 1, 1])
    batch = SftLoader({str(tmp_path / "s"): 1.0}, 6, 1, seed=0).next()
    assert batch.loss_mask_BS.tolist() == [[0, 0, 1, 1, 1, 0]]
    assert batch.labels_BS[batch.loss_mask_BS > 0].tolist() == [20, 21, EOS]


def test_every_sample_whole_and_once_an_epoch(tmp_path):
    lengths = [3, 5, 4, 6, 2, 8, 7, 3, 5]
    loader = SftLoader({sample_file(tmp_path / "s", lengths): 1.0}, 8, 1, seed=2)
    orders = []
    for _ in range(2):
        seen = []
        while sum(length for _, length in seen) < sum(lengths):
            batch = loader.next()
            for segment in range(1, batch.segment_ids_BS.max() + 1):
                tokens = batch.tokens_BS[batch.segment_ids_BS == segment]
                seen.append((int(tokens[0]) - 100, len(tokens)))
        assert sorted(seen) == list(enumerate(lengths))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_too_long_sample_names_file_and_sample(tmp_path):
    path = sample_file(tmp_path / "s", [4, 9, 12])
    with pytest.raises(UserError, match=r"s sample 1: a sample fits data.sequence_length 8; got 9 tokens; use at least 12"):
        SftLoader({path: 1.0}, 8, 1, seed=0)


def test_wrong_use_is_refused(tmp_path):
    text, samples = text_file(tmp_path / "t", 20), sample_file(tmp_path / "s", [4])
    with pytest.raises(UserError, match="at least one token file"):
        PretrainLoader({}, 4, 2, seed=0)
    with pytest.raises(UserError, match="kind text; got kind samples"):
        PretrainLoader({samples: 1.0}, 4, 2, seed=0)
    with pytest.raises(UserError, match="kind samples; got kind text"):
        SftLoader({text: 1.0}, 4, 2, seed=0)
    with pytest.raises(UserError, match="weights are above 0"):
        PretrainLoader({text: 0.0}, 4, 2, seed=0)
    with pytest.raises(UserError, match=r"21 tokens; got 20"):
        PretrainLoader({text: 1.0}, 20, 2, seed=0)
    with pytest.raises(UserError, match="multiple of the 2 data-parallel ranks; got 3; use 4"):
        PretrainLoader({text: 1.0}, 4, 3, seed=0, world=2)
    with pytest.raises(UserError, match="one tokenizer"):
        PretrainLoader({text: 1.0, text_file(tmp_path / "u", 20, tokenizer_hash="other"): 1.0}, 4, 2, seed=0)


def test_validation_batches_are_fixed_and_padded(tmp_path):
    path = text_file(tmp_path / "t", 41)
    batches = validation_batches(path, 8, 2, 10)  # 5 windows: two batches and one that is half padding
    assert [batch.tokens_BS[0, 0] for batch in batches] == [10, 26, 42]
    assert batches[2].segment_ids_BS.tolist() == [[1] * 8, [0] * 8] and batches[2].loss_mask_BS[1].sum() == 0
    again = validation_batches(path, 8, 2, 10)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    few = validation_batches(path, 8, 2, 1)
    assert len(few) == 1 and few[0].tokens_BS[:, 0].tolist() == [10, 42]  # spread over the file
    halves = [validation_batches(path, 8, 2, 10, rank=rank, world=2) for rank in range(2)]
    assert np.array_equal(np.concatenate([half[0].tokens_BS for half in halves]), batches[0].tokens_BS)


def test_validation_of_short_text_and_of_samples(tmp_path):
    (batch,) = validation_batches(text_file(tmp_path / "t", 4), 8, 1, 3)
    assert batch.tokens_BS.tolist() == [[10, 11, 12] + [EOS] * 5] and batch.labels_BS[0, :3].tolist() == [11, 12, EOS]
    assert batch.loss_mask_BS.sum() == 3 and batch.segment_ids_BS.sum() == 3
    batches = validation_batches(sample_file(tmp_path / "s", [5, 5, 3]), 8, 1, 9)
    assert [batch.tokens_BS[0, 0] for batch in batches] == [100, 101]
    assert [int(batch.segment_ids_BS.max()) for batch in batches] == [1, 2]
