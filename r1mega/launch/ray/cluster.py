"""The Ray cluster of a run: joined, measured against what the roles ask for, its GPUs and cores set aside. Imports Ray late.

In: the config of ``r1mega rl``. Out: :class:`Cluster`, or UserError in one line: no Ray, nobody at the address, other versions, too
few GPUs or cores.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.launch_rules import address_of
from r1mega.config.rl import RlConfig
from r1mega.config.runtime_rules import Need, needs

QUIET = {"include_dashboard": False}
PAUSE_SECONDS = 0.5
TELL_SECONDS = 10.0
UNITS = {"GPU": "GPUs", "CPU": "CPU cores"}


@contextlib.contextmanager
def joined(config: RlConfig, variables: Mapping[str, str]) -> Iterator[Cluster]:
    """The cluster with this process as its driver, and what the roles ask for set aside; given back at the end.

    ``variables``: of the actors. Raises UserError, see above.
    """
    ray = package()
    wanted = needs(config)
    _connect(ray, config, wanted, variables)
    try:
        cluster = Cluster(ray, config, wanted)
        try:
            yield cluster
        finally:
            cluster.give_back()
    finally:
        ray.shutdown()


def package() -> Any:
    """Ray. Raises UserError that names the extra."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
        import ray.util.placement_group
    except ImportError as error:
        raise UserError(
            f"runtime.kind: Ray is installed for ray; got {error}; pip install 'r1mega[ray]' on every node, or use runtime=local"
        ) from error
    return ray


def _connect(ray: Any, config: RlConfig, wanted: Sequence[Need], variables: Mapping[str, str]) -> None:
    address, seconds = config.runtime.address, config.runtime.connect_seconds
    common = {
        "log_to_driver": False,
        "configure_logging": False,
        "namespace": f"r1mega-{os.getpid()}",
        "runtime_env": {"env_vars": dict(variables)},
    }
    if address == "local":
        # of this machine's cores a rank takes what it likes; what Ray counts are only places
        cpus = max(os.cpu_count() or 1, sum(need.cpus for need in wanted))
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else a process a core, of which few are used
        with _aside():
            ray.init(address="local", num_cpus=cpus, **QUIET, **common)
        return
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if address_of(named):
        _await_head(named, seconds)
    try:
        with _in_time(seconds, f"runtime.address {named or address}"), _aside():
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise UserError(_refused(address, str(error))) from error


def _await_head(address: str, seconds: float) -> None:
    """Until somebody listens there: Ray itself may end the process over a silent one. Raises UserError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(address_of(address), timeout=max(0.2, min(5.0, deadline - time.monotonic()))):
                return
        except OSError as error:
            said = error.strerror or str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise UserError(
                f"runtime.address: the head of a Ray cluster answers at {address} within runtime.connect_seconds={seconds:g}; got "
                f"{said}; check it with ray status --address={address}, or start one with ray start --head"
            )
        time.sleep(PAUSE_SECONDS)


@contextlib.contextmanager
def _in_time(seconds: float, what: str) -> Iterator[None]:
    """End this process with one line where Ray's own wait for a cluster has no end."""

    def give_up() -> None:
        print(
            f"{what}: a Ray cluster that takes this process within runtime.connect_seconds={seconds:g}; got no answer of Ray's; "
            "check it with ray status, or use a longer time",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds + 30, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _refused(address: str, said: str) -> str:
    """The line for what Ray raises where it does not take this process."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if "ersion mismatch" in said:
        found = [line for line in lines if line.startswith(("Ray:", "Python:"))]
        pairs = f"{found[0]}, {found[1]} there and {found[2]}, {found[3]} here" if len(found) == 4 else " ".join(lines)
        return (
            f"runtime.address: Ray and Python of the cluster's versions; got {pairs}; "
            "install the cluster's versions here, or there these"
        )
    if "Could not find any running Ray instance" in said:
        return (
            f"runtime.address: a Ray cluster that this machine has joined, for {address}; got none; use ray start --head here, "
            "ray start --address=HEAD:6379 to join one, or runtime.address=local"
        )
    token = "" if os.environ.get("RAY_AUTH_MODE") else "; where the cluster has a token, export RAY_AUTH_MODE=token"
    return (
        f"runtime.address: a Ray cluster with this machine as a node; got {' '.join(lines)[:300]}; "
        f"join it here with ray start --address={address if address != 'auto' else 'HEAD:6379'}{token}"
    )


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """What Ray prints while it starts goes to stderr: stdout is the command's."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class Cluster:
    """What the run has of it. ``ranks`` and ``servers``: placement groups, a bundle a host and a bundle a server."""

    def __init__(self, ray: Any, config: RlConfig, wanted: Sequence[Need]):
        self.ray, self.config = ray, config
        self.hosts = [need for need in wanted if need.role == "ranks"]
        self.singles = [need for need in wanted if need.role == "server"]
        check_resources([node["Resources"] for node in ray.nodes() if node["Alive"]], wanted)
        self.ranks = self.servers = None
        try:
            self.ranks = self._set_aside(self.hosts, "STRICT_SPREAD" if len(self.hosts) > 1 else "PACK")
            if self.singles:
                self.servers = self._set_aside(self.singles, "SPREAD" if config.runtime.placement == "spread" else "PACK")
            self._await()
        except BaseException:
            self.give_back()
            raise

    def _set_aside(self, needed: Sequence[Need], strategy: str) -> Any:
        bundles = [{"CPU": need.cpus, **({"GPU": need.gpus} if need.gpus else {})} for need in needed]
        return self.ray.util.placement_group(bundles, strategy=strategy)

    def _await(self) -> None:
        """Until all of it is ours. Raises UserError at ``runtime.wait_seconds``: others hold it."""
        began = told = time.monotonic()
        seconds = self.config.runtime.wait_seconds
        for group in filter(None, (self.ranks, self.servers)):
            while not group.wait(1):
                now, free = time.monotonic(), amounts(self.ray.available_resources())
                if now - began > seconds:
                    raise UserError(
                        f"runtime.wait_seconds: {said(self.hosts + self.singles)} are free within {seconds:g} s; got {free} free; "
                        "wait for other jobs (ray status shows them), use fewer, or a longer time"
                    )
                if now - told > TELL_SECONDS:
                    told = now
                    print(f"runtime=ray: waiting for the cluster, {now - began:.0f} s; {free} free", file=sys.stderr, flush=True)

    def actor(self, cls: type, group: Any, bundle: int, cpus: float, gpus: float) -> Any:
        """A handle of a new actor in that bundle; it may wait for a node in a lost one's place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        return self.ray.remote(cls).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy, max_restarts=0).remote()

    def ask(self, calls: Sequence[Any], seconds: float, each: Callable[[Exception], Any] | None = None) -> list[Any]:
        """Answers of calls to actors, in order. ``each``: what stands for the answer of one that is gone, or does not come in time;
        None: raise."""
        from ray.exceptions import GetTimeoutError, RayError

        deadline, found = time.monotonic() + seconds, []
        for call in calls:
            try:
                found.append(self.ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
            except (RayError, GetTimeoutError) as error:
                if each is None:
                    raise
                found.append(each(error))
        return found

    def give_back(self) -> None:
        """Let others have it."""
        for group in filter(None, (self.ranks, self.servers)):
            with contextlib.suppress(Exception):  # the cluster is gone: so is the group
                self.ray.util.remove_placement_group(group)


def check_resources(nodes: Sequence[Mapping[str, float]], wanted: Sequence[Need]) -> None:
    """Raise UserError, one line, where no empty cluster of these nodes could hold ``wanted``. ``nodes``: resources of each."""
    hosts = [need for need in wanted if need.role == "ranks"]
    for resource, key in (("GPU", "gpus"), ("CPU", "cpus")):
        needed, there = sum(getattr(need, key) for need in wanted), int(sum(node.get(resource, 0) for node in nodes))
        if needed > there:
            _raise(f"needs {needed} {UNITS[resource]} ({said(wanted)}); got {there} in a cluster of {_nodes(len(nodes))}")
    fits = [sum(_holds(node, need) for node in nodes) for need in wanted]
    if hosts and fits[0] < len(hosts):
        _raise(f"needs {len(hosts)} nodes with {_of(hosts[0])} each; got {fits[0]} of {_nodes(len(nodes))}")
    for need, count in zip(wanted, fits, strict=True):
        if not count:
            _raise(f"needs a node with {_of(need)} for a {need.role}; got none of {_nodes(len(nodes))}")


def _raise(what: str) -> None:
    raise UserError(
        f"runtime=ray: {what}; add nodes with ray start --address=HEAD:6379, or use fewer in launch.hosts, launch.processes or "
        "engine.servers"
    )


def _holds(node: Mapping[str, float], need: Need) -> bool:
    return node.get("GPU", 0) >= need.gpus and node.get("CPU", 0) >= need.cpus


def _of(need: Need) -> str:
    return (f"{need.gpus} GPUs and " if need.gpus else "") + f"{need.cpus} CPU cores"


def _nodes(count: int) -> str:
    return f"{count} node" + ("s" if count != 1 else "")


def said(wanted: Sequence[Need]) -> str:
    """The roles and what each asks for."""
    hosts = [need for need in wanted if need.role == "ranks"]
    servers = [need for need in wanted if need.role == "server"]
    parts = [f"{len(hosts)} x {hosts[0].count} ranks with {_of(hosts[0])}"] if hosts else []
    parts += [f"{len(servers)} x server with {_of(servers[0])}"] if servers else []
    return ", ".join(parts)


def amounts(resources: Mapping[str, float]) -> str:
    """GPUs and cores of Ray's resources."""
    return ", ".join(f"{resources.get(name, 0):g} {unit}" for name, unit in UNITS.items())


def package_path() -> str:
    """What the nodes' Python must find: this package where it lies here, then what is in PYTHONPATH here."""
    root = str(Path(__file__).resolve().parents[3])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
