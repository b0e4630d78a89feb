"""Safetensors folders: what stock code writes is read, what is written stock code reads, every damage is named by file and tensor."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r1mega.config.errors import UserError
from r1mega.train.convert.disk import PIECE, Sink, octets
from r1mega.train.convert.shards import NAMES, TORCH, PublishedFolder, ShardWriter, file_name, shard_names, write_index


def tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, and odd shapes."""
    torch.manual_seed(5)
    every = {f"of.{word}": (torch.randn(3, 5) * 9).to(dtype) for word, dtype in TORCH.items()}
    return every | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "vector": torch.randn(7).bfloat16(),
        "größe": torch.ones(2),
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and octets(left) == octets(right.contiguous())


def write(path: Path, content: dict[str, torch.Tensor]) -> tuple[int, str]:
    with ShardWriter(path, [(name, NAMES[value.dtype], tuple(value.shape)) for name, value in content.items()]) as out:
        for name, value in content.items():
            out.write(name, value)
        return out.close()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards by stock code with their index, and a file that is none of it."""
    where = {}
    for number, names in enumerate((("a", "b"), ("c", "d")), 1):
        file = file_name(number, 2)
        save_file({name: torch.randn(4, 6).bfloat16() for name in names}, tmp_path / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    write_index(tmp_path, where, 4 * 48)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_what_stock_code_wrote(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / "model.safetensors", {"format": "pt", "note": "x"})
    folder = PublishedFolder(tmp_path)
    assert folder.entries.keys() == content.keys()
    assert folder.metadata == {"model.safetensors": {"format": "pt", "note": "x"}}
    assert folder.largest_file_bytes == (tmp_path / "model.safetensors").stat().st_size
    for name, value in content.items():
        entry = folder.entries[name]
        assert (TORCH[entry.dtype], entry.shape, entry.nbytes) == (value.dtype, tuple(value.shape), value.nbytes)
        assert entry.file == str(tmp_path / "model.safetensors")
        assert same(folder.read(name), value) and folder.raw(name) == octets(value)
        assert Path(entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes] == bytes(octets(value))
    first = folder.read("of.F32")
    first.zero_()
    assert same(folder.read("of.F32"), content["of.F32"]), "each read is a tensor of its own"
    with pytest.raises(UserError, match="has nothing.at.all; got 16 other tensors"):
        folder.read("nothing.at.all")


def test_shards_in_order(sharded: Path) -> None:
    folder = PublishedFolder(str(sharded))
    assert list(folder.entries) == ["a", "b", "c", "d"] and list(folder.files) == [file_name(1, 2), file_name(2, 2)]
    stock = load_file(sharded / file_name(2, 2))
    assert same(folder.read("d"), stock["d"])


def test_stock_code_reads_what_is_written(tmp_path: Path) -> None:
    content = tensors()
    path = tmp_path / "model.safetensors"
    size, digest = write(path, content)
    assert (size, digest) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    loaded = load_file(path)
    assert loaded.keys() == content.keys() and all(same(loaded[name], value) for name, value in content.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert list(opened.offset_keys()) == list(content), "in the given order"
        assert all(same(opened.get_tensor(name), value) for name, value in content.items())
    assert list(PublishedFolder(tmp_path).entries) == list(content)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_a_file_of_stock_code_is_copied_to_the_last_byte(sharded: Path, tmp_path: Path) -> None:
    folder = PublishedFolder(sharded)
    for file in folder.files:
        names = [name for name, entry in folder.entries.items() if Path(entry.file).name == file]
        write(tmp_path / "copy", {name: folder.read(name) for name in names})
        assert (tmp_path / "copy").read_bytes() == (sharded / file).read_bytes()
    stock = tensors()
    save_file(stock, tmp_path / "model.safetensors", {"format": "pt"})
    (sharded / "model.safetensors.index.json").unlink()
    write(tmp_path / "copy", {name: stock[name] for name in PublishedFolder(tmp_path).entries})
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    content = {"turned": whole.t(), "part": whole[1:3], "column": whole[:, 2], "parameter": torch.nn.Parameter(whole)}
    write(tmp_path / "x", content)
    assert all(torch.equal(load_file(tmp_path / "x")[name], value) for name, value in content.items())


def test_a_plan_is_kept_to(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    out = ShardWriter(path, [("a", "F32", (2,)), ("b", "BF16", (2, 3))], {})
    for name, value in [("b", torch.zeros(2, 3).bfloat16()), ("a", torch.zeros(3)), ("a", torch.zeros(2).bfloat16())]:
        with pytest.raises(ValueError, match=rf"next comes a F32 \[2\]; got {name} "):
            out.write(name, value)
    out.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="holds all that was announced; got no b"):
        out.close()
    assert not path.exists() and (tmp_path / ".x.safetensors.part").exists()
    out.write("b", torch.ones(2, 3).bfloat16())
    with pytest.raises(ValueError, match="next comes nothing"):
        out.write("c", torch.ones(1))
    out.close()
    assert load_file(path).keys() == {"a", "b"} and b"metadata" not in path.read_bytes()
    with pytest.raises(ValueError, match="got a twice"):
        ShardWriter(path, [("a", "F32", (2,)), ("a", "F32", (2,))])


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "x", [("a", "F32", (2,))]):
        assert (tmp_path / ".x.part").exists()
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Sink(tmp_path / "x") as out:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(UserError, match=r"x: the disk takes what is written; got No space left on device; make room"):
            out.write(bytes(2 * PIECE))
    with pytest.raises(UserError, match="No such file or directory"):
        Sink(tmp_path / "nowhere" / "x")


def test_large_and_small_writes_keep_their_order(tmp_path: Path) -> None:
    parts = [os.urandom(size) for size in (3, PIECE - 1, PIECE, 5, 3 * PIECE + 7, 1, PIECE // 2, PIECE // 2, 9)]
    with Sink(tmp_path / "x") as out:
        assert [out.write(part) for part in parts] == [len(part) for part in parts]
        assert out.tell() == sum(map(len, parts))
        assert out.close() == (sum(map(len, parts)), hashlib.sha256(b"".join(parts)).hexdigest())
    assert (tmp_path / "x").read_bytes() == b"".join(parts)


def test_many_threads_read(sharded: Path) -> None:
    folder = PublishedFolder(sharded)
    wanted = {name: folder.read(name) for name in folder.entries}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: (name := "abcd"[number % 4], folder.read(name)), range(400)))
    assert all(same(value, wanted[name]) for name, value in found)


def test_a_read_takes_no_more_than_the_tensor(tmp_path: Path) -> None:
    content = {f"t{number}": torch.ones(1 << 18) for number in range(40)}
    write(tmp_path / "model.safetensors", content)
    folder = PublishedFolder(tmp_path)
    before = resident()
    for name in content:
        folder.read(name)
    assert resident() - before < 10 << 20, "40 MB were read, one at a time"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def header(path: Path, change, *, rest: bytes | None = None) -> None:
    """Write ``path`` anew with its header changed, and its tensors or ``rest``."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    value = json.loads(raw[8 : 8 + length])
    value = change(value) or value
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (raw[8 + length :] if rest is None else rest))


def offsets(name: str, begin: int, end: int):
    return lambda value: value[name].update(data_offsets=[begin, end])


DAMAGES = [
    (lambda f: f.write_bytes(f.read_bytes()[:-1]), r"b ends at byte \d+; got a file of \d+ bytes, it is cut"),
    (lambda f: f.write_bytes(f.read_bytes()[:-90]), r"a ends at byte \d+; got a file of \d+ bytes, it is cut"),
    (lambda f: f.write_bytes(f.read_bytes() + b"x"), r"ends with its last tensor at byte \d+; got a file of \d+ bytes"),
    (lambda f: f.write_bytes(f.read_bytes()[:40]), r"has a header of \d+ bytes; got a file of 40 bytes, it is cut"),
    (lambda f: f.write_bytes(b"abc"), "starts with the length of its header; got a file of 3 bytes"),
    (lambda f: f.write_bytes(b""), "got a file of 0 bytes"),
    (lambda f: f.write_bytes(b"\xff" * 200), r"at most 100000000 bytes; got 18446744073709551615, this is no safetensors"),
    (lambda f: header(f, lambda value: b"{nothing"), "its header is JSON; got "),
    (lambda f: header(f, lambda value: b'{"a": {}, "a": {}}'), "its header is JSON; got a twice"),
    (lambda f: header(f, lambda value: b"[1, 2]"), "its header gives tensors by name; got list"),
    (lambda f: header(f, lambda value: b"\xff\xfe"), "its header is JSON; got "),
    (lambda f: header(f, offsets("b", 40, 88)), "tensors follow one another; got b inside the tensor before it"),
    (lambda f: header(f, offsets("b", 50, 98)), "tensors follow one another; got b after a gap"),
    (lambda f: header(f, offsets("b", 48, 90)), r"b of BF16 \[4, 6\] has 48 bytes; got 42"),
    (lambda f: header(f, offsets("b", -1, 47)), "a tensor has dtype, shape and two data_offsets; got .* for b"),
    (lambda f: header(f, lambda value: value["a"].pop("dtype") and None), "a tensor has dtype, .* for a"),
    (lambda f: header(f, lambda value: value["a"].update(shape=[4, 6.0])), "a tensor has dtype, .* for a"),
    (lambda f: header(f, lambda value: value["a"].update(shape=[5, 6])), r"a of BF16 \[5, 6\] has 60 bytes; got 48"),
    (
        lambda f: header(f, lambda value: value["a"].update(dtype="F4")),
        "dtypes are F64, .*; got F4 for a; convert the tensor first",
    ),
    (lambda f: f.chmod(0) or (f.unlink(), f.mkdir()), "missing|can be read"),
]


@pytest.mark.parametrize("damage, says", DAMAGES)
def test_a_damaged_file_is_named(sharded: Path, damage, says: str) -> None:
    damage(sharded / file_name(1, 2))
    with pytest.raises(UserError, match=rf"model-00001-of-00002.safetensors.*{says}"):
        PublishedFolder(sharded)


def index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    change(value["weight_map"])
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda where: where.update(b="model-00003-of-00002.safetensors"),
            "every file that it names is there; model-00003.* with b is missing",
        ),
        (
            lambda where: where.update(e="model-00002-of-00002.safetensors"),
            r"00002.safetensors: holds what .*index.json says; got no e",
        ),
        (lambda where: where.pop("c"), "00002.safetensors: .*index.json names every tensor; got c, which it has not"),
        (
            lambda where: where.update(a="model-00002-of-00002.safetensors"),
            "00002.safetensors: holds what .* says; got a in model-00001",
        ),
        (
            lambda where: where.update(a="../model-00001-of-00002.safetensors"),
            "a tensor's file lies in the same folder; got '../.*' for a",
        ),
        (lambda where: where.update(a=3), "a tensor's file lies in the same folder; got 3 for a"),
        (lambda where: where.clear(), "weight_map gives each tensor its file; got dict without entries"),
    ],
)
def test_an_index_that_does_not_fit_is_named(sharded: Path, change, says: str) -> None:
    index(sharded, change)
    with pytest.raises(UserError, match=says):
        PublishedFolder(sharded)


def test_a_missing_shard_and_a_tensor_in_two(sharded: Path) -> None:
    (sharded / file_name(2, 2)).rename(sharded / "aside")
    with pytest.raises(UserError, match=r"every file that it names is there; model-00002-of-00002.safetensors with c is missing"):
        PublishedFolder(sharded)
    shutil.copy(sharded / file_name(1, 2), sharded / file_name(2, 2))
    with pytest.raises(
        UserError, match="00002-of-00002.safetensors: each tensor is in one file; got a in model-00001-of-00002.* too"
    ):
        PublishedFolder(sharded)


def test_an_index_that_is_none(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": 3}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="index.json: (is JSON with a weight_map|weight_map gives)"):
            PublishedFolder(sharded)


def test_no_weights_or_two_sets(sharded: Path, tmp_path: Path) -> None:
    shutil.copy(sharded / file_name(1, 2), sharded / "model.safetensors")
    with pytest.raises(UserError, match="one set of weights; got model.safetensors besides the files of"):
        PublishedFolder(sharded)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match=r"other: a folder with model.safetensors or .*; got pytorch_model.bin; check the path"):
        PublishedFolder(tmp_path / "other")
    with pytest.raises(UserError, match="got no file at all"):
        PublishedFolder(tmp_path / "nowhere")


def test_a_file_that_changes_after_it_was_looked_at(sharded: Path) -> None:
    folder = PublishedFolder(sharded)
    path = sharded / file_name(1, 2)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"00001-of-00002.safetensors: b has 48 bytes from byte \d+ on; got 38"):
        folder.read("b")
    path.unlink()
    with pytest.raises(UserError, match=r"00001-of-00002.safetensors: the file can be read; got No such file"):
        folder.read("b")


def test_plans() -> None:
    sizes = {"a": 5, "b": 5, "c": 1, "d": 30, "e": 0, "f": 10, "g": 1}
    assert shard_names(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert shard_names({}, 10) == [] and shard_names({"a": 1}, 0) == [["a"]]
    assert [name for names in shard_names(sizes, 7) for name in names] == list(sizes)
    assert file_name(1, 1) == "model.safetensors" and file_name(3, 163) == "model-00003-of-00163.safetensors"


def test_the_index_is_hugging_faces(tmp_path: Path) -> None:
    size, digest = write_index(tmp_path, {"b": "y", "a": "x"}, 12)
    raw = (tmp_path / "model.safetensors.index.json").read_bytes()
    assert (size, digest) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert json.loads(raw) == {"metadata": {"total_size": 12}, "weight_map": {"a": "x", "b": "y"}}
    assert raw.endswith(b"\n") and raw.index(b'"a"') < raw.index(b'"b"')
