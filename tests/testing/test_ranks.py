"""Ranks of a function: their environment, their order, whose failure is told, and the deadline."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from r1mega.testing import ranks
from r1mega.testing.ranks import RankError, run_ranks


def describe(offset: int) -> tuple[int, dict[str, str]]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["RANK"]) + offset, {name: os.environ[name] for name in names}


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("the second rank's own trouble")
    time.sleep(60)


def stall() -> None:
    time.sleep(60)


def test_results_come_in_rank_order_from_torchruns_environment() -> None:
    (first, one), (second, two) = run_ranks(describe, 2, 40)
    assert (first, second) == (40, 41)
    assert (one["RANK"], two["RANK"], one["LOCAL_RANK"], two["LOCAL_RANK"]) == ("0", "1", "0", "1")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    assert one | shared == one and two | shared == two
    assert one["MASTER_PORT"] == two["MASTER_PORT"]


@pytest.mark.parametrize("state", ["cannot fork", "killed"])
def test_ranks_start_where_the_process_that_forks_them_is_no_use(monkeypatch, state: str) -> None:
    run_ranks(describe, 1, 0)
    if state == "killed":
        ranks._nest.process.kill()
        ranks._nest.process.wait()
    else:
        monkeypatch.setattr(ranks, "_nest", SimpleNamespace(is_alive=True, is_fit=False))
    ((number, environment),) = run_ranks(describe, 1, 40)
    assert number == 40 and environment["WORLD_SIZE"] == "1"


def test_the_failing_ranks_traceback_is_raised_and_the_others_are_ended() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*fail_on_one.*the second rank's own trouble") as caught:
        run_ranks(fail_on_one, 2)
    assert caught.value.rank == 1
    assert time.monotonic() - began < 30


def test_the_deadline_ends_everything_and_shows_where_it_stood() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)Timeout.*stall"):
        run_ranks(stall, 2, timeout_seconds=1.5)
    assert time.monotonic() - began < 30


def test_a_function_that_a_fresh_process_cannot_import_is_refused() -> None:
    with pytest.raises(ValueError, match="top of an importable module"):
        run_ranks(lambda: None, 1)
