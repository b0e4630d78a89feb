"""Exports beside the training: one that fails, or is killed, gives the disk its room back."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.train import export
from r1mega.train.exporting import Exporter
from r1mega.train.lineage import Lineage
from r1mega.train.saving import Saver, TrainState
from r1mega.train.trainee import Trainee
from tests.train.cases import MODEL, OPTIM, one_rank


def saver(folder: Path, **fields) -> Saver:
    return Saver(one_rank(), folder, Lineage("pretrain", "test"), background=True, keep_last=9, **fields)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written(folder: Path) -> None:
    """What a conversion to ``folder`` leaves that does not end."""
    aside = folder.with_name(f".{folder.name}.partial")
    aside.mkdir(parents=True)
    (aside / "model-00001-of-00002.safetensors").write_bytes(b"whole")
    folder.with_name(f".{folder.name}.lock").touch()


def ended(exporter: Exporter) -> None:
    deadline = time.monotonic() + 30
    while exporter.is_busy and time.monotonic() < deadline:
        time.sleep(0.01)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fails(path: Path, target: Path, dtype: str) -> None:
        written(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "export_checkpoint", fails)
    exporter = Exporter(tmp_path / "exports", 1, "bf16")
    exporter.consider(tmp_path / "step-00000001", 1)
    ended(exporter)
    assert [step for step, _ in exporter.take_failures()] == [1] and names(tmp_path / "exports") == []


@pytest.mark.parametrize("end", ["lock", "partial"])
def test_what_another_conversion_is_at_work_on_stays(tmp_path: Path, monkeypatch, end: str) -> None:
    def fails(path: Path, target: Path, dtype: str) -> None:
        raise UserError("target: one conversion at a time; got another one at work; wait for it")

    monkeypatch.setattr(export, "export_checkpoint", fails)
    written(tmp_path / "step-00000001")
    handle = os.open(tmp_path / f".step-00000001.{end}", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    exporter = Exporter(tmp_path, 1, "bf16")
    exporter.consider(tmp_path / "checkpoints/step-00000001", 1)
    ended(exporter)
    exporter.clear()
    assert names(tmp_path) == [".step-00000001.lock", ".step-00000001.partial"]
    os.close(handle)
    exporter.clear()
    assert names(tmp_path) == []


def test_a_run_that_goes_on_clears_what_killed_exports_left_but_the_newest(tmp_path: Path, monkeypatch) -> None:
    trainee = Trainee(MODEL, OPTIM, one_rank(), "fp32")
    trainee.allocate_moments()
    with saver(tmp_path / "checkpoints") as moving:
        moving.begin(trainee, TrainState(2))
        moving.wait()
    exports, seen = tmp_path / "exports", []
    for step in (1, 2, 3):
        written(exports / f"step-{step:08d}")
    gate = threading.Event()
    monkeypatch.setattr(export, "export_checkpoint", lambda *_: (gate.wait(60), seen.extend(names(exports))))
    exporter = Exporter(exports, 1, "bf16")
    with saver(tmp_path / "checkpoints", exporter=exporter) as moving:
        moving.go_on(tmp_path / "checkpoints/step-00000002")
        gate.set()
        ended(exporter)
    assert seen == [".step-00000002.lock", ".step-00000002.partial"], "it goes on from there"
    with saver(tmp_path / "checkpoints", exporter=Exporter(exports, 0, "bf16")) as moving:
        moving.go_on(tmp_path / "checkpoints/step-00000002")
    assert names(exports) == [], "none is to be made"
