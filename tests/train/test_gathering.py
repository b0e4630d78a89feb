"""Whole tensors from every layout are those that one rank has, bit for bit, on every rank or on the first alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.device import open_device
from r1mega.mesh import close_mesh, open_mesh
from r1mega.model import names
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint
from r1mega.train.gathering import whole_tensors
from r1mega.train.pretrain import pretrain
from r1mega.train.trainee import Trainee
from tests.train.cases import CPU, MODEL, pretrain_config, write_data

LAYOUTS = (
    {},
    {"tensor": 2},
    {"expert": 2},
    {"tensor": 2, "expert": 2},
    {"tensor": 2, "expert_tensor": 2},
    {"context": 2},
    {"pipeline": 2},
)


def gathered(seed: Path) -> list[list[dict[str, torch.Tensor]]]:
    """What this rank is given in each layout: everywhere, on the first alone."""
    found = []
    for degrees in LAYOUTS:
        mesh = open_mesh(open_device(CPU), ParallelConfig(**degrees), LaunchConfig(), 1)
        trainee = Trainee(MODEL, None, mesh, "fp32")
        checkpoint.load(trainee, seed, weights_only=True)
        found.append([{n: t.clone() for n, t in whole_tensors(trainee, everywhere=where)} for where in (True, False)])
        close_mesh()
    return found


@pytest.fixture(scope="module")
def seed(tmp_path_factory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("gathering"))
    pretrain(pretrain_config(folder, folder / "seed", 1))
    close_mesh()
    return folder / "seed"


@pytest.mark.slow
def test_every_layout_gives_the_whole_model(seed: Path) -> None:
    mesh = open_mesh(open_device(CPU), ParallelConfig(), LaunchConfig(), 1)
    alone = Trainee(MODEL, None, mesh, "fp32")
    checkpoint.load(alone, seed, weights_only=True)
    want = {name: tensor.clone() for name, tensor in whole_tensors(alone, everywhere=True)}
    assert want.keys() == names.native_shapes(MODEL).keys()
    close_mesh()
    first, second = run_ranks(gathered, 2, seed)
    for degrees, (everywhere, on_first), (also, on_second) in zip(LAYOUTS, first, second, strict=True):
        assert on_second == {}, degrees
        for got in (everywhere, on_first, also):
            assert list(got) == list(names.native_shapes(MODEL)), degrees
            wrong = [name for name, tensor in got.items() if not torch.equal(tensor, want[name])]
            assert not wrong, (degrees, wrong)
