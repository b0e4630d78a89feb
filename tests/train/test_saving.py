"""Saves beside the training: what is saved is that moment's, nothing is half there, and every fault is told on all ranks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1mega.compat import megatron_writer
from r1mega.config.errors import UserError
from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.config.saving_rules import export_violations
from r1mega.device import open_device
from r1mega.mesh import Mesh, open_mesh
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint, export, manifest
from r1mega.train.hostmemory import HostMemory
from r1mega.train.lineage import Lineage
from r1mega.train.pretrain import pretrain
from r1mega.train.saving import Saver, TrainState
from r1mega.train.trainee import Trainee
from tests.train.cases import CPU, MODEL, OPTIM, lines, one_rank, pretrain_config, stored, trainer_config

ROOT = Path(__file__).resolve().parents[2]


def fresh(dtype: str = "fp32") -> Trainee:
    made = Trainee(MODEL, OPTIM, one_rank(), dtype)
    made.allocate_moments()
    return made


def saver(folder: Path, **fields) -> Saver:
    return Saver(one_rank(), folder, Lineage("pretrain", "test"), **{"background": True, "keep_last": 9, **fields})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def equal(left: Path, right: Path) -> bool:
    ours, theirs = stored(left), stored(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def held_back(monkeypatch):
    """Writers that wait for ``.set()``; ``.begun`` says that one does."""
    gate = threading.Event()
    gate.begun = threading.Event()
    write = megatron_writer.Plan.write

    def slow(self, at_each):
        gate.begun.set()
        assert gate.wait(60)
        return write(self, at_each)

    monkeypatch.setattr(megatron_writer.Plan, "write", slow)
    yield gate
    gate.set()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_next_step_changes_is_not_in_the_checkpoint(tmp_path: Path, held_back, dtype: str) -> None:
    trainee = fresh(dtype)

    @contextmanager
    def reference():
        for _, tensor in trainee.named_tensors():
            tensor.mul_(2)
        yield
        for _, tensor in trainee.named_tensors():
            tensor.div_(2)

    held_back.set()
    with saver(tmp_path / "sync", background=False) as still:
        still.begin(trainee, TrainState(1), reference)
        still.wait()
    held_back.clear()
    with saver(tmp_path / "async") as moving:
        moving.begin(trainee, TrainState(1), reference)
        for part in trainee.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                state["exp_avg"].add_(1), state["exp_avg_sq"].add_(1)
            for group in part.optimizer.param_groups:
                group["lr"], _ = 7.0, [parameter.data.add_(1) for parameter in group["params"]]
        for _, tensor in trainee.named_tensors():
            tensor.add_(1)
        held_back.set()
        moving.wait()
    left, right = (checkpoint.resolve(tmp_path / name) for name in ("sync", "async"))
    assert equal(left, right)
    for name in (
        "weights/__0_0.distcp",
        "weights/common.pt",
        "reference/__0_0.distcp",
        "reference/common.pt",
        "rng.pt",
        "state.json",
    ):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    weights, twice = stored(right), stored(right, "reference")
    assert twice and all(torch.equal(2 * weights[name], tensor) for name, tensor in twice.items())
    checkpoint.verify(right)


@pytest.mark.slow
def test_a_run_saves_the_same_beside_and_inside_the_training(train_data: Path, tmp_path: Path) -> None:
    for name, beside in (("async", True), ("sync", False)):
        config = pretrain_config(train_data, tmp_path / name, 4, save_every=1, keep_last=9, async_save=beside)
        result = pretrain(config)
        assert 0 < result["save_stall_seconds"] < 60
        told = lines(tmp_path / name)
        assert [line["step"] for line in told] == [1, 2, 3, 4] and all(line["save_stall_seconds"] > 0 for line in told)
        assert sum(line["save_stall_seconds"] for line in told) <= result["save_stall_seconds"] + 1e-3
    found = [manifest.finished(tmp_path / name / "checkpoints") for name in ("async", "sync")]
    assert len(found[0]) == len(found[1]) == 4 and all(map(equal, *found))
    for path in found[0]:
        checkpoint.verify(path)


def test_one_save_at_a_time_and_nothing_is_seen_before_it_is_whole(tmp_path: Path, held_back) -> None:
    trainee = fresh()
    with saver(tmp_path) as moving:
        moving.begin(trainee, TrainState(1))
        assert held_back.begun.wait(60) and names(tmp_path) == [".step-00000001.tmp"]
        moving.poll()
        assert names(tmp_path) == [".step-00000001.tmp"], "a poll waits for nothing"
        threading.Timer(0.3, held_back.set).start()
        began = time.perf_counter()
        moving.begin(trainee, TrainState(2))
        assert time.perf_counter() - began > 0.25 and "step-00000001" in names(tmp_path), "the second waited for the first"
        moving.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and moving.stall_seconds > 0.25
    assert checkpoint.read_state(tmp_path / "step-00000002")["parent"] == checkpoint.digest(tmp_path / "step-00000001")


def test_polls_alone_publish(tmp_path: Path) -> None:
    with saver(tmp_path) as moving:
        moving.begin(fresh(), TrainState(1))
        deadline = time.monotonic() + 30
        while names(tmp_path) != ["step-00000001"] and time.monotonic() < deadline:
            moving.poll()
            time.sleep(0.01)
        checkpoint.verify(tmp_path / "step-00000001")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["write", "publish"])
def test_a_full_disk_is_told_at_the_next_save(tmp_path: Path, monkeypatch, place: str) -> None:
    trainee = fresh()
    with saver(tmp_path) as moving:
        moving.begin(trainee, TrainState(1))
        moving.wait()
        with monkeypatch.context() as patch:
            patch.setattr(*((megatron_writer.Plan, "write", full) if place == "write" else (manifest, "write", full)))
            moving.begin(trainee, TrainState(2))
            with pytest.raises(UserError, match="got No space left on device .* GiB free; .*step-00000001 is whole"):
                moving.begin(trainee, TrainState(3))
        assert names(tmp_path) == ["step-00000001"], "the disk has its room back"
        moving.begin(trainee, TrainState(4))
        moving.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000004"]
    assert checkpoint.read_state(tmp_path / "step-00000004")["parent"] == checkpoint.digest(tmp_path / "step-00000001")


def test_a_full_disk_is_told_at_the_end_of_the_run_at_the_latest(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    out, write = tmp_path / "run", megatron_writer.Plan.write
    monkeypatch.setattr(
        megatron_writer.Plan, "write", lambda self, each: full() if "00000002" in self.writer.checkpoint_id else write(self, each)
    )
    with pytest.raises(UserError, match="got No space left on device .*step-00000001 is whole"):
        pretrain(pretrain_config(train_data, out, 2, save_every=1))
    assert names(out / "checkpoints") == ["step-00000001"]
    assert [line["step"] for line in lines(out)] == [1, 2]
    monkeypatch.undo()
    assert pretrain(pretrain_config(train_data, out, 2, save_every=1))["steps"] == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
        ),
        torch.AcceleratorError("CUDA error: out of memory"),  # of page-locked memory
    ],
)
@pytest.mark.parametrize("place", ["plan", "copy"])
def test_a_host_without_memory_for_the_copy_is_told_and_the_next_save_works(tmp_path: Path, monkeypatch, place: str, error) -> None:
    def fails(*_):
        raise error

    trainee = fresh()
    with saver(tmp_path, switch="rl.async_save") as moving:
        moving.begin(trainee, TrainState(1))
        moving.wait()
        with monkeypatch.context() as patch:
            patch.setattr(*((megatron_writer, "plan", fails) if place == "plan" else (HostMemory, "copy", fails)))
            with pytest.raises(UserError) as caught:
                moving.begin(trainee, TrainState(2))
        told = str(caught.value)
        assert "step-00000002: host memory takes a copy of what this rank saves, 0.0" in told and caught.value.__cause__ is error
        assert f"got {type(error).__name__}" in told and "use rl.async_save=false" in told and "step-00000001 is whole" in told
        assert names(tmp_path) == ["step-00000001"]
        moving.begin(trainee, TrainState(3))
        moving.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_memory_of_the_device_is_told_as_such(tmp_path: Path, monkeypatch) -> None:
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HostMemory, "copy", fails)
    with saver(tmp_path) as moving, pytest.raises(torch.OutOfMemoryError):
        moving.begin(fresh(), TrainState(1))
    assert names(tmp_path) == []


def test_a_shard_of_two_owners_is_refused(tmp_path: Path, monkeypatch) -> None:
    mesh, gather = one_rank(), Mesh.gather_everywhere
    monkeypatch.setattr(Mesh, "gather_everywhere", lambda self, value: gather(mesh, value) * (1 + isinstance(value, list)))
    with saver(tmp_path) as moving, pytest.raises(Exception, match="Invalid access pattern"):
        moving.begin(fresh(), TrainState(1))
    assert names(tmp_path) == []


def test_a_run_that_ends_with_an_error_leaves_no_thread_and_no_rest(tmp_path: Path, held_back) -> None:
    with pytest.raises(KeyError), saver(tmp_path) as moving:
        moving.begin(fresh(), TrainState(1))
        held_back.set()
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save-")] and names(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
from r1mega.compat import megatron_writer
from r1mega.train import manifest, saving
from r1mega.train.pretrain import pretrain
from tests.train.cases import pretrain_config

data, out, place = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
owner, name = {"write": (megatron_writer.Plan, "write"), "finish": (megatron_writer, "finish"), "manifest": (manifest, "write"),
               "rename": (saving, "sync")}[place]
before = getattr(owner, name)
def once(*arguments):
    if any((out / "checkpoints").glob(".step-00000003.tmp")) or (out / "checkpoints/step-00000003").exists():
        if place == "write":
            (out / "checkpoints/.step-00000003.tmp/weights/__0_0.distcp").write_bytes(b"half")
        os._exit(77)
    return before(*arguments)
setattr(owner, name, once)
pretrain(pretrain_config(data, out, 5, save_every=1, keep_last=9))
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["write", "finish", "manifest", "rename"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_checkpoint_before(train_data: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, train_data, out, place], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 77, done.stderr[-2000:]
    there = [path.name for path in manifest.finished(out / "checkpoints")]
    assert there == ["step-00000001", "step-00000002"] + (["step-00000003"] if place == "rename" else [])
    for name in there:
        checkpoint.verify(out / "checkpoints" / name)
    assert pretrain(pretrain_config(train_data, out, 5, save_every=1, keep_last=9))["steps"] == 5
    assert names(out / "checkpoints") == [f"step-{step:08d}" for step in range(1, 6)]
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5]
    straight = pretrain(pretrain_config(train_data, tmp_path / "straight", 5, save_every=1))
    assert equal(Path(straight["checkpoint"]), checkpoint.resolve(out))


def test_checkpoints_of_every_so_many_steps_are_kept(train_data: Path, tmp_path: Path) -> None:
    pretrain(pretrain_config(train_data, tmp_path / "run", 7, save_every=1, keep_last=1, keep_every=3))
    assert names(tmp_path / "run/checkpoints") == ["step-00000003", "step-00000006", "step-00000007"]


def test_a_bucket_keeps_them_too(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    from r1mega.files import View

    monkeypatch.setenv("R1MEGA_CACHE", str(tmp_path / "cache"))
    config = pretrain_config(train_data, tmp_path, 7, keep_last=2, keep_every=3)
    view = View(replace(config, out=f"file://{tmp_path}/there"))
    (mirror,) = view.mirrors
    assert (mirror.keep_last, mirror.keep_every) == (2, 3)
    there = tmp_path / "there/checkpoints"
    for step in range(1, 8):
        (there / f"step-{step:08d}").mkdir(parents=True)
        (there / f"step-{step:08d}/manifest.json").write_text('{"files": {}}')
    mirror.local.mkdir(parents=True)
    mirror.send()
    assert names(there) == [f"step-{step:08d}" for step in (3, 6, 7)]


def test_exports_are_made_beside_the_training_and_a_failure_is_told(train_data: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    out, made, gate = tmp_path / "run", [], threading.Event()

    def stand_in(path: Path, target: Path, dtype: str) -> None:
        assert gate.wait(60)
        checkpoint.verify(path)  # it is not removed meanwhile
        made.append((path.name, target, dtype))
        if path.name == "step-00000004":
            raise UserError("export: there is room; got none; make some")
        target.mkdir(parents=True)

    monkeypatch.setattr(export, "export_checkpoint", stand_in)
    config = pretrain_config(train_data, out, 6, save_every=1, keep_last=1, export_every=2, export_dtype="fp8")
    begin = Saver.begin

    def opened(self, trainee, state, extra=None):
        if state.step == 6:
            assert {"step-00000002", "step-00000004"} <= set(names(out / "checkpoints")), "both wait, and three saves went on"
            gate.set()
        return begin(self, trainee, state, extra)

    monkeypatch.setattr(Saver, "begin", opened)
    assert pretrain(config)["steps"] == 6
    steps = ["step-00000002", "step-00000004", "step-00000006"]
    assert made == [(name, out / "exports" / name, "fp8") for name in steps]
    (event,) = [line for line in lines(out) if "event" in line]
    assert event == {"event": "export failed", "step": 4, "reason": "export: there is room; got none; make some"}
    assert "step 4: export: there is room" in capfd.readouterr().err
    assert names(out / "checkpoints") == ["step-00000006"], "the end waits for exports, and what they held goes"
    (out / "exports/step-00000006").rmdir()
    pretrain(config)
    assert made[3:] == [("step-00000006", out / "exports/step-00000006", "fp8")], "a missing one is made at the next start"


def test_exports_follow_saves() -> None:
    told = [
        str(found)
        for saves, exports in ((4, 10), (0, 6), (3, 6), (3, 0))
        for found in export_violations("trainer", trainer_config(9, save_every=saves, export_every=exports))
    ]
    assert told == [
        "trainer.export_every: a multiple of trainer.save_every 4; got 10; use trainer.export_every=8 or 12",
        "trainer.export_every: 0 where trainer.save_every is 0; got 6; give trainer.save_every=6",
    ]


def test_copies_are_exact_and_their_memory_is_used_again() -> None:
    host = HostMemory(pinned=False)
    given = [torch.randn(3, 5), torch.randn(4, 6).t(), torch.arange(7, dtype=torch.bfloat16), torch.empty(0), torch.tensor(3)]
    for _ in range(2):
        host.reset()
        made = [host.copy(tensor) for tensor in given]
        assert all(torch.equal(left, right) and left.dtype == right.dtype for left, right in zip(made, given, strict=True))
        assert all(copy.untyped_storage().nbytes() == copy.nbytes for copy in made)
        places = [copy.data_ptr() for copy in made if copy.numel()]
        assert len(set(places)) == len(places) and host.bytes == 8 << 20
    assert host.copy(torch.zeros(3 << 20)).nbytes == 12 << 20 and host.bytes == 20 << 20, "a larger one has a buffer of its own"


def no_memory(*_):
    raise MemoryError("no more")


def of_two(folder: str, fails: str) -> list:
    """One rank of two: two saves beside each other, the second of which ``fails`` in its write or copy on rank 1 alone."""
    mesh = open_mesh(open_device(CPU), ParallelConfig(expert=2), LaunchConfig(), 1)
    trainee = Trainee(MODEL, OPTIM, mesh, "fp32")
    trainee.allocate_moments()
    told = []
    with Saver(mesh, Path(folder), Lineage("pretrain", "two"), background=True, keep_last=2) as moving:
        moving.begin(trainee, TrainState(1))
        before = {name: tensor.clone() for name, tensor in trainee.named_tensors()}
        for _, tensor in trainee.named_tensors():
            tensor.add_(1)
        moving.wait()
        if fails and mesh.rank == 1:
            owner, name, fault = {"write": (megatron_writer.Plan, "write", full), "copy": (HostMemory, "copy", no_memory)}[fails]
            setattr(owner, name, fault)
        try:
            moving.begin(trainee, TrainState(2))
            assert fails != "copy", "no rank goes on"
            moving.wait()
        except UserError as error:
            told.append(str(error))
        if fails == "copy":
            moving.retire = full  # called on rank 0 alone
            try:
                moving.wait(exports=True)
            except UserError as error:
                told.append(str(error))
    there = Path(folder) / "step-00000001"
    mesh.barrier()
    checkpoint.load(trainee, there)
    return [told, all(torch.equal(tensor, before[name]) for name, tensor in trainee.named_tensors()), names(Path(folder))]


@pytest.mark.parametrize("fails", ["", pytest.param("write", marks=pytest.mark.slow), pytest.param("copy", marks=pytest.mark.slow)])
def test_two_ranks_save_together_and_tell_the_same(tmp_path: Path, fails: str) -> None:
    found = run_ranks(of_two, 2, str(tmp_path), fails)
    assert found[0] == found[1] and found[0][1]
    told, _, there = found[0]
    if fails:
        got = {"write": "got No space left", "copy": "; got MemoryError no more; use trainer.async_save=false"}[fails]
        assert told[0].startswith("rank 1: checkpoint ") and got in told[0] and "step-00000001 is whole" in told[0]
        assert ["rank 0: checkpoint" in line and "got No space left" in line for line in told[1:]] == [True] * (fails == "copy")
        assert there == ["step-00000001"]
    else:
        assert not told and there == ["step-00000001", "step-00000002"]
        files = json.loads((tmp_path / "step-00000002/manifest.json").read_text())["files"]
        assert {"weights/__0_0.distcp", "weights/__1_0.distcp", "weights/.metadata", "weights/common.pt"} <= files.keys()
        assert not [name for name in files if "part-" in name]
        checkpoint.verify(tmp_path / "step-00000002")
        assert checkpoint.read_state(tmp_path / "step-00000002")["parent"] == checkpoint.digest(tmp_path / "step-00000001")
