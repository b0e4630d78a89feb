"""The bends of the checkpoint writer: each works, and each is still needed."""

from __future__ import annotations

import inspect
import multiprocessing
import queue
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.cases import MODEL, OPTIM, one_rank, stored


@pytest.fixture
def trainee():
    from r1mega.train.trainee import Trainee

    made = Trainee(MODEL, OPTIM, one_rank(), "fp32")
    made.allocate_moments()
    return made


def test_a_checkpoint_is_written_without_another_process(trainee, tmp_path: Path, monkeypatch) -> None:
    from r1mega.train import checkpoint
    from r1mega.train.checkpoint import TrainState

    def refuse(self) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    path = checkpoint.save(trainee, TrainState(step=1), tmp_path, keep_last=1, tokenizer=None, parent=None, command="pretrain")
    checkpoint.verify(path)


def test_upstream_still_starts_a_manager_and_forks_and_collects_garbage() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import distrib_optimizer

    source = inspect.getsource(filesystem_async)
    assert 'mp.get_context("spawn")' in source and "ctx.Manager().Queue()" in source
    assert 'mp.get_context("fork")' in source and "ctx.Process(" in source
    assert "gc.collect()" in inspect.getsource(distrib_optimizer.DistributedOptimizer.sharded_state_dict)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_are_those_that_megatron_gathers(dtype: str) -> None:
    """Not copied, and upstream still copies: the numbers of each parameter are the same."""
    from r1mega.compat import megatron_writer
    from r1mega.train.trainee import Trainee

    megatron_writer.apply()
    made = Trainee(MODEL, OPTIM, one_rank(), dtype)
    made.allocate_moments()
    for part in made.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["exp_avg"].normal_()
        ours, theirs = part.get_parameter_state_dp_zero(), type(part).get_parameter_state_dp_zero.gathers(part)
        for number, buffer in enumerate(part.buffers):
            (kind,) = theirs[number]
            for start, stop, _ in buffer.param_index_map.values():
                for key in megatron_writer.STATES:
                    left, right = ours[number][kind][key][start:stop], theirs[number][kind][key][start:stop]
                    assert torch.equal(left, right) and left.dtype == right.dtype, (number, start, key)
        assert any(value["exp_avg"].data_ptr() == flat.data_ptr() for value in part.optimizer.state.values()
                   for flat in ours[0][next(iter(ours[0]))]["exp_avg"].values())  # fmt: skip


def test_plain_megatron_writes_the_same_tensors(trainee, tmp_path: Path) -> None:
    """Megatron's own entry point, its writer included, from the same state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from r1mega.train import checkpoint, saving
    from r1mega.train.checkpoint import TrainState

    ours = checkpoint.save(trainee, TrainState(step=1), tmp_path, keep_last=1, tokenizer=None, parent=None, command="pretrain")
    theirs = tmp_path / "megatron"
    theirs.mkdir()

    class Here(TorchDistSaveShardedStrategy):
        """Writes in this process; the rest is Megatron's."""

        def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned):
            done, count = queue.Queue(), queue.Queue()
            for number, bucket in enumerate(writer.write_buckets):
                count.put(number)
                writer.write_preloaded_data([writer.transforms], number, bucket, done, count, True)
            writer.results_queue = queue.Queue()
            writer.results_queue.put(dict(done.get_nowait() for _ in writer.write_buckets))
            results = writer.retrieve_write_results()
            writer.finish(planned[1], [results])
            return SimpleNamespace(execute_sync=lambda: None)

    dist_checkpointing.save(
        saving.sharded(trainee, loading=False), str(theirs), Here("torch_dist", 1, thread_count=1), content_metadata=saving.CONTENT
    )
    left, right = (
        stored(ours),
        {
            name: value
            for name, value in dist_checkpointing.load_plain_tensors(str(theirs)).items()
            if isinstance(value, torch.Tensor)
        },
    )
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert {path.name for path in theirs.iterdir()} == {path.name for path in (ours / "weights").iterdir()}
    assert (theirs / "__0_0.distcp").read_bytes() == (ours / "weights/__0_0.distcp").read_bytes()
    assert (theirs / "metadata.json").read_text() == (ours / "weights/metadata.json").read_text()
