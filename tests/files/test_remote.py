"""URLs as local copies: what of a folder is wanted, when a copy is made again, and one line for whatever goes wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from r1mega.config.errors import UserError
from r1mega.files import remote


def put(memory, **files: str) -> None:
    for name, text in files.items():
        memory.pipe_file("/" + name.replace("__", "/").replace("_dot_", "."), text.encode())


def test_what_is_a_url() -> None:
    for text in (
        "s3://b/x",
        "memory://x",
        "file:///x",
        "hf://datasets/o/n/x",
        "zip://a::file:///x.zip",
        "simplecache::s3://b/x",
        "S3A://b",
    ):
        assert remote.is_url(text), text
    for text in ("runs/x", "/x", "hf:o/n", "stdlib", "a:b", "./s3://x", "C:/x", "", "::y"):
        assert not remote.is_url(text), text


def test_keys_with_colons_reach_hydra_whole() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for value, expected in (
        ("{s3://b/t: 1, memory://y:0.5}", {"s3://b/t": 1, "memory://y": 0.5}),
        ("{zip://a::file:///x.zip: 1}", {"zip://a::file:///x.zip": 1}),
        (r"{s3\://b/t: 1}", {"s3://b/t": 1}),
        ("{a: {path: s3://b/x, b: 'c://d'}}", {"a": {"path": "s3://b/x", "b": "c://d"}}),
        ("{runs/text:1}", {"runs/text": 1}),
        ("s3://b/x", "s3://b/x"),
        ("[hf:o/n@main:a/b,s3://b]", ["hf:o/n@main:a/b", "s3://b"]),
    ):
        argument = remote.quoted(f"k={value}")
        assert parser.parse_override(argument).value() == expected
        assert remote.quoted(argument) == argument, "ranks get the arguments a second time"
    assert remote.quoted(3) == 3


def test_a_file_is_copied_once_and_again_when_it_changes(memory, monkeypatch) -> None:
    put(memory, b__p_dot_jsonl="one")
    got = []
    monkeypatch.setattr(
        MemoryFileSystem,
        "get",
        lambda self, *args, _get=MemoryFileSystem.get, **kw: (got.append(args[0]), _get(self, *args, **kw))[1],
    )
    path, root = remote.fetch("memory://b/p.jsonl", "k")
    assert path == root and path.name == "p.jsonl" and path.read_text() == "one"
    assert remote.fetch("memory://b/p.jsonl", "k")[0] == path and len(got) == 1
    put(memory, b__p_dot_jsonl="two")
    changed, _ = remote.fetch("memory://b/p.jsonl", "k")
    assert changed != path and changed.read_text() == "two" and path.read_text() == "one" and len(got) == 2
    assert not list(remote.cache_folder().rglob("*.tmp"))


def test_folders_and_token_files(memory) -> None:
    put(memory, b__t__a_dot_txt="a", b__t__sub__b_dot_txt="b", b__tok_dot_json="j", b__tok_dot_bin="b", b__tok_dot_idx="i")
    folder, _ = remote.fetch("memory://b/t/", "k")
    assert folder.name == "t" and sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")) == [
        "a.txt",
        "sub/b.txt",
    ]
    base, root = remote.fetch("memory://b/tok", "k")
    assert base == root and sorted(path.name for path in base.parent.iterdir()) == ["tok.bin", "tok.idx", "tok.json"]


def test_of_a_run_the_newest_whole_checkpoint_alone(memory) -> None:
    steps = {f"r__checkpoints__step-{n:08d}__{name}": str(n) for n in (2, 10) for name in ("manifest_dot_json", "weights__w")}
    put(
        memory,
        r__metrics_dot_jsonl="m",
        r__hf__model_dot_safetensors="x",
        **steps,
        **{"r__checkpoints__step-00000030__weights__w": "half"},
    )
    for url in ("memory://r", "memory://r/checkpoints", "memory://r/checkpoints/step-00000010"):
        path, root = remote.fetch(url, "init", "checkpoint")
        assert path.name == "step-00000010" and (path / "manifest.json").read_text() == "10" and (path / "weights" / "w").is_file()
        assert str(root) in str(path) and len([file for file in root.rglob("*") if file.is_file()]) == 2
    run, _ = remote.fetch("memory://r", "run", "run")
    assert [file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()] == ["metrics.jsonl"]
    put(memory, h__config_dot_json="{}", h__model_dot_safetensors="x", e__notes_dot_txt="n")
    with pytest.raises(
        UserError,
        match="init: a checkpoint that r1mega wrote; got the Hugging Face model memory://h; run r1mega convert .*, and give init=FOLDER",
    ):
        remote.fetch("memory://h", "init", "checkpoint")
    put(memory, h__pytorch_model_dot_bin="y")
    model, _ = remote.fetch("memory://h", "source", "model")
    assert sorted(file.name for file in model.iterdir()) == ["config.json", "model.safetensors"]
    assert remote.fetch("memory://r", "source", "model")[0].name == "step-00000010"
    with pytest.raises(UserError, match="init: a folder with manifest.json, .*; got neither in memory://e; check the URL"):
        remote.fetch("memory://e", "init", "checkpoint")


def test_chains_through_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        out.writestr("a.jsonl", '{"n": 1}')
        out.writestr("d/b.txt", "b")
    assert remote.fetch(f"zip://a.jsonl::file://{tmp_path}/x.zip", "k")[0].read_text() == '{"n": 1}'
    assert remote.fetch(f"zip://a.jsonl::{tmp_path}/x.zip", "k")[0].name == "a.jsonl"
    assert (remote.fetch(f"zip://d::file://{tmp_path}/x.zip", "k")[0] / "b.txt").read_text() == "b"
    assert remote.fetch(f"simplecache::file://{tmp_path}/x.zip", "k")[0].read_bytes() == (tmp_path / "x.zip").read_bytes()


def test_an_archive_cannot_write_beside_its_copy(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        out.writestr("d/../../../evil.txt", "e")
    with pytest.raises(UserError, match="names below a folder stay in it"):
        remote.fetch(f"zip://::file://{tmp_path}/x.zip", "k")
    assert not list(remote.cache_folder().rglob("evil.txt"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "memory://b/trian.jsonl",
            r"^k: a file or folder at a URL; got no such memory://b/trian.jsonl; did you mean memory://b/train.jsonl\? check the URL$",
        ),
        ("memory://nowhere/x", "^k: a file or folder at a URL; got no such memory://nowhere/x; check the URL$"),
        ("s4://b/x", r"^k: a protocol that fsspec knows; got s4:// in s4://b/x; did you mean s3\? use s3://"),
        ("zip://a::meory://x.zip", r"got meory:// in zip://a::meory://x.zip; did you mean memory\?"),
        ("oci://b/x", "^k: a package serves each protocol; got oci://b/x without it; pip install ocifs$"),
        (
            "zip://a::memory://b/train.jsonl",
            r"^k: a URL that can be reached; got .* \(BadZipFile: File is not a zip file\); check the URL",
        ),
        ("memory://empty", "^k: a folder with files; got an empty one, memory://empty; check the URL$"),
    ],
)
def test_one_line_for_what_is_not_there(memory, url: str, says: str) -> None:
    put(memory, b__train_dot_jsonl="x")
    memory.makedirs("/empty")
    with pytest.raises(UserError, match=says) as caught:
        remote.fetch(url, "k")
    assert "\n" not in str(caught.value)


def test_a_protocol_whose_package_misses_a_module_names_that(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "r1mega_far.py").write_text("import no_such_module.inside\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(known_implementations, "far", {"class": "r1mega_far.Far"})
    with pytest.raises(UserError, match="got far://h/x without it; pip install no_such_module$"):
        remote.fetch("far://h/x", "k")


class Broken(MemoryFileSystem):
    """Serves ``broken://`` and fails as a real one does: a listing that lies, a connection that goes."""

    protocol = "broken"
    store: dict = {}
    pseudo_dirs = [""]
    trouble = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("broken://").strip("/")

    def info(self, path, **kwargs):
        if self.trouble == "refused":
            raise ConnectionRefusedError("nobody listens.\nsecond line")
        return {**super().info(path, **kwargs), **({"size": 99} if self.trouble == "short" else {})}


@pytest.fixture
def broken():
    fsspec.register_implementation("broken", Broken, clobber=True)
    system = fsspec.filesystem("broken")
    system.pipe_file("/b/x.txt", b"text")
    yield system
    Broken.trouble = ""
    Broken.store.clear()


def test_a_lost_connection_and_a_short_copy(broken) -> None:
    Broken.trouble = "refused"
    with pytest.raises(UserError) as caught:
        remote.fetch("broken://b/x.txt", "text")
    assert str(caught.value) == (
        "text: a URL that can be reached; got broken://b/x.txt (ConnectionRefusedError: nobody listens); check the URL, the network and "
        "the credentials"
    )
    Broken.trouble = "short"
    with pytest.raises(UserError, match="broken://b/x.txt: x.txt has 99 bytes; got 4; run the same command again"):
        remote.fetch("broken://b/x.txt", "text")
    Broken.trouble = ""
    assert remote.fetch("broken://b/x.txt", "text")[0].read_text() == "text", "what came short was not kept"


def test_a_cache_that_cannot_be_written(memory, monkeypatch, tmp_path: Path) -> None:
    put(memory, b__x="x")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=f"R1MEGA_CACHE: a folder for copies; got {re.escape(str(tmp_path))}/file .*; set R1MEGA_CACHE=FOLDER"
    ):
        remote.fetch("memory://b/x", "k")


def test_processes_that_want_one_copy_make_it_once(tmp_path: Path, cache: Path) -> None:
    """Four at once: each sees a whole copy, and the file system is asked for the bytes once."""
    (tmp_path / "big").mkdir()
    for number in range(20):
        (tmp_path / "big" / f"{number}.txt").write_text(str(number) * 10000)
    code = (
        "import sys; from r1mega.files import remote; path, _ = remote.fetch(sys.argv[1], 'k'); "
        "print(path, sum(file.stat().st_size for file in path.iterdir()))"
    )
    line = [sys.executable, "-c", code, f"file://{tmp_path}/big"]
    root = Path(remote.__file__).parents[2]
    ranks = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)]
    told = [rank.communicate()[0].splitlines() for rank in ranks]
    assert len({lines[-1] for lines in told}) == 1 and told[0][-1].endswith(" 300000")
    assert sum(line.startswith("files: ") for lines in told for line in lines) == 1
    assert len(list((cache / "fetched").glob("*/*"))) == 1
