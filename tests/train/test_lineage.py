"""Lineage: a chain by hash over runs, removed ancestors and exports; what has changed on disk is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r1mega import api
from r1mega.cli import main
from r1mega.config.errors import UserError
from r1mega.train import checkpoint, manifest
from r1mega.train import lineage as module
from r1mega.train.lineage import KEPT_SAVES, Lineage, chain, converted, exported
from r1mega.train.pretrain import pretrain
from r1mega.train.sft import sft
from tests.train.cases import pretrain_config, sft_config


@pytest.fixture(scope="module")
def runs(train_data: Path, tmp_path_factory) -> Path:
    """``base`` of four steps of which two are kept, and ``tuned`` from it, cut off after step 2 and gone on with to step 3."""
    place = tmp_path_factory.mktemp("runs")
    pretrain(pretrain_config(train_data, place / "base", 4, save_every=1, keep_last=2))
    tuned = sft_config(train_data, checkpoint.resolve(place / "base"), place / "tuned", 2, save_every=1, keep_last=9)
    sft(tuned)
    sft(replace(tuned, trainer=replace(tuned.trainer, steps=3)))
    return place


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "moved"))


def state(path: Path) -> dict:
    return checkpoint.read_state(path)


def told(place: Path, **fields) -> list[tuple]:
    return [(one.command, one.step, one.status) for one in chain(manifest.resolve(place), **fields)]


WHOLE = [
    ("sft", 3, "verified"),
    ("sft", 2, "verified"),
    ("sft", 1, "verified"),
    ("pretrain", 4, "verified"),
    ("pretrain", 3, "verified"),
    ("pretrain", 2, "gone"),
    ("pretrain", 1, "gone"),
]


def test_each_checkpoint_names_the_one_before_it(runs: Path) -> None:
    base = runs / "base/checkpoints"
    digests = {step: checkpoint.digest(base / f"step-{step:08d}") for step in (3, 4)}
    last = state(base / "step-00000004")
    assert (last["command"], last["name"], last["parent"], last["init"]) == ("pretrain", "base", digests[3], None)
    assert last["parent_path"] == "../step-00000003" and last["num_saves"] == 3 and last["lineage"] == []
    assert [step for step, _ in last["saves"]] == [1, 2, 3] and last["saves"][2][1] == digests[3]
    tuned = manifest.finished(runs / "tuned/checkpoints")
    first, second, third = map(state, tuned)
    path = "../../../base/checkpoints/step-00000004"
    assert first["parent"] == digests[4] and first["parent_path"] == path and first["saves"] == []
    assert first["init"] == third["init"] == {"digest": digests[4], "path": path}
    assert second["parent"] == checkpoint.digest(tuned[0]) and third["parent"] == checkpoint.digest(tuned[1])
    about = {"command": "pretrain", "name": "base", "step": 4, "tokens": 4 * 8 * 16, "digest": digests[4], "path": path, "saves": 3}
    assert third["lineage"] == [about] and third["num_saves"] == 2, "the same after a resume"


def test_the_chain_goes_over_runs_and_over_what_is_gone(runs: Path, copy: Path) -> None:
    assert told(runs / "tuned") == told(copy / "tuned") == WHOLE, "a folder of runs may be moved"
    assert [status for _, _, status in told(runs / "tuned", read=False)] == ["present"] * 5 + ["gone"] * 2
    shutil.rmtree(copy / "base")
    assert told(copy / "tuned") == [*WHOLE[:3], ("pretrain", 4, "gone")]


def test_a_roll_back_goes_on_from_where_it_went(tmp_path: Path, runs: Path) -> None:
    one, two = manifest.finished(runs / "tuned/checkpoints")[:2]
    kept = Lineage.begin("sft", "tuned", checkpoint.resolve(runs / "base"))
    for step, path in ((1, one), (2, two)):
        kept.advance(path, step)
    kept.go_on(one)
    record = kept.record(one.with_name("step-00000002"))
    assert record["parent"] == checkpoint.digest(one) and record["saves"] == [[1, checkpoint.digest(one)]]
    assert record["lineage"] == state(two)["lineage"] and record["init"] == state(two)["init"]
    for step in range(2, 2 * KEPT_SAVES):
        kept.advance(one, step)
    record = kept.record(two)
    assert (len(record["saves"]), record["num_saves"]) == (KEPT_SAVES, 2 * KEPT_SAVES - 1), "short, however long the run"


def test_the_command_prints_it_and_names_what_has_changed(copy: Path, capsys) -> None:
    assert main(["lineage", f"checkpoint={copy}/tuned"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    newest = checkpoint.resolve(copy / "tuned")
    assert rows[0] == ["sft", "step", "3", "1152", "tokens", checkpoint.digest(newest)[:12], "verified", str(newest)]
    assert [row[0] for row in rows] == [row[0] for row in WHOLE] and rows[-1][-2] == "gone"
    result = api.lineage(f"checkpoint={copy}/tuned", "json=true")
    printed = json.loads(capsys.readouterr().out)
    assert printed == result and [one["status"] for one in printed["chain"]] == [row[2] for row in WHOLE]
    base = checkpoint.resolve(copy / "base")
    file = base / "weights/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["lineage", f"checkpoint={copy}/tuned"]) == 2
    said = capsys.readouterr()
    assert (
        f"changed {base} (__0_0.distcp matches its hash" in said.err.replace("weights/", "") and "; do not go on from" in said.err
    )
    assert [line.split()[-2] for line in said.out.splitlines()][3] == "changed"
    before = checkpoint.digest(base)[:12]
    (base / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match=rf"got changed {base} \(its digest is {checkpoint.digest(base)[:12]}, not {before}\)"):
        api.lineage(f"checkpoint={copy}/tuned", "hashes=false")
    assert main(["lineage", f"checkpoint={copy}"]) == 2, "no checkpoint"


def published(folder: Path, **tensors: torch.Tensor) -> str:
    folder.mkdir(parents=True)
    save_file(tensors or {"a.weight": torch.arange(6.0).view(2, 3)}, folder / "model.safetensors")
    return manifest.published_digest(folder)


def test_published_checkpoints_are_known_by_their_tensors(tmp_path: Path) -> None:
    one, two = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)
    whole = published(tmp_path / "whole", a=one, b=two)
    save_file({"b": two}, (tmp_path / "parts").mkdir() or tmp_path / "parts/model-1.safetensors", metadata={"format": "pt"})
    save_file({"a": one}, tmp_path / "parts/model-2.safetensors")
    assert manifest.published_digest(tmp_path / "parts") == whole, "whatever the split"
    assert published(tmp_path / "other", a=one, b=two + 1) != whole != published(tmp_path / "shape", a=one.view(3, 2), b=two)
    file = tmp_path / "whole/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model.safetensors is a safetensors file; got ValueError; copy it again"):
        manifest.published_digest(tmp_path / "whole")


def test_from_a_published_checkpoint_to_an_export_and_back(copy: Path, tmp_path: Path) -> None:
    """published -> convert -> sft (here: its state alone) -> export -> convert -> export."""
    source, target = tmp_path / "hub", tmp_path / "native/step-00000000"
    digest = published(source)
    native(target, {"step": 0, "tokens": 0, **converted(source, target, "V3", digest)})
    assert state(target)["parent"] == {"kind": "published", "path": "../../hub", "digest": digest}
    run = Lineage.begin("sft", "s", target)
    final = tmp_path / "run/checkpoints/step-00000005"
    native(final, {"step": 5, "tokens": 10, **run.record(final)})
    out = tmp_path / "run/exports/step-00000005"
    written = published(out, b=torch.zeros(2))
    (out / "r1mega.json").write_text(json.dumps(exported(final, out, "bf16", written)))
    expected = [("export", 5, "verified"), ("sft", 5, "verified"), ("convert", 0, "verified"), ("published", None, "verified")]
    assert [(one.command, one.step, one.status) for one in chain(out)] == expected
    again = tmp_path / "again/step-00000000"
    native(again, {"step": 0, "tokens": 0, **converted(out, again, "back", written)})
    found = list(chain(again))
    assert [(one.command, one.status) for one in found] == [
        (name, "verified") for name in ("convert", "published", "sft", "convert", "published")
    ]
    shutil.rmtree(target.parent)
    save_file({"b": torch.ones(2)}, out / "model.safetensors")
    assert [(one.command, one.status) for one in chain(again)] == [
        ("convert", "verified"), ("published", "changed"), ("sft", "verified"), ("convert", "gone"), ("published", "verified"),
    ]  # fmt: skip
    (out / "r1mega.json").write_text("{}")
    with pytest.raises(UserError, match="r1mega.json is one of r1mega's; got KeyError; export it again"):
        list(chain(out))


def native(folder: Path, record: dict) -> None:
    """A checkpoint without tensors."""
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(record))
    manifest.write(folder, manifest.hashes(folder))


def test_a_checkpoint_of_an_earlier_version_names_its_parent(tmp_path: Path) -> None:
    native(tmp_path / "step-00000001", {"command": "rl", "step": 1, "tokens": 2, "parent": "ab" * 32})
    assert [(one.command, one.digest, one.status) for one in chain(tmp_path / "step-00000001")][1:] == [(None, "ab" * 32, "gone")]
    kept = Lineage.begin("sft", "s", tmp_path / "step-00000001")
    assert kept.record(tmp_path / "x/step-00000001")["lineage"][0]["step"] == 1
    assert "?" in module._table(list(chain(tmp_path / "step-00000001")))
