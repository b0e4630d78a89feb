"""Checkpoints: whole or not there at all; damage is named; what is loaded is what was saved."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1mega.compat import megatron_writer
from r1mega.config.errors import UserError
from r1mega.train import checkpoint
from r1mega.train.checkpoint import TrainState
from r1mega.train.manifest import check_same_command
from r1mega.train.pretrain import pretrain
from r1mega.train.trainee import Trainee
from tests.train.cases import MODEL, OPTIM, lines, one_rank, pretrain_config, stored


@pytest.fixture
def copy(seed_run: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(checkpoint.resolve(seed_run), tmp_path / "step-00000001"))


def fresh(**changes) -> Trainee:
    return Trainee(replace(MODEL, **changes), OPTIM, one_rank(), "fp32")


def test_folders(seed_run: Path) -> None:
    path = checkpoint.resolve(seed_run)
    assert (
        path
        == checkpoint.latest(seed_run / "checkpoints")
        == checkpoint.resolve(seed_run / "checkpoints")
        == checkpoint.resolve(path)
    )
    assert path.name == "step-00000001" and checkpoint.read_model(seed_run) == MODEL
    state = checkpoint.read_state(path)
    assert (state["step"], state["parent"], state["degrees"]["data"]) == (1, None, 1)
    assert checkpoint.digest(path) == checkpoint.digest(seed_run) and len(checkpoint.digest(path)) == 64
    named = set(json.loads((path / "manifest.json").read_text())["files"])
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert there == named | {"manifest.json"} and {"state.json", "tokenizer/tokenizer.json", "rng.pt"} <= named
    with pytest.raises(UserError, match="checkpoint: a folder with manifest.json"):
        checkpoint.resolve(seed_run / "tensorboard")


def test_weights_come_back_and_moments_only_when_asked(copy: Path) -> None:
    trainee = fresh()
    state = checkpoint.load(trainee, copy)
    assert (state.step, state.tokens) == (1, 8 * 16) and state.cursor["kind"] == "text"
    moments = [value for part in trainee.optimizer.chained_optimizers for value in part.optimizer.state.values()]
    assert moments and all(value["step"] == 1 for value in moments) and any(value["exp_avg"].abs().max() > 0 for value in moments)
    only = fresh()
    torch.manual_seed(77)
    before = torch.get_rng_state()
    checkpoint.load(only, copy, weights_only=True)
    assert torch.equal(torch.get_rng_state(), before), "the generator is left alone"
    assert not any(part.optimizer.state for part in only.optimizer.chained_optimizers)
    wanted = dict(trainee.named_tensors())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in only.named_tensors())
    main = [
        group["params"][0] for part in only.optimizer.chained_optimizers for group in part.optimizer.param_groups if group["params"]
    ]
    theirs = [
        group["params"][0]
        for part in trainee.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        if group["params"]
    ]
    assert all(torch.equal(ours, other) for ours, other in zip(main, theirs, strict=True)), (
        "the optimizer starts from the loaded weights"
    )


def weights(path: Path) -> Path:
    return max((path / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("part", ["weights", "state.json"])
@pytest.mark.parametrize(
    "damage, says",
    [(truncate, r"has \d+ bytes; got \d+"), (flip, "matches its hash; got other content"), (Path.unlink, "is missing")],
)
def test_damage_is_named(copy: Path, damage, says: str, part: str) -> None:
    file = weights(copy) if part == "weights" else copy / part
    damage(file)
    trainee = fresh()
    before = {name: tensor.clone() for name, tensor in trainee.named_tensors()}
    with pytest.raises(UserError, match=f"^checkpoint .*{file.name}.*{says}.*; use an older checkpoint$"):
        checkpoint.load(trainee, copy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.named_tensors()), "nothing was loaded"


def test_a_checkpoint_of_another_model_is_refused_with_the_fields(copy: Path) -> None:
    with pytest.raises(UserError, match=r"got moe_ffn_size 16 \(model.moe_ffn_size=24\), num_experts 8 \(model.num_experts=4\)"):
        checkpoint.load(fresh(moe_ffn_size=24, num_experts=4), copy)
    assert checkpoint.load(fresh(mtp_loss_coef=0.1, name="other"), copy).step == 1


def test_an_unfinished_folder_is_not_seen(copy: Path) -> None:
    runs = copy.parent
    shutil.copytree(copy, runs / ".step-00000008.tmp")
    shutil.copytree(copy, runs / "damaged-step-00000007")
    assert checkpoint.latest(runs) == copy
    shutil.copytree(copy, runs / "step-00000009")  # finished once, as its name says
    (runs / "step-00000009/manifest.json").unlink()
    with pytest.raises(UserError, match="got .*step-00000009"):
        checkpoint.resolve(runs / "step-00000009")
    with pytest.raises(UserError, match=rf"step-00000009: every .* has its manifest.json; got none; use {copy}, the one before"):
        checkpoint.resolve(runs)


def test_a_save_that_is_cut_off_leaves_the_old_one(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    pretrain(pretrain_config(train_data, out, 1))
    digest = checkpoint.digest(out)

    def cut(folder: Path, entries: dict) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            UserError,
            match=r"checkpoint .*: the disk takes what is saved; got No space left on device with .* GiB free; make room and run the "
            "same command, step-00000001 is whole and it goes on from there",
        ),
    ):
        patch.setattr("r1mega.train.manifest.write", cut)
        pretrain(pretrain_config(train_data, out, 2))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000001"], "the disk has its room back"
    assert checkpoint.digest(out) == digest
    checkpoint.verify(checkpoint.resolve(out))
    assert pretrain(pretrain_config(train_data, out, 2))["steps"] == 2
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_old_ones_are_removed_and_the_parent_is_kept(copy: Path, tmp_path: Path) -> None:
    trainee = fresh()
    trainee.allocate_moments()
    folder = tmp_path / "kept"
    for step in (1, 2, 3):
        path = checkpoint.save(
            trainee, TrainState(step), folder, keep_last=2, tokenizer=None, parent="abc", command="rl", reference=nullcontext
        )
    assert sorted(held.name for held in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoint.read_state(path)["parent"] == "abc"
    assert checkpoint.load_reference(trainee, path) and not checkpoint.load_reference(trainee, copy)
    checkpoint.verify(path)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_record_that_is_no_json_is_named_by_whoever_reads_it_first(copy: Path, name: str) -> None:
    (copy / name).write_text("{half")
    with pytest.raises(UserError, match=f"{name} is readable JSON"):
        (checkpoint.verify if name == "manifest.json" else checkpoint.read_model)(copy)


def test_another_commands_checkpoint_is_refused(train_data: Path, tmp_path: Path) -> None:
    pretrain(pretrain_config(train_data, tmp_path / "run", 1))
    with pytest.raises(UserError, match="^out: sft goes on in its own folder; got one that pretrain wrote"):
        check_same_command("sft", checkpoint.resolve(tmp_path / "run"))


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    def spoilt(losses, batch):
        return (losses * float("nan")).sum(), batch.num_learnt, {}

    monkeypatch.setattr("r1mega.train.fit.masked_sum", spoilt)
    with pytest.raises(UserError, match="training: sound losses with trainer.on_spike=stop; got loss nan"):
        pretrain(pretrain_config(train_data, tmp_path / "run", 1, on_spike="stop"))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize("bytes_left", [0, *(pytest.param(size, marks=pytest.mark.slow) for size in (60_000, 150_000))])
def test_a_file_system_that_refuses_leaves_the_last_checkpoint(train_data: Path, tmp_path: Path, bytes_left: int) -> None:
    """A real refusal while tensors are written (a limit on file sizes), in Megatron's writer and in ours."""
    out = tmp_path / "run"
    pretrain(pretrain_config(train_data, out, 1))
    digest = checkpoint.digest(out)
    config = pretrain_config(train_data, out, 2)
    mesh_is_open_before_the_limit = one_rank()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = (out / "metrics.jsonl").stat().st_size + 8192  # metrics and config are written first
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics + bytes_left, before[1]))
    try:
        with pytest.raises(
            UserError, match="got (File too large|.*unexpected pos).* GiB free; .*step-00000001 is whole and it goes on"
        ):
            pretrain(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert mesh_is_open_before_the_limit and checkpoint.digest(out) == digest
    assert pretrain(config)["steps"] == 2


def test_a_defect_while_saving_is_not_called_a_full_disk(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    for error, says in ((KeyError("ours"), "ours"), (torch.OutOfMemoryError("no memory"), "^memory: a step fits; got no memory")):

        def fail(plan, at_each, error=error):
            raise error

        with monkeypatch.context() as patch, pytest.raises((KeyError, UserError), match=says):
            patch.setattr(megatron_writer.Plan, "write", fail)
            pretrain(pretrain_config(train_data, tmp_path / "run", 1))


@pytest.mark.parametrize(("here", "there", "says"), [(1, 0, "without"), (0, 1, "with")])
def test_a_tensor_that_is_missing_or_too_much_is_named(train_data: Path, tmp_path: Path, monkeypatch, here, there, says) -> None:
    """The manifest and the architecture are right; the tensors are another model's."""
    monkeypatch.setattr(checkpoint.manifest, "check_same_model", lambda *_: None)
    pretrain(pretrain_config(train_data, tmp_path / "run", 1, model=replace(MODEL, num_mtp_layers=there)))
    trainee = Trainee(replace(MODEL, num_mtp_layers=here), OPTIM, one_rank(), "fp32")
    with pytest.raises(UserError, match=rf"holds exactly this model's tensors; got one {says} (mtp|optimizer)\..* and so on"):
        checkpoint.load(trainee, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 8 MiB of its own, where this machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_room_mends_it(train_data: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    pretrain(pretrain_config(train_data, out, 1))
    size = sum(file.stat().st_size for file in checkpoint.resolve(out).rglob("*") if file.is_file())
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - size // 2))
    digest = checkpoint.digest(out)
    with pytest.raises(UserError, match="got No space left on device .* step-00000001 is whole"):
        pretrain(pretrain_config(train_data, out, 2))
    assert checkpoint.digest(out) == digest and not list((out / "checkpoints").glob(".step*"))
    filler.unlink()
    assert pretrain(pretrain_config(train_data, out, 2))["steps"] == 2


@pytest.fixture
def three(train_data: Path, tmp_path: Path) -> Path:
    """A finished run with three checkpoints."""
    out = tmp_path / "run"
    pretrain(pretrain_config(train_data, out, 3, save_every=1, keep_last=3))
    return out


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (truncate, "weights"),
        (flip, "weights"),
        (Path.unlink, "weights"),
        (Path.unlink, "manifest.json"),
        (truncate, "state.json"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((flip, "manifest.json"), (truncate, "manifest.json"))),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(train_data: Path, three: Path, damage, part: str, capfd) -> None:
    newest = checkpoint.resolve(three)
    wanted = {name: tensor.clone() for name, tensor in stored(newest).items()}
    damage(weights(newest) if part == "weights" else newest / part)
    config = pretrain_config(train_data, three, 3, save_every=1, keep_last=3)
    assert pretrain(config)["steps"] == 3
    told = capfd.readouterr().err
    assert f"checkpoint {newest}: " in told and "going on from step-00000002" in told
    assert [line["step"] for line in lines(three)] == [1, 2, 3]
    again = stored(checkpoint.resolve(three))
    assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)
    names = sorted(path.name for path in (three / "checkpoints").iterdir())
    assert names == ["damaged-step-00000003", "step-00000001", "step-00000002", "step-00000003"]


def test_two_damaged_ones_are_passed_over_and_all_damaged_ones_end_the_run(train_data: Path, three: Path, capfd) -> None:
    folders = checkpoint.manifest.finished(three / "checkpoints")
    flip(weights(folders[2]))
    truncate(folders[1] / "rng.pt")
    config = pretrain_config(train_data, three, 3, save_every=1, keep_last=3)
    assert pretrain(config)["steps"] == 3
    assert capfd.readouterr().err.count("going on from step-00000001") == 2
    for folder in checkpoint.manifest.finished(three / "checkpoints"):
        truncate(folder / "rng.pt")
    with pytest.raises(
        UserError, match=r"checkpoints .*: one at least is whole; got step-00000003: rng.pt has .*remove the folder"
    ):
        pretrain(config)
    assert len(checkpoint.manifest.finished(three / "checkpoints")) == 3, "nothing is moved where nothing helps"


def test_a_damaged_checkpoint_to_start_from_names_the_one_before(three: Path) -> None:
    folders = checkpoint.manifest.finished(three / "checkpoints")
    flip(weights(folders[2]))
    with pytest.raises(UserError, match=rf"matches its hash; got other content; use {folders[1]}, the one before$"):
        checkpoint.load(fresh(), three, weights_only=True)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/r1mega-was-here",)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (pickle.dumps(Evil()), r"names classes of torch alone; got (posix|os).system, which could run a program of somebody's"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "names classes of torch alone; got builtins.eval"),
        (b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.", "names classes .* got torch.*os.system"),
        (b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x02os\x93.", "names classes .* got torch.*filesystem.os"),
        (b"no pickle", "is a pickle; got "),
    ],
)
def test_metadata_that_would_run_something_is_refused(copy: Path, body: bytes, says: str) -> None:
    """With a manifest that fits it: who makes the one makes the other."""
    (copy / "weights/.metadata").write_bytes(body)
    (copy / "manifest.json").unlink()
    checkpoint.manifest.write(copy, checkpoint.manifest.hashes(copy))
    with pytest.raises(UserError, match=says):
        checkpoint.load(fresh(), copy, weights_only=True)
    assert not Path("/tmp/r1mega-was-here").exists()


def test_what_a_kill_left_behind_goes(train_data: Path, three: Path) -> None:
    rest = three / "checkpoints"
    for name in (".step-00000007.tmp", ".step-00000001.old"):
        shutil.copytree(checkpoint.resolve(three), rest / name)
    assert pretrain(pretrain_config(train_data, three, 3, save_every=1, keep_last=3))["steps"] == 3
    assert sorted(path.name for path in rest.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]
