"""Peak memory by phase, on a device whose allocator is a script; and in the metric lines of a real run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.config.run import DeviceConfig
from r1mega.device import Device
from r1mega.testing import parity
from r1mega.testing.ranks import run_ranks
from r1mega.train.peaks import GIB, Peaks
from r1mega.train.pretrain import pretrain
from r1mega.train.trainee import Trainee
from tests.train.cases import MODEL, OPTIM, lines, one_rank, pretrain_config


@dataclass(frozen=True)
class Scripted(Device):
    """A device as a GPU's allocator counts: what is held now, and the peak since the last reset. It computes on the CPU."""

    held: list[int] = field(default_factory=lambda: [GIB, GIB])

    @property
    def is_cpu(self) -> bool:
        return False

    def hold(self, size: int) -> None:
        self.held[:] = size, max(self.held[1], size)

    def reset_peak_bytes(self) -> None:
        self.held[1] = self.held[0]

    def peak_bytes(self) -> int:
        return self.held[1]


def scripted() -> Scripted:
    return Scripted("cpu", torch.device("cpu"), "gloo")


def test_each_phase_has_its_own_peak_and_all_have_one() -> None:
    device = scripted()
    peaks = Peaks(device)
    assert peaks.gib() == {"peak_gib": 1.0}
    for passing, updating, between in ((9, 4, 2), (7, 5, 30), (8, 3, 2)):
        peaks.end("rest")
        for size in (passing, 1):
            device.hold(size * GIB)
        peaks.end("pass")
        for size in (updating, 1):
            device.hold(size * GIB)
        peaks.end("update")
        device.hold(between * GIB)
        device.hold(GIB)
    assert peaks.gib() == {"peak_gib": 30.0, "peak_pass_gib": 9.0, "peak_update_gib": 5.0}
    device.hold(40 * GIB)
    assert peaks.gib()["peak_gib"] == 40.0, "what is under way counts"


def test_a_step_ends_its_phases_where_they_end(monkeypatch) -> None:
    trainee = Trainee(MODEL, OPTIM, one_rank(), "fp32")
    device = scripted()
    trainee.peaks = Peaks(device)
    update = trainee.optimizer.step

    def grown() -> Any:
        device.hold(3 * GIB)
        done = update()
        device.hold(GIB)
        return done

    def loss(losses_BS: torch.Tensor, batch: Any):
        device.hold(6 * GIB)
        total = losses_BS.sum()
        total.register_hook(lambda grad: device.hold(GIB))
        return total, losses_BS.numel(), {}

    from r1mega.model.forward import token_losses

    monkeypatch.setattr(trainee.optimizer, "step", grown)
    device.hold(20 * GIB)
    device.hold(GIB)
    case = parity.Case("one", rows=2, length=16, model={"vocab_size": MODEL.vocab_size})
    trainee.step(parity.rows_of(case, 0, torch.device("cpu")), token_losses, loss, 1e-3, lambda loss, norm: "")
    assert trainee.peaks.by_phase == {"rest": 20 * GIB, "pass": 6 * GIB, "update": 3 * GIB}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_metric_lines_have_the_phases_on_a_gpu(train_data: Path, tmp_path: Path, device: str) -> None:
    config = pretrain_config(train_data, tmp_path / "run", 2)
    config.device = DeviceConfig(kind=device, deterministic=False, threads=1)
    run_ranks(pretrain, 1, config)  # a process of its own: where a CPU was used before, Megatron stays bent for it
    for line in lines(tmp_path / "run"):
        phases = {key for key in line if key.startswith("peak_")}
        if device == "cpu":
            assert phases == {"peak_gib"} and line["peak_gib"] > 0
        else:
            assert line["peak_gib"] >= max(line["peak_pass_gib"], line["peak_update_gib"]) > 0
