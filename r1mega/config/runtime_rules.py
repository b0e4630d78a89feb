"""What ``runtime=ray`` asks of a cluster, and the rules between it and the sections beside it. Imports neither torch nor Ray.

In: the config of ``r1mega rl``. Out: :class:`Need`, one for each part that must lie on one node, and Violations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from r1mega.config.errors import Violation
from r1mega.config.launch_rules import address_of
from r1mega.config.rl import RlConfig

PASSED_ON = ("R1MEGA_", "NCCL_", "GLOO_", "TORCH_", "HF_", "WANDB_", "SGLANG_", "OMP_")
"""Starts of names of this process's variables that the roles get too; others by ``runtime.environment``."""


@dataclass(frozen=True)
class Need:
    """GPUs and cores of one node. ``role``: "ranks" of one host, or one "server"; ``count``: of ranks, or 1."""

    role: str
    count: int
    gpus: int
    cpus: int


def num_servers(config: RlConfig) -> int:
    """Servers that the runtime starts: none for an engine in the ranks, or for servers that run already."""
    engine = config.engine
    return 0 if getattr(engine, "url", None) else getattr(engine, "servers", 0)


def server_gpus(config: RlConfig) -> int:
    """GPUs of one server; 0 on the CPU."""
    if config.device.kind == "cpu":
        return 0
    return math.prod(_whole(config.engine.args.get(name, 1)) for name in ("tp_size", "pp_size"))


def needs(config: RlConfig) -> list[Need]:
    """All that the roles ask for, a node's part each: hosts of ranks first, then servers that are not on the trainer's GPUs."""
    launch, runtime, count = config.launch, config.runtime, num_servers(config)
    is_shared = runtime.placement == "colocated"
    gpus = 0 if config.device.kind == "cpu" else launch.processes
    beside = math.ceil(count / launch.hosts) * runtime.server_cpus if is_shared else 0
    made = [Need("ranks", launch.processes, gpus, runtime.rank_cpus * launch.processes + beside)] * launch.hosts
    return made if is_shared else made + [Need("server", 1, server_gpus(config), runtime.server_cpus)] * count


def place_of_server(config: RlConfig, index: int) -> tuple[int, int]:
    """With servers on the trainer's GPUs: the host of server ``index`` and its first GPU among the host's."""
    round_idx, host = divmod(index, config.launch.hosts)
    return host, round_idx * server_gpus(config)


def runtime_violations(config: RlConfig) -> Iterator[Violation]:
    """Broken rules of ``runtime``; none where this process is a rank already."""
    runtime, launch = config.runtime, config.launch
    if runtime.kind == "local" or "RANK" in os.environ:
        return
    if runtime.address not in ("auto", "local") and not address_of(runtime.address):
        hint = "give runtime.address=auto, local, or head:6379"
        yield Violation("runtime.address", "auto, local or HOST:PORT of the cluster's head", repr(runtime.address), hint=hint)
    if launch.kind != "local":
        rule = "local with runtime=ray, which starts the ranks itself"
        yield Violation("launch.kind", rule, launch.kind, (("launch.kind", ("local",)), ("runtime.kind", ("local",))))
    for key in ("rendezvous", "host_rank"):
        if getattr(launch, key) is not None:
            rule = "null with runtime=ray, which finds it itself"
            yield Violation(f"launch.{key}", rule, getattr(launch, key), ((f"launch.{key}", ("null",)),))
    if runtime.address == "local" and launch.hosts > 1:
        hint = "or ray start on each machine and runtime.address=auto"
        yield Violation(
            "launch.hosts", "1 with runtime.address=local, which is this machine", launch.hosts, (("launch.hosts", (1,)),), hint
        )
    if not num_servers(config):
        return
    yield from _servers(config)


def _servers(config: RlConfig) -> Iterator[Violation]:
    engine, launch, runtime = config.engine, config.launch, config.runtime
    for name in ("first_gpu", "args.base_gpu_id"):
        value = engine.args.get("base_gpu_id") if name.startswith("args") else engine.first_gpu
        if value:
            rule = "0 with runtime=ray, which gives each server its GPUs"
            yield Violation(f"engine.{name}", rule, value, ((f"engine.{name}", (0,)),), "or runtime=local")
    if engine.router:
        rule = "null with runtime=ray, whose servers have addresses of their own in each run"
        yield Violation("engine.router", rule, engine.router, (("engine.router", ("null",)),), "or give engine.url too")
    each, places = server_gpus(config), launch.hosts * launch.processes
    if runtime.placement != "colocated" or not each:
        return
    if each > launch.processes:
        rule = f"with runtime.placement=colocated at most launch.processes {launch.processes} GPUs of one node for a server"
        fixes = (("runtime.placement", ("spread",)), ("launch.processes", (each,)))
        yield Violation("engine.args.tp_size", rule, each, fixes)
    elif engine.servers > launch.hosts * (launch.processes // each):
        rule = f"with runtime.placement=colocated at most what the {places} trainer GPUs hold, {each} GPUs a server"
        fixes = (("engine.servers", (launch.hosts * (launch.processes // each),)), ("runtime.placement", ("spread",)))
        yield Violation("engine.servers", rule, engine.servers, fixes)
    if not engine.memory_saver:
        rule = "true with runtime.placement=colocated: trainer and servers take turns with the GPUs' memory"
        fixes = (("engine.memory_saver", (True,)), ("runtime.placement", ("spread",)))
        yield Violation("engine.memory_saver", rule, "false", fixes)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1
