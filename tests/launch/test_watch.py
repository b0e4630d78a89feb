"""The watch: who stalls, dies or falls silent is named with host and collective on every other rank, and honest work is left alone."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from r1mega.mesh.operations import Line
from r1mega.mesh.watch import is_alive
from tests.launch.group import Group

HOST = re.escape(socket.gethostname())
LAST = "; the same command goes on from the last checkpoint"
TWICE = "join()\nfor _ in range(2): dist.all_reduce(torch.ones(1))\nopen(f'ready-{rank}', 'w').close()\n"


def line(error: str) -> str:
    assert error.count("\n") == 0, error
    return error


@pytest.mark.slow
def test_a_rank_that_stalls_is_named_everywhere(tmp_path: Path) -> None:
    group = Group(tmp_path, TWICE + "if rank == 1: time.sleep(60)\ndist.all_reduce(torch.ones(1))", 3, stall=3)
    for rank in range(3):
        group.wait_for(tmp_path / f"ready-{rank}")
    began = time.monotonic()
    ended = group.end()
    assert time.monotonic() - began < 3 + 1  # all of them within launch.stall_timeout_seconds, and some time to be noticed here
    expected = (
        rf"launch: every rank reaches each collective; got rank 1 on host {HOST} did not reach all_reduce #3 of ranks 0, 1, 2, which "
        rf"rank [02] on host {HOST} has entered; its process runs, and has entered no operation since \d+ s; its last one was all_reduce{LAST}"
    )
    for rank in range(3):
        assert ended[rank].status == 1 and re.fullmatch(expected, line(ended[rank].told)), ended[rank].told


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    """Gloo's own error comes at once: it is explained, whatever the timeout."""
    group = Group(tmp_path, TWICE + "if rank == 1: time.sleep(60)\ndist.broadcast(torch.ones(1), 0)\ndist.barrier()", 3, stall=600)
    for rank in range(3):
        group.wait_for(tmp_path / f"ready-{rank}")
    time.sleep(0.3)
    group.send(1, signal.SIGKILL)
    ended = group.end(0, 2, seconds=15)
    for rank in (0, 2):
        assert ended[rank].status == 1, ended
        assert re.search(
            rf"got rank 1 on host {HOST} did not reach (broadcast|barrier) #[34] of ranks 0, 1, 2, which .*; its process is gone;",
            line(ended[rank].told),
        )


@pytest.mark.slow
def test_a_stopped_process_has_no_sign_of_life(tmp_path: Path) -> None:
    """As a host that hangs: nothing is closed, nobody answers."""
    group = Group(tmp_path, TWICE + "if rank == 1: time.sleep(60)\ndist.all_gather([torch.ones(1)] * 2, torch.ones(1))", 2, stall=3)
    group.wait_for(tmp_path / "ready-1")
    group.send(1, signal.SIGSTOP)
    ended = group.end(0, seconds=20)
    assert ended[0].status == 1
    assert re.search(
        rf"rank 1 on host {HOST} did not reach all_gather #3 of ranks 0, 1, .*; there is no sign of life of it since \d s",
        line(ended[0].told),
    ), ended[0].told


@pytest.mark.slow
def test_the_host_of_the_store_falls_silent(tmp_path: Path) -> None:
    group = Group(tmp_path, TWICE + "if rank == 0: time.sleep(60)\ndist.all_reduce(torch.ones(1))", 2, stall=3)
    group.wait_for(tmp_path / "ready-1")
    group.send(0, signal.SIGSTOP)
    ended = group.end(1, seconds=20)
    assert ended[1].status == 1
    assert re.search(
        rf"rank 0 on host {HOST} did not reach all_reduce #3 of ranks 0, 1, .*; the ranks' store at 127.0.0.1:\d+ gives no answer since \d s",
        line(ended[1].told),
    ), ended[1].told


@pytest.mark.slow
def test_a_message_that_is_not_received(tmp_path: Path) -> None:
    """In a chain the cause is named, not the rank that waits for it: 0 waits for 1, which waits for 2."""
    body = TWICE + (
        "if rank == 0: dist.recv(torch.ones(1), 1)\n"
        "if rank == 1: dist.recv(torch.ones(1), 2); dist.send(torch.ones(1), 0)\n"
        "time.sleep(60)"
    )  # fmt: skip
    ended = Group(tmp_path, body, 3, stall=3).end()
    for rank in range(3):
        assert re.search(
            rf"got rank 2 on host {HOST} did not reach message from rank 2 to rank 1, #1 on its way, which rank 1 on host",
            line(ended[rank].told),
        ), ended[rank].told


@pytest.mark.slow
def test_ranks_that_wait_for_each_other(tmp_path: Path) -> None:
    """Another order on each rank: both are named."""
    body = (
        "join()\npair = dist.new_group([0, 1])\n"
        "one, two = (dist.group.WORLD, pair) if rank == 0 else (pair, dist.group.WORLD)\n"
        "dist.all_reduce(torch.ones(1), group=one)\ndist.all_reduce(torch.ones(1), group=two)"
    )  # fmt: skip
    ended = Group(tmp_path, body, 2, stall=3).end()
    for rank in range(2):
        assert ended[rank].status == 1 and re.search("did not reach all_reduce #1 of ranks 0, 1", line(ended[rank].told)), ended[
            rank
        ].told


@pytest.mark.slow
def test_a_rank_that_ends_by_itself(tmp_path: Path) -> None:
    body = TWICE + "if rank == 1: raise UserError('data: the cause; got x; y')\ndist.all_reduce(torch.ones(1))"
    ended = Group(tmp_path, body, 2, stall=600).end(seconds=15)
    assert ended[1].status == 2 and ended[1].told == "data: the cause; got x; y"
    assert ended[0].status == 1 and re.search(
        "got rank 1 on host .* did not reach all_reduce #3 .*(it has ended with status 2|its process is gone)", line(ended[0].told)
    )


@pytest.mark.slow
def test_long_work_is_no_stall(tmp_path: Path) -> None:
    """Neither of one rank while the others are done, nor of all; nor an error of a rank's own, which keeps its words."""
    body = (
        TWICE + "time.sleep(1 if rank == 1 else 0.1)\ndist.all_reduce(torch.ones(1))\ntime.sleep(3)\nraise RuntimeError('my own')"
    )
    ended = Group(tmp_path, body, 2, stall=2.5).end()
    assert [(one.status, one.told) for one in ended.values()] == [(1, "RuntimeError('my own')")] * 2


def test_names_of_operations_are_forgotten_and_counted() -> None:
    entered = Line((0, 1))
    for index in range(1000):
        entered.enter("even" if index % 2 else "odd")
    assert (
        entered.count == 1000
        and entered.name_of(1000) == "even"
        and entered.name_of(999) == "odd"
        and entered.name_of(1) in ("even", "odd")
    )


def test_a_process_is_alive_or_not() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_alive(os.getpid()) and not is_alive(child)  # ended, and not yet waited for
    os.waitpid(child, 0)
    assert not is_alive(child)


def test_the_hook_goes_on_and_off() -> None:
    import torch.distributed as dist

    from r1mega.mesh import operations

    before = {name: vars(dist.ProcessGroup)[name] for name in operations.NAMES if name in vars(dist.ProcessGroup)}
    assert len(before) > 15
    for _ in range(2):
        operations.install(operations.Record(0))
    assert all(vars(dist.ProcessGroup)[name] is not before[name] for name in before)
    operations.uninstall()
    assert {name: vars(dist.ProcessGroup)[name] for name in before} == before
