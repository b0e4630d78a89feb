"""The driver of ``runtime=ray``: sets the cluster's part aside, starts ranks and servers as actors, and watches them to the end.

In: what a rank runs and the config. Out: ranks that have ended, or LaunchError with the first one that failed; rank 0's result in
the file that the environment names. Ranks that fail start again together from the last checkpoint, ``launch.restarts`` times;
servers by themselves. SIGTERM goes on to the ranks, which save; Ctrl-C and a second SIGTERM end everything. If this process is
killed, Ray ends its actors, and they what they hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega import __version__
from r1mega.config.errors import STOPPED, UserError
from r1mega.config.launch_rules import VISIBLE_VARIABLE, num_processes
from r1mega.config.rl import RlConfig
from r1mega.config.runtime_rules import PASSED_ON, needs
from r1mega.launch.local import RESULT_VARIABLE, LaunchError
from r1mega.launch.ray.actors import RankActor
from r1mega.launch.ray.cluster import Cluster, joined, package_path, said
from r1mega.launch.ray.logs import Log
from r1mega.launch.ray.servers import Servers

POLL_SECONDS = 0.2
ANSWER_SECONDS = 60.0
GRACE_SECONDS = 2.0
"""After the first failure: the rank that knows the cause can say it."""

END_SECONDS = 5.0
"""From SIGTERM to SIGKILL."""

LOST = 128 + signal.SIGKILL
"""Status of a rank whose actor or node is gone."""


def start(rank: Sequence[str], config: RlConfig, env: Mapping[str, str], final: Sequence[int]) -> bool:
    """Start the roles and wait for the ranks; True when they have run. See :func:`r1mega.launch.start.start`.

    ``final``: statuses after which the ranks do not start again.
    """
    if config.launch.dry_run:
        print(f"{said(needs(config))}: {shlex.join([sys.executable, *rank])}")
        return False
    variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)} | dict(config.runtime.environment)
    if name := getattr(config.engine, "api_key_variable", ""):
        variables[name] = os.environ.get(name, "")
    variables["PYTHONPATH"] = package_path()
    with joined(config, variables) as cluster, _sigterm() as came:
        run = Run(cluster, rank, config, env, came)
        try:
            run.to_the_end(final)
        finally:
            run.end()
    return True


class Run:
    """The roles. ``came``: signals for the ranks."""

    def __init__(self, cluster: Cluster, rank: Sequence[str], config: RlConfig, env: Mapping[str, str], came: list[int]):
        self.cluster, self.command, self.config, self.env, self.came = cluster, list(rank), config, dict(env), came
        self.count, self.result = num_processes(config.launch), self.env.pop(RESULT_VARIABLE, None)
        folder = Path(config.out) / "logs"
        self.logs = [Log(folder, f"rank-{rank}", is_shown=rank == 0) for rank in range(self.count)]
        self.actors: list[Any] = [None] * self.count
        self.places: list[dict[str, Any]] = []
        self.servers = Servers(cluster, config, folder, self._gpus_of_host, config.runtime.environment)
        self.cwd = str(Path.cwd())

    def to_the_end(self, final: Sequence[int]) -> None:
        """Run the ranks until they have ended, at most ``launch.restarts`` times anew. Raises LaunchError."""
        restarts = self.config.launch.restarts
        for attempt in range(restarts + 1):
            try:
                return self._attempt()
            except LaunchError as error:
                if error.status != STOPPED:
                    self._tell(error)
                if error.status in final or attempt == restarts or self.came:
                    raise
                print(
                    f"launch: all ranks start again from the last checkpoint, restart {attempt + 1} of {restarts}",
                    file=sys.stderr,
                    flush=True,
                )

    def _tell(self, error: LaunchError) -> None:
        """The line of the rank that failed first, whose log has the rest."""
        host = self.places[error.rank]["host"] if self.places else "?"
        what = self.logs[error.rank].complaint() or "it said nothing"
        print(
            f"runtime=ray: rank {error.rank} on {host} has ended with status {error.status}: {what}; "
            f"see {self.logs[error.rank].path}",
            file=sys.stderr,
            flush=True,
        )

    def _attempt(self) -> None:
        self._raise_actors()
        if self.came:
            raise SystemExit(128 + signal.SIGTERM)
        port = self._ask([self.actors[0].free_port.remote()])[0]
        calls, has_servers = [], bool(self.servers.held)
        for rank, (actor, place) in enumerate(zip(self.actors, self.places, strict=True)):
            self.logs[rank].begin(f"rank {rank} on {place['host']} ({place['address']})")
            calls.append(actor.start.remote(self.command, self._variables(rank, port), self.cwd, has_servers))
        self._ask(calls)
        failed = self._watch()
        if self.came and failed and failed[0][1] == 128 + signal.SIGTERM:  # ranks that had nothing to save
            raise SystemExit(failed[0][1])
        if failed:
            self._end_ranks()
            raise LaunchError(failed[0][0], self.count, failed[0][1])
        if self.result:
            made = self._ask([self.actors[0].take_result.remote()])[0]
            if made is not None:
                Path(self.result).write_bytes(made)

    def _raise_actors(self) -> None:
        """Those that are missing, where a lost node's part lies now. Raises UserError where no node takes it."""
        runtime, each = self.config.runtime, 0 if self.config.device.kind == "cpu" else 1
        per_host = self.config.launch.processes
        for rank in range(self.count):
            if self.actors[rank] is None:
                self.actors[rank] = self.cluster.actor(RankActor, self.cluster.ranks, rank // per_host, runtime.rank_cpus, each)
        places = self.cluster.ask([actor.place.remote() for actor in self.actors], runtime.wait_seconds, each=lambda error: error)
        for rank, found in enumerate(places):
            if isinstance(found, Exception):
                self.cluster.ray.kill(self.actors[rank])
                self.actors[rank] = None
                lines = [line.strip() for line in str(found).splitlines() if line.strip()] or [type(found).__name__]
                raise UserError(
                    f"runtime=ray: a node for rank {rank}, with this package at {package_path().split(os.pathsep)[0]}; "
                    f"got {lines[-1][:300]}; see ray status, and that all nodes have the package and these files"
                )
            if found["version"] != __version__:
                raise UserError(
                    f"runtime=ray: r1mega {__version__} on every node; got {found['version']} on {found['host']}; "
                    "install this one there"
                )
        self.places = places

    def _variables(self, rank: int, port: int) -> dict[str, str]:
        """What torch.distributed reads, the host's GPUs in the order of its ranks, and a share of its cores."""
        place, per_host = self.places[rank], self.config.launch.processes
        made = {**self.env, **self.config.runtime.environment}
        here = self.cluster.ray.get_runtime_context().get_node_id()
        if any(place["node"] != here for place in self.places):
            for name in self.env:
                if name != "PYTHONPATH":
                    made.pop(name, None)  # local copies, which other nodes do not have: their ranks make their own
        made |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_host),
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(per_host),
            "MASTER_ADDR": self.places[0]["address"],
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, place["cores"] // per_host))),
        }
        if gpus := self._gpus_of_host(rank // per_host):
            made[VISIBLE_VARIABLE] = ",".join(gpus)
        return made

    def _gpus_of_host(self, host: int) -> list[str]:
        per_host = self.config.launch.processes
        return [gpu for place in self.places[host * per_host : (host + 1) * per_host] for gpu in place["gpus"]]

    def _watch(self) -> list[tuple[int, int]]:
        """(rank, status) of the ranks that failed, the first to fail first; empty when all ended with 0."""
        ended: dict[int, int] = {}
        failed: list[tuple[int, int]] = []
        asked: dict[int, Any] = {}
        told, sent, deadline = [""] * self.count, 0, None
        seen: list[int] = []
        while len(ended) < self.count and (deadline is None or time.monotonic() < deadline):
            for number in self.came[sent:]:
                self._send([actor.send.remote(number) for rank, actor in enumerate(self.actors) if rank not in ended])
            sent = len(self.came)
            for rank, actor in enumerate(self.actors):
                if rank not in ended and rank not in asked:
                    asked[rank] = actor.poll.remote()
            began, calls = time.monotonic(), [*asked.values(), *self.servers.calls()]
            ready, _ = self.cluster.ray.wait(calls, num_returns=len(calls), timeout=POLL_SECONDS)
            for rank, call in list(asked.items()):
                if call not in ready:
                    continue
                del asked[rank]
                answer = self.cluster.ask([call], 5, each=lambda error: None)[0]
                if answer is None:
                    self.actors[rank] = self.cluster.ray.kill(self.actors[rank])
                    status = LOST
                else:
                    self.logs[rank].add(answer["out"], answer["err"])
                    status = answer["status"]
                    if rank == 0:
                        self.servers.want(answer["wanted"])
                        seen = answer["seen"] or []
                if status is None:
                    continue
                ended[rank] = status
                if status:
                    failed.append((rank, status))
                    if deadline is None and status != STOPPED:  # ranks that stop may take their time
                        deadline = time.monotonic() + GRACE_SECONDS
            self.servers.step(ready)
            self._tell_servers(told, seen, ended)
            time.sleep(max(0.0, POLL_SECONDS - (time.monotonic() - began)))
        return failed

    def _tell_servers(self, told: list[str], seen: list[int], ended: Mapping[int, int]) -> None:
        """The table to each rank that has not got it: to rank 0 as it is; to the others a start only once rank 0 has seen it."""
        if not self.servers.held:
            return
        table = self.servers.table
        entries = [
            entry | {"alive": entry["alive"] and entry["start"] == (seen[index] if index < len(seen) else 0)}
            for index, entry in enumerate(table["servers"])
        ]
        calls = []
        for rank, actor in enumerate(self.actors):
            mine = table if rank == 0 else {**table, "servers": entries}
            if rank not in ended and json.dumps(mine) != told[rank]:
                told[rank] = json.dumps(mine)
                calls.append(actor.tell.remote(mine))
        self._send(calls)

    def _send(self, calls: Sequence[Any]) -> None:
        """Calls whose actor may be gone: the next question shows it."""
        self.cluster.ask(calls, ANSWER_SECONDS, each=lambda error: None)

    def _ask(self, calls: Sequence[Any]) -> list[Any]:
        """Answers of ranks' actors; one that is gone is a rank that has failed."""
        found = self.cluster.ask(calls, ANSWER_SECONDS, each=lambda error: error)
        for rank, answer in enumerate(found):
            if isinstance(answer, Exception):
                self._end_ranks()
                raise LaunchError(rank, self.count, LOST)
        return found

    def _end_ranks(self) -> None:
        """End what still runs, on all nodes at once, and keep its last words; actors that do not answer are killed."""
        there = [rank for rank, actor in enumerate(self.actors) if actor is not None]
        calls = [self.actors[rank].end.remote(END_SECONDS) for rank in there]
        ends = self.cluster.ask(calls, END_SECONDS + 5, each=lambda error: error)
        last = self.cluster.ask([self.actors[rank].poll.remote() for rank in there], 5, each=lambda error: None)
        for rank, end, words in zip(there, ends, last, strict=True):
            if words is not None:
                self.logs[rank].add(words["out"], words["err"])
            if isinstance(end, Exception):
                self.actors[rank] = self.cluster.ray.kill(self.actors[rank])

    def end(self) -> None:
        """End everything; nothing of the run is left when this returns."""
        self._end_ranks()
        self.servers.end()
        for actor in filter(None, self.actors):
            self.cluster.ray.kill(actor)
        for log in [*self.logs, *(one.log for one in self.servers.held)]:
            log.close()


@contextlib.contextmanager
def _sigterm() -> Iterator[list[int]]:
    """SIGTERM is noted for the ranks; a second one unwinds everything. Outside the main thread signals stay as they are."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, note)  # after Ray, which puts one of its own there
    except ValueError:
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
