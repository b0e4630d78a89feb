"""Results at a URL: what is sent in which order, what another machine finds, and what a failed upload leaves."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from r1mega.config.errors import UserError
from r1mega.files import remote
from r1mega.files.mirror import Mirror, working_path

URL = "memory://bucket/run"


def machine(monkeypatch, folder: Path, name: str) -> None:
    """From now on the cache of another machine."""
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(folder / name))


def begun(**options) -> Mirror:
    mirror = Mirror("out", URL, working_path(URL), **{"whole": False, "keep_last": 2, **options})
    mirror.begin()
    return mirror


def checkpoint(mirror: Mirror, step: int, text: str = "w") -> Path:
    folder = mirror.local / "checkpoints" / f"step-{step:08d}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / ".a").write_text(f"{text}{step}")  # Megatron's own .metadata is such a name
    (folder / "manifest.json").write_text("{}")
    return folder


def there(memory) -> list[str]:
    return sorted(path.removeprefix("/bucket/run/") for path in memory.find("/bucket/run"))


@pytest.fixture
def puts(monkeypatch) -> list[str]:
    """Names in the order in which they arrive."""
    order: list[str] = []
    real = MemoryFileSystem.put_file

    def noted(self, lpath, rpath, *args, **kwargs):
        order.append(rpath.removeprefix("/bucket/run/"))
        return real(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", noted)
    return order


def test_logs_go_first_and_a_manifest_last_and_nothing_twice(memory, puts) -> None:
    mirror = begun()
    assert there(memory) == [".r1mega"]
    (mirror.local / "metrics.jsonl").write_text("1\n")
    (mirror.local / "config.yaml.7.tmp").write_text("half")
    checkpoint(mirror, 1)
    (mirror.local / "checkpoints" / ".step-00000002.tmp").mkdir()
    (mirror.local / "checkpoints" / ".step-00000002.tmp" / "w").write_text("half")
    (mirror.local / "checkpoints" / "step-00000003").mkdir()
    (mirror.local / "checkpoints" / "step-00000003" / "w").write_text("no manifest")
    mirror.send()
    assert puts == ["metrics.jsonl", "checkpoints/step-00000001/weights/.a", "checkpoints/step-00000001/manifest.json"]
    mirror.send()
    assert len(puts) == 3
    (mirror.local / "metrics.jsonl").write_text("1\n2\n")
    Mirror("out", URL, mirror.local, whole=False, keep_last=2).send()  # another process: the book is on disk
    assert puts[3:] == ["metrics.jsonl"] and memory.cat_file("/bucket/run/metrics.jsonl") == b"1\n2\n"


def test_what_is_gone_here_goes_there(memory) -> None:
    mirror = begun()
    memory.pipe_file("/bucket/run/notes_of_the_user.txt", b"stay")
    (mirror.local / "old.txt").write_text("x")
    old = checkpoint(mirror, 1)
    mirror.send()
    for path in [*old.rglob("*"), mirror.local / "old.txt"]:
        path.unlink() if path.is_file() else None
    checkpoint(mirror, 2)
    mirror.send()
    assert there(memory) == [
        ".r1mega",
        *(f"checkpoints/step-00000002/{name}" for name in ("manifest.json", "weights/.a")),
        "notes_of_the_user.txt",
    ]


def test_another_machine_goes_on_from_the_newest_whole_one(memory, monkeypatch, tmp_path: Path) -> None:
    first = begun()
    (first.local / "metrics.jsonl").write_text("1\n2\n")
    (first.local / "tensorboard").mkdir()
    (first.local / "tensorboard" / "events").write_text("e")
    for step in (1, 2):
        checkpoint(first, step)
    first.send()
    memory.pipe_file("/bucket/run/checkpoints/step-00000009/weights/.a", b"half an upload, of more ranks")
    memory.pipe_file("/bucket/run/checkpoints/step-00000009/weights/b", b"of more ranks")

    machine(monkeypatch, tmp_path, "b")
    second = begun()
    assert sorted(path.relative_to(second.local).as_posix() for path in second.local.rglob("*") if path.is_file()) == [
        "checkpoints/step-00000002/manifest.json", "checkpoints/step-00000002/weights/.a", "metrics.jsonl", "tensorboard/events"
    ]  # fmt: skip
    checkpoint(second, 9, "second")
    second.send()
    kept = [name for name in there(memory) if name.startswith("checkpoints")]
    assert kept == [f"checkpoints/step-0000000{n}/{name}" for n in (2, 9) for name in ("manifest.json", "weights/.a")], (
        "keep_last=2, by two machines"
    )
    assert memory.cat_file("/bucket/run/checkpoints/step-00000009/weights/.a") == b"second9"

    machine(monkeypatch, tmp_path, "c")
    begun()
    machine(monkeypatch, tmp_path, "b")
    again = begun()
    assert (again.local / "checkpoints" / "step-00000009").is_dir(), "its own, no older than what is there"


def test_a_machine_that_was_overtaken_fetches_and_one_that_is_ahead_keeps(memory, monkeypatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, "a")
    ours = begun()
    checkpoint(ours, 1)
    ours.send()
    checkpoint(ours, 2)  # finished, and the machine went before it was sent
    assert (begun().local / "checkpoints" / "step-00000002").is_dir()
    machine(monkeypatch, tmp_path, "b")
    other = begun()
    checkpoint(other, 3, "other")
    other.send()
    machine(monkeypatch, tmp_path, "a")
    back = begun()
    assert (back.local / "checkpoints/step-00000003/weights/.a").read_text() == "other3"


def test_an_emptied_url_is_a_new_run(memory) -> None:
    mirror = begun()
    checkpoint(mirror, 5)
    mirror.send()
    memory.rm("/bucket/run", recursive=True)
    assert not (begun().local / "checkpoints").exists()


def test_a_run_that_was_copied_there_by_hand_is_gone_on_from(memory) -> None:
    for name, text in (("checkpoints/step-00000004/manifest.json", "{}"), ("config.yaml", "c")):
        memory.pipe_file(f"/bucket/run/{name}", text.encode())
    mirror = begun()
    assert (mirror.local / "checkpoints/step-00000004/manifest.json").is_file() and (
        mirror.local / "config.yaml"
    ).read_text() == "c"
    assert ".r1mega" in there(memory)


def test_a_command_without_checkpoints_touches_none(memory) -> None:
    for step in range(3):
        memory.pipe_file(f"/bucket/run/checkpoints/step-0000000{step}/manifest.json", b"{}")
    mirror = begun(keep_last=None)
    (mirror.local / "eval.json").write_text("{}")
    mirror.send()
    assert sum("manifest" in name for name in there(memory)) == 3 and not (mirror.local / "checkpoints").exists()


def test_an_export_replaces_its_own_and_nothing_else(memory) -> None:
    def export(*names: str) -> None:
        mirror = Mirror("target", URL, working_path(URL), whole=True)
        mirror.begin()
        for path in mirror.local.glob("*"):
            path.unlink()
        mirror.local.mkdir(parents=True, exist_ok=True)
        for name in names:
            (mirror.local / name).write_text(name)
        mirror.send()

    export("model-1-of-2", "model-2-of-2")
    export("model")
    assert there(memory) == [".r1mega", "model"]
    memory.rm("/bucket/run/.r1mega")
    with pytest.raises(
        UserError, match="target: a new folder or an earlier result; got memory://bucket/run with other files; use another target="
    ):
        export("model")


def test_one_file(memory) -> None:
    mirror = Mirror("keep", f"{URL}/kept.jsonl", working_path(f"{URL}/kept.jsonl"), whole=True)
    for text in ("one", "two"):
        mirror.begin()
        mirror.local.write_text(text)
        mirror.send()
        assert memory.cat_file("/bucket/run/kept.jsonl") == text.encode()
    assert there(memory) == ["kept.jsonl"]


def test_a_failed_upload_names_the_url_and_is_made_up_for(memory, monkeypatch) -> None:
    mirror = begun()
    folder = checkpoint(mirror, 1)
    real = MemoryFileSystem.put_file

    def full(self, lpath, rpath, *args, **kwargs):
        if rpath.endswith("manifest.json"):
            raise OSError(28, "No space left on device")
        return real(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", full)
    with pytest.raises(UserError) as caught:
        mirror.send()
    assert str(caught.value) == (
        f"out: what is finished goes to its URL; got {URL} (OSError: [Errno 28] No space left on device); all is kept in "
        f"{mirror.local.parent}, mend the way there and run the same command"
    )
    assert folder.is_dir() and not remote.whole_steps(there(memory), "checkpoints/")
    monkeypatch.setattr(MemoryFileSystem, "put_file", real)
    begun().send()
    assert remote.whole_steps(there(memory), "checkpoints/") == {1: "checkpoints/step-00000001"}


def test_a_url_that_cannot_be_written_is_told_at_the_start(memory, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(UserError, match=r"^out: a URL that can be reached; got memory://bucket/run \(PermissionError"):
        begun()
    with pytest.raises(UserError, match="out: one URL to write to; got the chain zip://a::memory://x.zip; leave out"):
        Mirror("out", "zip://a::memory://x.zip", Path("x"), whole=False)


def test_a_damaged_book_sends_all_again(memory, puts) -> None:
    mirror = begun()
    (mirror.local / "metrics.jsonl").write_text("1")
    mirror.send()
    book = next(mirror.local.parent.glob(".*.sent.json"))
    kept = json.loads(book.read_text())
    assert list(kept["files"]) == ["metrics.jsonl"]
    book.write_text(json.dumps({"id": kept["id"]}))
    Mirror("out", URL, mirror.local, whole=False, keep_last=2).send()
    assert puts == ["metrics.jsonl"] * 2 and os.path.exists(book)


def test_a_checkpoint_that_is_written_again_is_not_whole_in_between(memory, puts, monkeypatch) -> None:
    mirror = begun()
    folder = checkpoint(mirror, 1)
    mirror.send()
    (folder / "weights" / ".a").write_text("other")
    (folder / "manifest.json").write_text('{"new": 1}')
    seen = []
    real = MemoryFileSystem.put_file

    def look(self, lpath, rpath, *args, **kwargs):
        seen.append(sorted(path for path in self.find("/bucket/run") if path.endswith("manifest.json")))
        return real(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", look)
    mirror.send()
    assert seen == [[], []] and memory.cat_file("/bucket/run/checkpoints/step-00000001/manifest.json") == b'{"new": 1}'


def whole_checkpoint(mirror: Mirror, step: int) -> Path:
    """One whose manifest fits, as the trainer's."""
    folder = checkpoint(mirror, step)
    digest = hashlib.sha256((folder / "weights" / ".a").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"files": {"weights/.a": {"bytes": 2, "sha256": digest}}}))
    return folder


def test_a_url_that_was_emptied_gets_all_again(memory) -> None:
    mirror = begun()
    held = whole_checkpoint(mirror, 1)
    mirror.send()
    memory.rm("/bucket/run", recursive=True)
    again = begun()
    assert held.is_dir(), "the only copy"
    again.send()
    assert there(memory) == [".r1mega", "checkpoints/step-00000001/manifest.json", "checkpoints/step-00000001/weights/.a"]


def test_a_url_of_another_run_puts_ours_aside(memory, capsys) -> None:
    mirror = begun()
    whole_checkpoint(mirror, 1)
    memory.pipe_file("/bucket/run/.r1mega", json.dumps({"id": "another"}).encode())
    again = begun()
    assert not list(again.local.iterdir())
    (kept,) = again.local.parent.glob(f"{again.local.name}.kept-*")
    assert (kept / "checkpoints/step-00000001/weights/.a").read_text() == "w1" and str(kept) in capsys.readouterr().err


def test_a_damaged_one_here_does_not_hide_the_whole_one_there(memory) -> None:
    mirror = begun()
    held = whole_checkpoint(mirror, 1)
    mirror.send()
    (held / "weights" / ".a").write_text("x1")
    begun()
    assert (held / "weights" / ".a").read_text() == "w1"
