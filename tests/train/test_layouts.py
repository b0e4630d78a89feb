"""Two ranks and one: the same numbers from the same weights, in every layout; checkpoints move between them.

The ranks are started once and do every case in turn. Adam's epsilon is 1e-6 and numbers are fp32, so what differs is rounding.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.config.run import ParallelConfig
from r1mega.mesh import close_mesh
from r1mega.testing.ranks import run_ranks
from r1mega.train import fit
from r1mega.train.checkpoint import latest
from r1mega.train.export import export
from r1mega.train.pipeline.timeline import bubble_share, read_events
from r1mega.train.pretrain import pretrain
from r1mega.train.sft import sft
from tests.train.cases import CPU, lines, pretrain_config, sft_config, stored

STEPS = 3
TOLERANCE = 1e-5


class CutOff(Exception):
    """The process is gone."""


def run(
    data: Path,
    out: Path,
    steps: int = STEPS,
    *,
    start: Path | None = None,
    degrees: dict[str, int] | None = None,
    profile: bool = False,
    **trainer: Any,
):
    """Pretrain from the seed checkpoint (or on from ``out``'s own) in a layout; the mesh is closed after it."""
    config = pretrain_config(data, out, steps, **{"micro_batch_size": 2, **trainer})
    config.init = str(start or data / "seed")
    config.parallel = ParallelConfig(**(degrees or {}))
    config.profile = profile
    try:
        return pretrain(config)
    finally:
        close_mesh()


def cut_off(data: Path, out: Path, call, step: int) -> None:
    """``call()`` that ends before optimizer step ``step``, then once more to the end."""
    rate = fit.learning_rate

    def until(optim, now, steps):
        if now == step:
            raise CutOff
        return rate(optim, now, steps)

    fit.learning_rate = until
    try:
        call()
        raise AssertionError("the run was not cut off")
    except CutOff:
        pass
    finally:
        fit.learning_rate = rate
    call()


def tune(data: Path, out: Path, **degrees: int) -> None:
    """Fine-tune from the seed checkpoint in a layout; the mesh is closed after it."""
    config = sft_config(data, data / "seed", out, 4, save_every=2, micro_batch_size=2)
    config.parallel = ParallelConfig(**degrees)
    try:
        sft(config)
    finally:
        close_mesh()


def two_ranks(data: Path, there: Path) -> None:
    """What two ranks do in every test run, under ``there``: one layout for each way of sharing data."""
    run(data, there / "tensor", degrees={"tensor": 2})
    run(data, there / "straight", 6, save_every=3)
    cut_off(data, there / "cut", lambda: run(data, there / "cut", 6, save_every=3), 5)
    run(data, there / "from_one", 6)  # its folder holds one rank's checkpoint of step 3
    tune(data, there / "sft_straight")
    tune(data, there / "sft_context", context=2)
    run(data, there / "pipeline", degrees={"pipeline": 2}, profile=True)


def two_ranks_more(data: Path, there: Path) -> None:
    """The other layouts; the parity kit has them in every test run, without the loader."""
    run(data, there / "one_microbatch", micro_batch_size=4)
    run(data, there / "two_microbatches", micro_batch_size=2)
    run(data, there / "expert", degrees={"expert": 2})
    run(data, there / "both", degrees={"tensor": 2, "expert": 2})
    run(data, there / "context", degrees={"context": 2})
    tune(data, there / "sft_pipeline", pipeline=2)
    cut_off(data, there / "sft_cut", lambda: tune(data, there / "sft_cut"), 3)


@pytest.fixture(scope="module")
def runs(train_data: Path, seed_run: Path, tmp_path_factory) -> Path:
    """The folder of all runs; ``one``: what they are compared with."""
    folder = tmp_path_factory.mktemp("layouts")
    close_mesh()
    run(train_data, folder / "one", 6, save_every=3, micro_batch_size=4, keep_last=5)
    (folder / "from_one/checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "one/checkpoints/step-00000003", folder / "from_one/checkpoints/step-00000003")
    run_ranks(two_ranks, 2, train_data, folder)
    return folder


@pytest.fixture(scope="module")
def more_runs(train_data: Path, runs: Path) -> Path:
    """The same folder with the other layouts' runs."""
    run_ranks(two_ranks_more, 2, train_data, runs)
    return runs


def assert_same(left: Path, right: Path, steps: int, tolerance: float = TOLERANCE) -> None:
    """Losses, gradient norms, loads (metrics have six digits) and weights after ``steps`` steps agree."""
    ours, theirs = (lines(run)[-steps:] for run in (left, right))
    for one, other in zip(ours, theirs, strict=True):
        assert one["step"] == other["step"]
        for name in ("lm_loss", "mtp_loss", "aux_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=2 * tolerance), f"{name} of step {one['step']}"
        assert one["expert_load"][0] == pytest.approx(other["expert_load"][0], abs=1e-6)
    assert_same_weights(left, right, max(line["step"] for line in ours), tolerance)


def assert_same_weights(left: Path, right: Path, step: int, tolerance: float) -> None:
    ours, theirs = (stored(run / f"checkpoints/step-{step:08d}") for run in (left, right))
    assert ours.keys() == theirs.keys(), "a checkpoint's names do not depend on the layout"
    for name, tensor in ours.items():
        if not name.startswith("optimizer."):
            torch.testing.assert_close(tensor, theirs[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def first_three(runs: Path) -> Path:
    """The one rank's run up to step 3."""
    folder = runs / "one_three"
    shutil.copytree(runs / "one", folder)
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:STEPS]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_two_ranks_learn_what_one_learns(runs: Path, first_three: Path, layout: str) -> None:
    assert_same(runs / layout, first_three, STEPS)


@pytest.mark.slow
def test_two_data_ranks_learn_what_one_learns(runs: Path) -> None:
    assert_same(runs / "straight", runs / "one", 6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one_microbatch", "two_microbatches", "expert", "both", "context"])
def test_two_ranks_learn_what_one_learns_in_other_layouts(more_runs: Path, first_three: Path, layout: str) -> None:
    assert_same(more_runs / layout, first_three, STEPS)


@pytest.mark.slow
def test_packed_samples_are_learnt_alike(runs: Path) -> None:
    assert_same(runs / "sft_context", runs / "sft_straight", 4)


@pytest.mark.slow
def test_packed_samples_are_learnt_alike_by_stages(more_runs: Path) -> None:
    assert_same(more_runs / "sft_pipeline", more_runs / "sft_straight", 4)


@pytest.mark.slow
def test_a_traced_pipeline_says_what_its_ranks_did(runs: Path) -> None:
    recorded = read_events(runs / "pipeline")
    assert recorded.step == STEPS
    for rank, events in enumerate(recorded.events_by_rank):
        done = sorted((event.work, event.stage, event.microbatch) for event in events)
        assert done == sorted((work, rank, microbatch) for work in "FB" for microbatch in range(4))
        assert all(event.begin_seconds <= event.end_seconds for event in events)
    assert 0 < bubble_share(recorded.events_by_rank) < 1


def assert_same_bits(left: Path, right: Path) -> None:
    ours, theirs = (stored(latest(run / "checkpoints")) for run in (left, right))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert [line["lm_loss"] for line in lines(left)] == [line["lm_loss"] for line in lines(right)]


@pytest.mark.slow
def test_two_ranks_that_are_cut_off_go_on_bit_for_bit(runs: Path) -> None:
    assert_same_bits(runs / "straight", runs / "cut")


@pytest.mark.slow
def test_two_ranks_that_are_cut_off_in_an_sft_go_on_bit_for_bit(more_runs: Path) -> None:
    assert_same_bits(more_runs / "sft_straight", more_runs / "sft_cut")


@pytest.mark.slow
def test_one_ranks_checkpoint_goes_on_with_two(runs: Path) -> None:
    assert_same(runs / "from_one", runs / "one", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["straight", "tensor"])
def test_two_ranks_checkpoint_goes_on_with_one(runs: Path, train_data: Path, layout: str) -> None:
    out = runs / f"{layout}_then_one"
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(runs / layout / "checkpoints/step-00000003", out / "checkpoints/step-00000003")
    run(train_data, out, 6, micro_batch_size=4)
    assert_same(out, runs / "one", STEPS)


@pytest.mark.slow
def test_two_ranks_checkpoint_exports_like_one_ranks(runs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from r1mega.config.rl import ExportConfig

    files = {}
    for name in ("tensor", "one_three"):
        source = str(runs / name / "checkpoints/step-00000003")
        export(ExportConfig(device=CPU, checkpoint=source, target=str(tmp_path / name)))
        files[name] = load_file(tmp_path / name / "model.safetensors")
    assert files["tensor"].keys() == files["one_three"].keys()
    for name, tensor in files["tensor"].items():
        torch.testing.assert_close(tensor, files["one_three"][name], atol=TOLERANCE, rtol=0)
