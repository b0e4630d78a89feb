"""Where ranks meet: each way in which they do not is one line, and ranks whose configs differ do not start."""

from __future__ import annotations

import dataclasses
import re
import socket
import time
from pathlib import Path

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.config.run import LaunchConfig
from r1mega.mesh import rendezvous
from r1mega.mesh.rendezvous import Meeting, Peer, await_listener, check_port, choose_interface, difference, shared_keys
from tests.launch.group import Group

JOIN = "join()\ndist.all_reduce(torch.ones(1))"
AGREE = (
    "from r1mega.config.compose import compose\n"
    "rule = {0: '64', 1: os.environ['STEPS']}[rank]\n"
    "config = compose('pretrain', ['data.train={text: 1}', f'trainer.steps={rule}', 'optim.warmup_steps=0', 'data.sequence_length=64', f'device.threads={rank + 1}'])\n"
    "rendezvous.agree_on_config(config)\n" + JOIN
)


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^MASTER_PORT: a free port of this host; got {port}, which is in use; use another, as \d+$"
        ) as caught:
            check_port(port, "MASTER_PORT")
        suggested = int(str(caught.value).rpartition(" ")[2])
    assert suggested != port
    check_port(suggested, "MASTER_PORT")
    check_port(port, "MASTER_PORT")  # free again


def test_a_name_that_nobody_knows() -> None:
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"^MASTER_ADDR: a host that this one can find; got 'no-such-host.invalid': .+; check the name, or give its address$",
    ):
        await_listener("no-such-host.invalid", 29500, began + 60, 60, "MASTER_ADDR")
    assert time.monotonic() - began < 30  # not after the whole timeout


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port, began = taken.getsockname()[1], time.monotonic()
        with pytest.raises(
            UserError,
            match="within launch.rendezvous_timeout_seconds=1; got nobody listens: .*; check address and port, start that host first",
        ):
            await_listener("127.0.0.1", port, began + 1, 1, "MASTER_ADDR")
        assert 0.9 < time.monotonic() - began < 10


def test_an_interface_that_is_not_here(monkeypatch) -> None:
    for variable in rendezvous.INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"^launch.interface: an interface of this host; got 'eth99' on .+; use one of .*lo"):
        choose_interface("127.0.0.1", 1, "eth99")
    choose_interface("127.0.0.1", 1, None)
    assert (
        rendezvous.os.environ[rendezvous.INTERFACE_VARIABLES[0]] == "lo"
        and rendezvous.INTERFACE_VARIABLES[1] not in rendezvous.os.environ
    )
    monkeypatch.setenv(rendezvous.INTERFACE_VARIABLES[0], "mine")
    choose_interface("127.0.0.1", 1, None)
    assert rendezvous.os.environ[rendezvous.INTERFACE_VARIABLES[0]] == "mine"


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("1", r"RANK: each rank once; got rank 1 on host {host} and on host {host}; check RANK on each host, or launch.host_rank"),
        (
            None,
            "launch.rendezvous_timeout_seconds: all 3 ranks meet within 6 seconds; got 2, without rank 2; start the other hosts, .*",
        ),
    ],
)
@pytest.mark.slow
def test_a_rank_that_comes_twice_and_one_that_does_not_come(tmp_path: Path, last: str | None, expected: str) -> None:
    """All ranks that are there say the same."""
    group = Group(tmp_path, JOIN, 3, meet=6, env=[{}, {}, {"RANK": last or "2"}])
    if last is None:
        group.ranks[2].kill()
    ended = group.end(*range(3 if last else 2))
    for one in ended.values():
        assert one.status == 2 and re.fullmatch(expected.replace("{host}", re.escape(socket.gethostname())), one.told), ended


@pytest.mark.parametrize(("steps", "status"), [("65", 2), ("64", 0)])
def test_ranks_with_different_configs_do_not_start(tmp_path: Path, steps: str, status: int) -> None:
    """One differing key is named with both values; device.threads, which each host may have for itself, is no difference."""
    ended = Group(tmp_path, AGREE, 2, env=[{"STEPS": steps}] * 2).end()
    host = socket.gethostname()
    line = f"trainer.steps: the same on all ranks; got 64 on rank 0 (host {host}) and 65 on rank 1 (host {host}); start the same command on each host"
    assert [(one.status, one.told) for one in ended.values()] == [(status, line if status else "")] * 2


def test_the_first_difference_is_named() -> None:
    here = Meeting(1, 2, None, (Peer("a", 1, ""), Peer("b", 1, "")))
    config = compose("pretrain", ["data.train={text: 1}", "trainer.steps=9", "optim.warmup_steps=0", "data.sequence_length=64"])
    keys = shared_keys(config)
    assert keys["trainer.steps"] == "9" and keys["data.train.text"] == "1.0" and "device.threads" not in keys
    assert [key for key in keys if key.startswith("launch.")] == [
        "launch.rendezvous_timeout_seconds",
        "launch.timeout_seconds",
        "launch.stall_timeout_seconds",
    ]
    assert difference(keys, keys, here) == ""
    other = shared_keys(dataclasses.replace(config, seed=7, launch=LaunchConfig(processes=4, timeout_seconds=5)))
    assert difference(keys, other, here).startswith(
        "seed: the same on all ranks; got 1 on rank 0 (host a) and 7 on rank 1 (host b);"
    )
    assert difference({**keys, "more": "1"}, keys, here).startswith(
        "more: the same on all ranks; got 1 on rank 0 (host a) and no such key on rank 1"
    )
    assert difference(keys, {**keys, "more": "1"}, here).startswith("more: the same on all ranks; got no such key on rank 0")
