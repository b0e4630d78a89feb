"""``nvtx=true``: layers and ops are named ranges of a trace, forward and backward, while it is wanted and not after."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from r1mega.mesh import close_mesh
from r1mega.model.forward import TokenTensors, token_losses
from r1mega.ops import library
from r1mega.train.fit import masked_sum
from r1mega.train.pretrain import pretrain
from r1mega.train.ranges import named_layers
from r1mega.train.trainee import Trainee
from tests.train.cases import LENGTH, MODEL, OPTIM, one_rank, pretrain_config


def step(trainee: Trainee, num: int = 2):
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(MODEL.vocab_size, (num, 1, LENGTH + 1), generator=draw)
    batches = [TokenTensors(row[:, :-1], row[:, 1:], torch.ones(1, LENGTH)) for row in tokens]
    return trainee.step(batches, token_losses, masked_sum, 1e-3, lambda loss, norm: "")


def test_layers_and_ops_are_named_once_a_pass_and_numbers_stay(monkeypatch) -> None:
    found = []
    for named in (False, True):
        mesh = one_rank()
        torch.manual_seed(3)
        trainee = Trainee(MODEL, OPTIM, mesh, "fp32")
        events: list[str] = []

        def open_range(self, name, events=events):
            events.append(f"begin {name}")
            return lambda: events.append(f"end {name}")

        monkeypatch.setattr(type(mesh.device), "open_range", open_range)
        with named_layers(trainee, named):
            result = step(trainee)
        seen = list(events)
        step(trainee)
        assert events == seen, "nothing after the end"
        found.append((result.loss, result.grad_norm, seen))
        close_mesh()
    (loss, norm, quiet), (named_loss, named_norm, seen) = found
    assert (loss, norm) == (named_loss, named_norm) and quiet == []
    for number in (1, 2):
        for way in ("forward", "backward"):
            for edge in ("begin", "end"):
                assert seen.count(f"{edge} layer {number} {way}") >= 2, "one a microbatch; an MTP block has a layer of its own too"
    layers = [event for event in seen if "layer 1 " in event or "layer 2 " in event]
    assert layers[:2] == ["begin layer 1 forward", "end layer 1 forward"]
    first = layers.index("begin layer 1 backward")
    assert layers.index("begin layer 2 backward") < first < layers.index("end layer 1 backward")
    assert seen.count("begin r1mega::permute") == seen.count("end r1mega::permute") > 0


def test_the_trace_of_a_run_has_them(train_data: Path, tmp_path: Path) -> None:
    config = pretrain_config(train_data, tmp_path / "run", 3)
    config.data.valid, config.profile, config.nvtx = None, True, True
    pretrain(config)
    assert library._open_range is None
    names = {event.get("name") for event in json.loads((tmp_path / "run/profile/rank0.json").read_text())["traceEvents"]}
    assert {"layer 1 forward", "layer 1 backward", "layer 2 forward", "layer 2 backward", "r1mega::permute"} <= names
