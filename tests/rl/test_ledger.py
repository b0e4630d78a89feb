"""The ledger: what survives of its files after any cut or damage, and which faults its audit finds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from r1mega.config.errors import UserError
from r1mega.rl.ledger import History, Ledger, next_start, read
from r1mega.rl.rollouts import recorded, restored
from tests.rl.ledgers import ROUTING, sample, write_drop, write_run, write_samples, write_use


def shown(folder: Path) -> list[tuple[str, str]]:
    return [(frame.kind, frame.id) for frame in read(folder)]


def test_what_is_written_is_read(tmp_path) -> None:
    ledger = Ledger(tmp_path, 3, 1, 7, 14)
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False]), "none": np.zeros(0, np.int32)}
    assert ledger.write("sample", {"item": 4, "text": "é\n"}, arrays) == "3.1.1" and ledger.write("use", {}) == "3.1.2"
    ledger.write("back", {"rollout": 5, "update": 10})
    ledger.write("use", {})
    ledger.close()
    ledger.close()
    start, made, *others = list(read(tmp_path))
    assert start.values == {"rollout": 7, "update": 14} and (made.kind, made.values["text"]) == ("sample", "é\n")
    assert [(frame.id, frame.returns) for frame in others] == [("3.1.2", 0), ("3.1.3", 1), ("3.1.4", 1)]
    found = made.arrays()
    assert found.keys() == arrays.keys() and all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert {name: array.dtype for name, array in found.items()} == {name: array.dtype for name, array in arrays.items()}
    assert others[-1].end == others[-1].path.stat().st_size and next_start(tmp_path) == 4 and next_start(tmp_path / "none") == 1
    assert list(read(tmp_path, 4)) == []
    with pytest.raises(FileExistsError):
        Ledger(tmp_path, 3, 1, 0, 0)  # a start never writes into another one's file


def test_a_sample_comes_back_whole(tmp_path) -> None:
    one = sample(
        2,
        1,
        5,
        own=[True, False, True, True],
        turns=2,
        versions=((4, 0, 3), (5, 3, 4)),
        routing=ROUTING,
        failure="late",
        note="of 3",
    )
    one.id = Ledger(tmp_path, 1, 0, 0, 0).write("sample", *recorded(one))
    frame = list(read(tmp_path))[1]
    again = restored(frame, one.problem)
    assert len(frame.values["routing_sha256"]) == 16 and frame.values["rewards"] == {"accuracy": [1.0, 0.25, "late", "of 3"]}
    one.completion = type(one.completion)(*list(vars(one.completion).values())[:4])  # routing is kept as its hash
    assert again == one


def test_a_tail_cut_at_any_byte_loses_its_frame_alone(tmp_path) -> None:
    write_run(tmp_path / "whole")
    (path,) = (tmp_path / "whole").iterdir()
    data, frames = path.read_bytes(), list(read(tmp_path / "whole"))
    begin, whole = frames[-2].end, shown(tmp_path / "whole")
    cut = tmp_path / "cut"
    cut.mkdir()
    for size in range(begin, len(data)):
        (cut / path.name).write_bytes(data[:size])
        assert shown(cut) == whole[:-1], size
    assert History(cut).uses().keys() == {1}
    (cut / path.name).write_bytes(data)
    assert shown(cut) == whole
    (cut / path.name).write_bytes(data[: frames[0].end - 1])
    with pytest.raises(UserError, match="a run of r1mega rl has a ledger; got none; give run=DIR of such a run"):
        History(cut)


def test_a_cut_body_loses_its_frame_alone(tmp_path) -> None:
    """As above, where the last frame has arrays: the header alone is no sample."""
    ledger = Ledger(tmp_path / "whole", 1, 0, 0, 0)
    write_samples(ledger, [0], 0)
    ledger.close()
    (path,) = (tmp_path / "whole").iterdir()
    data, frames = path.read_bytes(), list(read(tmp_path / "whole"))
    cut = tmp_path / "cut"
    cut.mkdir()
    for size in range(frames[-2].end, len(data)):
        (cut / path.name).write_bytes(data[:size])
        assert [frame.id for frame in read(cut)] == ["1.0.0", "1.0.1"], size


def test_a_flipped_byte_is_never_taken_for_what_was_written(tmp_path) -> None:
    """Every byte of the second frame: in its head it ends the file, in its arrays it is found when they are read."""
    ledger = Ledger(tmp_path / "whole", 1, 0, 0, 0)
    write_samples(ledger, [0], 0)
    ledger.close()
    (path,) = (tmp_path / "whole").iterdir()
    data, (start, first, second) = path.read_bytes(), list(read(tmp_path / "whole"))
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for place in range(start.end, first.end):
        (spoilt / path.name).write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        frames = list(read(spoilt))
        if place < first.offset:
            assert [frame.id for frame in frames] == ["1.0.0"], place
            continue
        assert [frame.id for frame in frames] == ["1.0.0", "1.0.1", "1.0.2"]
        with pytest.raises(UserError, match="frames hold what was written; got another checksum in 1.0.1; the file is damaged"):
            frames[1].arrays()
        assert len(frames[2].arrays()["tokens"]) == second.shapes["tokens"][1][0]


def test_headers_are_read_and_arrays_are_not(tmp_path) -> None:
    """A history passes over the arrays: damage in them does not hinder it."""
    ledger = Ledger(tmp_path, 1, 0, 0, 0)
    ledger.write("sample", {"item": 0, "member": 0, "versions": []}, {"tokens": np.zeros(1, np.int8)})
    ledger.close()
    frame = list(read(tmp_path))[1]
    assert (frame.offset, frame.end) == (frame.path.stat().st_size - 1, frame.path.stat().st_size)
    frame.path.write_bytes(frame.path.read_bytes()[:-1] + b"\x55")
    assert list(History(tmp_path).samples()) == [(0, 0)]


def test_later_starts_make_void_what_they_do_again(tmp_path) -> None:
    """Two ranks; start 1 made three rollouts, but only the first was in a checkpoint, from which start 2 goes on with other lag."""
    first = [Ledger(tmp_path, 1, rank, 0, 0) for rank in (0, 1)]
    ids = {}
    for rollout in (1, 2, 3):
        for rank, ledger in enumerate(first):
            item = 2 * (rollout - 1) + rank
            ids[rollout, rank] = write_samples(ledger, [item], version=2 * (rollout - 1))
            write_use(ledger, rollout, [item], ids[rollout, rank])
    ahead = write_samples(first[0], [6], version=2)  # from weights that start 2 has
    write_samples(first[1], [7], version=6)  # from weights that it has not
    for ledger in first:
        ledger.close()
    history = History(tmp_path)
    assert sorted(history.uses()) == [1, 2, 3] and len(history.samples()) == 16 and history.audit() == []

    second = [Ledger(tmp_path, next_start(tmp_path) if rank == 0 else 2, rank, 1, 2) for rank in (0, 1)]
    history = History(tmp_path)
    assert sorted(history.uses()) == [1]
    kept = {frame.id for frame in history.unused(2, []).values()}
    assert kept == {*ids[2, 0], *ids[2, 1], *ahead}, "what weights of update 2 and before have made is not made again"
    assert set(history.unused(2, [3])) == {(2, 0), (2, 1), (6, 0), (6, 1)}
    again = write_samples(second[1], [3], version=2)
    write_use(second[0], 2, [2], ids[2, 0])
    write_use(second[1], 2, [3], again)
    history = History(tmp_path)
    assert history.audit() == [] and {name for frame in history.uses()[2] for name in frame.values["samples"]} == {
        *ids[2, 0],
        *again,
    }
    assert history.samples()[3, 0].id == again[0], "the newest counts"
    assert sorted(History(tmp_path, 2).uses()) == [2]


def test_a_return_inside_a_start(tmp_path) -> None:
    ledger = Ledger(tmp_path, 1, 0, 0, 0)
    one, two = write_samples(ledger, [0], 0), write_samples(ledger, [1], 2)
    write_use(ledger, 1, [0], one)
    write_use(ledger, 2, [1], two)
    ledger.write("back", {"rollout": 1, "update": 2})
    write_drop(ledger, 2, [1], "rl.on_spike")
    third = write_samples(ledger, [2], 2)
    write_use(ledger, 2, [2], third)
    history = History(tmp_path)
    assert history.audit() == []
    assert [(frame.kind, frame.values["items"]) for frame in history.uses()[2]] == [("drop", [1]), ("use", [2])]
    assert {key: frame.id for key, frame in history.samples().items()}[1, 0] == two[0], "its weights are still part of the lineage"
    ledger.write("back", {"rollout": 0, "update": 0})
    history = History(tmp_path)
    assert history.uses() == {} and {key[0] for key in history.samples()} == {0}


FAULTS = {
    "used twice": (
        lambda ledger, ids: write_use(ledger, 3, [4], ids[0][:2], consumed=5),
        ["rollout 3 used item 0 member 0 again, after rollout 1", "rollout 3 used item 0 member 1 again, after rollout 1"],
    ),
    "twice in one rollout": (
        lambda ledger, ids: write_use(ledger, 3, [4], 2 * write_samples(ledger, [4], 4)),
        ["rollout 3 used item 4 member 0 again, after rollout 3", "rollout 3 used item 4 member 1 again, after rollout 3"],
    ),
    "item done again": (
        lambda ledger, ids: write_use(ledger, 3, [3], [], consumed=4),
        ["item 3 was done in rollout 2 and in rollout 3"],
    ),
    "used and dropped": (
        lambda ledger, ids: write_drop(ledger, 2, [3], consumed=4),
        ["item 3 was done in rollout 2 and in rollout 2"],
    ),
    "item lost": (
        lambda ledger, ids: write_use(ledger, 3, [6], write_samples(ledger, [6], 4)),
        ["items below 7 that no rollout used or dropped: 4, 5"],
    ),
    "unknown sample": (
        lambda ledger, ids: write_use(ledger, 3, [4], ["1.0.99"]),
        ["rollout 3 used sample 1.0.99, which is not in the ledger"],
    ),
    "rollout missing": (
        lambda ledger, ids: write_use(ledger, 4, [4, 5], write_samples(ledger, [4, 5], 4)),
        ["rollout 3 has no record of what it used"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_audit_finds_a_planted_fault(tmp_path, name) -> None:
    ids = write_run(tmp_path)
    assert History(tmp_path).audit() == []
    plant, told = FAULTS[name]
    plant(Ledger(tmp_path, 2, 0, 2, 4), ids)
    assert History(tmp_path).audit() == told


def test_a_file_that_is_gone_or_cut_early_is_a_fault(tmp_path) -> None:
    ids = write_run(tmp_path / "one", rollouts=3)
    (path,) = (tmp_path / "one").iterdir()
    frames = list(read(tmp_path / "one"))
    second = next(frame for frame in frames if frame.id == ids[1][0])
    data = bytearray(path.read_bytes())
    data[second.offset - 1] ^= 1  # the header of rollout 2's first sample: all that follows is lost with it
    path.write_bytes(data)
    later = Ledger(tmp_path / "one", 2, 0, 3, 6)
    write_use(later, 4, [6], write_samples(later, [6], 6))
    told = History(tmp_path / "one").audit()
    assert told[:2] == ["rollout 2 has no record of what it used", "rollout 3 has no record of what it used"]
    assert told[2] == "items below 7 that no rollout used or dropped: 2, 3, 4, 5"
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'one'}: a run of r1mega rl has a ledger; got none")):
        History(tmp_path / "one")
