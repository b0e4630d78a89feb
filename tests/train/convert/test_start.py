"""A converted model is a beginning like any other: pretraining, fine-tuning and RL start from it, and an export closes the circle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from r1mega.config.rl import ExportConfig
from r1mega.train import checkpoint
from r1mega.train.export import export
from r1mega.train.pretrain import pretrain
from r1mega.train.sft import sft
from tests.rl.test_loop import config as rl_config
from tests.train.cases import CPU, lines, pretrain_config, sft_config, stored
from tests.train.convert.cases import read, run, same


@pytest.fixture(scope="module")
def native(seed_run: Path, tmp_path_factory) -> Path:
    """A trained checkpoint, exported and converted back."""
    folder = tmp_path_factory.mktemp("circle")
    export(ExportConfig(device=CPU, checkpoint=str(seed_run), target=str(folder / "hf")))
    run(folder / "hf", folder / "native", verify=True)
    return folder / "native"


def test_what_comes_back_are_the_trained_weights(seed_run: Path, native: Path) -> None:
    theirs, ours = stored(checkpoint.resolve(seed_run)), stored(native)
    weights = {name for name in theirs if not name.startswith("optimizer.")}
    assert ours.keys() == weights and all(torch.equal(ours[name], theirs[name]) for name in weights)


def test_training_goes_on_from_it(seed_run: Path, native: Path, train_data: Path, tmp_path: Path) -> None:
    """The same steps as from the checkpoint itself."""
    for name, init in (("ours", native), ("theirs", seed_run)):
        run_config = pretrain_config(train_data, tmp_path / name, 2)
        run_config.init = str(init)
        pretrain(run_config)
        sft(sft_config(train_data, init, tmp_path / f"{name}_sft", 1))
    for left, right in (("ours", "theirs"), ("ours_sft", "theirs_sft")):
        assert [line["lm_loss"] for line in lines(tmp_path / left)] == [line["lm_loss"] for line in lines(tmp_path / right)]


def test_rl_starts_from_it(native: Path, train_data: Path, tmp_path: Path) -> None:
    from r1mega.rl.loop import rl

    problems = [{"question": f"{left}+1", "answer": str(left + 1)} for left in range(6)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    run_config = rl_config(tmp_path, tmp_path / "rl", rollouts=1)
    run_config.init = str(native)
    rl(run_config)
    assert len(lines(tmp_path / "rl")) == 1


def test_an_fp8_export_comes_back_close(seed_run: Path, tmp_path: Path) -> None:
    from r1mega.model.names import SCALE

    export(ExportConfig(device=CPU, checkpoint=str(seed_run), target=str(tmp_path / "hf"), dtype="fp8"))
    run(tmp_path / "hf", tmp_path / "native", verify=True)
    run(tmp_path / "native", tmp_path / "again", dtype="fp8")
    same(read(tmp_path / "hf"), read(tmp_path / "again"))
    exact, ours = stored(checkpoint.resolve(seed_run)), stored(tmp_path / "native")
    scaled = {name.removesuffix(SCALE) for name in read(tmp_path / "hf") if name.endswith(SCALE)}
    assert scaled and "model.embed_tokens.weight" not in scaled
    key = "decoder.layers.1.mlp.experts.weight1"
    assert (ours[key].float() - exact[key]).norm() < 0.04 * exact[key].norm()
