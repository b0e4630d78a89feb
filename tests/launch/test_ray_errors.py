"""runtime=ray: what is refused before anything starts, each in one line; what a cluster must have. Needs no Ray but where it says so."""

from __future__ import annotations

import functools
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.config.runtime_rules import Need, needs, place_of_server
from r1mega.launch import start
from r1mega.launch.ray import cluster
from tests.launch.ray_cases import ROOT, needs_ray


def config(*overrides: str):
    usual = ["init=x", "data.problems=x", "rl.rollouts=2", "runtime=ray", "rl.prompts_per_rollout=32", "optim.warmup_steps=0"]
    return compose("rl", [*usual, *overrides])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("runtime.address=head", "runtime.address: auto, local or HOST:PORT of the cluster's head; got 'head'; give runtime.address=auto, local, or head:6379"),
        ("launch=slurm", "launch.kind: local with runtime=ray, which starts the ranks itself; got slurm; use launch.kind=local, or runtime.kind=local"),
        ("launch.rendezvous='a:1'", "launch.rendezvous: null with runtime=ray, which finds it itself; got a:1; use launch.rendezvous=null"),
        ("launch.hosts=2 runtime.address=local", "launch.hosts: 1 with runtime.address=local, which is this machine; got 2; use launch.hosts=1, or ray start on each machine and runtime.address=auto"),
        ("engine=sglang engine.first_gpu=1", "engine.first_gpu: 0 with runtime=ray, which gives each server its GPUs; got 1; use engine.first_gpu=0, or runtime=local"),
        ("engine=sglang +engine.args.base_gpu_id=2", "engine.args.base_gpu_id: 0 with runtime=ray, which gives each server its GPUs; got 2; use engine.args.base_gpu_id=0, or runtime=local"),
        ("engine=sglang engine.router='http://a:1'", "engine.router: null with runtime=ray, whose servers have addresses of their own in each run; got http://a:1; use engine.router=null, or give engine.url too"),
        ("device=cuda launch.processes=2 runtime.placement=colocated engine=sglang engine.servers=3 engine.memory_saver=true", "engine.servers: with runtime.placement=colocated at most what the 2 trainer GPUs hold, 1 GPUs a server; got 3; use engine.servers=2, or runtime.placement=spread"),
        ("device=cuda launch.processes=2 runtime.placement=colocated engine=sglang +engine.args.tp_size=4 engine.memory_saver=true", "engine.args.tp_size: with runtime.placement=colocated at most launch.processes 2 GPUs of one node for a server; got 4; use runtime.placement=spread, or launch.processes=4"),
        ("device=cuda runtime.placement=colocated engine=sglang", "engine.memory_saver: true with runtime.placement=colocated: trainer and servers take turns with the GPUs' memory; got false; use engine.memory_saver=true, or runtime.placement=spread"),
        ("runtime.kind=k8s", "runtime.kind: one of local, ray; got k8s; use runtime.kind=local"),
    ],
)  # fmt: skip
def test_what_is_refused(monkeypatch, overrides: str, line: str) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError) as caught:
        config(*shlex.split(overrides.replace("'", "\\'")))
    assert str(caught.value) == line


def test_the_roles_needs(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert needs(config("launch.processes=2")) == [Need("ranks", 2, 0, 2)]
    served = ["device=cuda", "launch.hosts=2", "launch.processes=4", "engine=sglang", "engine.servers=3", "+engine.args.tp_size=2"]
    apart = needs(config(*served, "runtime.rank_cpus=3"))
    assert apart == [Need("ranks", 4, 4, 12)] * 2 + [Need("server", 1, 2, 1)] * 3
    shared = config(*served, "runtime.placement=colocated", "engine.memory_saver=true")
    assert needs(shared) == [Need("ranks", 4, 4, 6)] * 2, "two servers on one of the hosts"
    assert [place_of_server(shared, index) for index in range(3)] == [(0, 0), (1, 0), (0, 2)]
    assert needs(config("engine=sglang", "engine.url='http://a:1'")) == [Need("ranks", 1, 0, 1)], "servers of somebody else's"


def test_what_a_cluster_lacks_is_named() -> None:
    ranks, server = Need("ranks", 4, 4, 4), Need("server", 1, 2, 1)
    big, small = {"GPU": 4.0, "CPU": 16.0}, {"GPU": 1.0, "CPU": 4.0}
    cluster.check_resources([big, big], [ranks, server, server])
    way = "; add nodes with ray start --address=HEAD:6379, or use fewer in launch.hosts, launch.processes or engine.servers"
    for nodes, wanted, line in (
        ([big], [ranks, server, server], "needs 8 GPUs (1 x 4 ranks with 4 GPUs and 4 CPU cores, 2 x server with 2 GPUs and 1 CPU cores); got 4 in a cluster of 1 node"),
        ([big, {"GPU": 4.0}], [ranks, ranks], "needs 2 nodes with 4 GPUs and 4 CPU cores each; got 1 of 2 nodes"),
        ([small] * 4, [server], "needs a node with 2 GPUs and 1 CPU cores for a server; got none of 4 nodes"),
        ([{"CPU": 1.0}], [Need("ranks", 2, 0, 2)], "needs 2 CPU cores (1 x 2 ranks with 2 CPU cores); got 1 in a cluster of 1 node"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            cluster.check_resources(nodes, wanted)
        assert str(caught.value) == f"runtime=ray: {line}{way}"


def test_without_ray_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"runtime.kind: Ray is installed for ray; got .*; pip install 'r1mega\[ray\]' on every node"
    ):
        start.start("rl", [], config(), {})


def test_the_local_runtime_and_a_dry_run_import_no_ray(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RANK", raising=False)
    assert not start.starts(config("runtime=local")) and start.starts(config())
    given = config("launch.processes=2", "launch.dry_run=true", "engine=sglang")
    assert start.start("rl", ["rl.rollouts=2", "launch.dry_run=true"], given, {}) is False
    told = capsys.readouterr().out
    assert told == f"1 x 2 ranks with 2 CPU cores, 1 x server with 1 CPU cores: {sys.executable} -m r1mega rl rl.rollouts=2\n"
    code = "import sys, r1mega.cli, r1mega.launch.ray.driver; print(*{'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def fault(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        start.start("rl", [], config(*overrides), {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@needs_ray
def test_nobody_at_the_address(monkeypatch) -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    told = fault(f"runtime.address=127.0.0.1:{port}", "runtime.connect_seconds=1")
    assert told == (
        f"runtime.address: the head of a Ray cluster answers at 127.0.0.1:{port} within runtime.connect_seconds=1; got Connection refused; "
        f"check it with ray status --address=127.0.0.1:{port}, or start one with ray start --head"
    )


@needs_ray
def test_no_cluster_here(monkeypatch, tmp_path: Path) -> None:
    import ray._private.services as services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a cluster of this machine says that it is there
    monkeypatch.setattr(services, "_cached_find_gcs_addresses", functools.cache(set))  # else it finds another test's
    assert fault().startswith(
        "runtime.address: a Ray cluster that this machine has joined, for auto; got none; use ray start --head here"
    )
