"""The phases of context extension: they say what DeepSeek-V3 did, and a tiny model trains in them over context ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from r1mega.config import compose as composing
from r1mega.config.compose import compose
from r1mega.mesh import close_mesh
from r1mega.testing.ranks import run_ranks
from tests.train.cases import lines, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data to train on."""
    place = write_data(tmp_path_factory.mktemp("phase"))
    before = composing.config_dir
    yield place
    composing.config_dir = before


@pytest.mark.parametrize("name, length, batch", [("v3_32k", 32768, 1920), ("v3_128k", 131072, 480)])
def test_a_phase_is_that_of_v3(folder: Path, name: str, length: int, batch: int) -> None:
    config = compose("pretrain", ["model=deepseek_v3", f"phase={name}", "data.train={x:1}", "init=checkpoint"])
    optim, trainer, yarn = config.optim, config.trainer, config.model.yarn
    assert (config.data.sequence_length, trainer.global_batch_size, trainer.steps) == (length, batch, 1000)
    assert (optim.lr, optim.warmup_steps, optim.decay, optim.batch_ramp_start) == (7.3e-6, 0, "constant", 0)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_grad) == (0.9, 0.95, 0.1, 1.0), "pretraining's still"
    assert (yarn.factor, yarn.beta_slow, yarn.beta_fast, yarn.original_max_position_embeddings) == (40, 1, 32, 4096)
    assert 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1 == pytest.approx(1.3689, abs=1e-4), "sqrt(t), on the softmax scale"
    assert yarn.mscale == yarn.mscale_all_dim, "and none on the rotary table"
    assert trainer.steps * batch * length == pytest.approx(62.9e9, rel=1e-3), "tokens of a phase"


def test_keys_win_over_the_phase_and_the_phase_over_other_groups(folder: Path) -> None:
    config = compose("pretrain", ["phase=v3_32k", "optim=r1_sft", "model=small", "trainer.steps=7", "data.train={x:1}"])
    assert (config.optim.lr, config.optim.decay, config.trainer.steps) == (7.3e-6, "constant", 7)
    assert (config.model.name, config.model.yarn.factor) == ("small", 40)


def train(folder: Path, out: Path, context: int, exchange: str = "allgather") -> None:
    """Two steps of the second phase at a 2,048th of its length, from the same fresh weights in every layout."""
    from r1mega.train.pretrain import pretrain

    try:
        pretrain(
            compose(
                "pretrain",
                [
                    "model=tiny",
                    "phase=v3_128k",
                    f"parallel.context={context}",
                    f"parallel.context_exchange={exchange}",
                    f"launch.processes={context}",
                    "data.sequence_length=64",
                    "trainer.global_batch_size=2",
                    "trainer.steps=2",
                    "trainer.log_every=1",
                    "trainer.peak_tflops=0.01",
                    "optim.lr=1e-3",
                    f"data.train={{{folder / 'text'}:1}}",
                    f"data.valid={folder / 'text'}",
                    "trainer.valid_batches=1",
                    f"out={out}",
                ],
            )
        )
    finally:
        close_mesh()


def both_exchanges(folder: Path) -> None:
    for exchange in ("allgather", "ring"):
        train(folder, folder / exchange, 2, exchange)


@pytest.mark.slow
def test_a_scaled_down_phase_trains_on_two_context_ranks_as_on_one(folder: Path) -> None:
    close_mesh()
    train(folder, folder / "one", 1)
    run_ranks(both_exchanges, 2, folder)
    one = lines(folder / "one")
    assert [line["step"] for line in one] == [1, 2] and one[1]["lm_loss"] < one[0]["lm_loss"]
    for exchange in ("allgather", "ring"):
        for ours, theirs in zip(lines(folder / exchange), one, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            for name in ("lm_loss", "mtp_loss", "aux_loss", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], abs=2e-5), f"{name} of step {ours['step']}, {exchange}"
        assert lines(folder / exchange)[-1]["valid_loss"] == pytest.approx(one[-1]["valid_loss"], abs=2e-5)
