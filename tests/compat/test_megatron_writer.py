"""The bends of the checkpoint writer: each works, and each is still needed."""

from __future__ import annotations

import inspect
import multiprocessing
import queue
from pathlib import Path

import pytest

from tests.train.cases import MODEL, OPTIM, one_rank


@pytest.fixture(scope="module")
def writer():
    one_rank()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from r1mega.compat import megatron_writer

    megatron_writer.apply()
    return filesystem_async


def test_a_checkpoint_is_written_without_another_process(writer, tmp_path: Path, monkeypatch) -> None:
    from r1mega.train import checkpoint
    from r1mega.train.checkpoint import TrainState
    from r1mega.train.trainee import Trainee

    def refuse(self) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    trainee = Trainee(MODEL, OPTIM, one_rank(), "fp32")
    trainee.allocate_moments()
    path = checkpoint.save(trainee, TrainState(step=1), tmp_path, keep_last=1, tokenizer=None, parent=None, command="pretrain")
    assert isinstance(writer._results_queue, queue.Queue) and writer._results_queue.empty()
    checkpoint.verify(path)


def test_upstream_still_starts_a_manager_and_forks(writer) -> None:
    source = inspect.getsource(writer)
    assert 'mp.get_context("spawn")' in source and "ctx.Manager().Queue()" in source
    assert 'mp.get_context("fork")' in source and "ctx.Process(" in source
