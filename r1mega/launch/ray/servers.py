"""The servers of a run on Ray: an actor each, started when rank 0 says what they are to be, started again when they die.

In: answers of rank 0's actor and of the servers' own, asked by :mod:`driver` in its loop. Out: :attr:`Servers.table`, which the
ranks' rosters read. A server whose process has died starts again in its actor; one whose actor or node is gone in a new actor, on a
node that can hold it: it then has another address.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1mega.config.launch_rules import VISIBLE_VARIABLE
from r1mega.config.rl import RlConfig
from r1mega.config.runtime_rules import num_servers, place_of_server, server_gpus
from r1mega.launch.ray.actors import ServerActor
from r1mega.launch.ray.cluster import Cluster
from r1mega.launch.ray.logs import Log

END_SECONDS = 25.0


@dataclass
class Held:
    """One server. ``begun``: its actor has been told to start it; ``call``: a question under way; ``start``: times it was
    ready; ``told``: the call that started it."""

    index: int
    log: Log
    actor: Any = None
    call: Any = None
    begun: bool = False
    since: float = 0.0
    url: str = ""
    start: int = 0
    alive: bool = False
    told: Any = None


class Servers:
    """All of them. ``failure``: why one is not started again, a line for the ranks to end with."""

    def __init__(
        self, cluster: Cluster, config: RlConfig, folder: Path, gpus_of_host: Callable[[int], list[str]], env: Mapping[str, str]
    ):
        self.cluster, self.config, self.gpus_of_host, self.env = cluster, config, gpus_of_host, dict(env)
        self.held = [Held(index, Log(folder, f"server-{index}")) for index in range(num_servers(config))]
        self.wanted: dict[str, Any] | None = None
        self.failure, self.deaths = "", 0
        self.cwd = str(Path.cwd())

    @property
    def table(self) -> dict[str, Any]:
        """Of the roster's form."""
        if self.wanted is None:
            return {"servers": [], "failure": self.failure}
        entries = [{"url": one.url, "start": one.start, "alive": one.alive} for one in self.held]
        return {"servers": entries, "failure": self.failure}

    def want(self, wanted: Mapping[str, Any] | None) -> None:
        """Start them, once rank 0 has said what they are to be; those of an earlier start of the ranks go on."""
        if wanted is None or wanted == self.wanted or self.failure:
            return
        self.end()
        self.wanted = dict(wanted)
        for one in self.held:
            self._begin(one)

    def calls(self) -> list[Any]:
        """Questions under way, for the driver's wait."""
        for one in self.held:
            if one.actor is not None and one.call is None:
                one.call = one.actor.poll.remote() if one.begun else one.actor.place.remote()
        return [one.call for one in self.held if one.call is not None]

    def step(self, ready: Sequence[Any]) -> None:
        """Take the answers that are there."""
        for one in self.held:
            if one.call in ready:
                call, one.call = one.call, None
                self._take(one, self.cluster.ask([call], 5, each=lambda error: error)[0])
            elif one.actor is not None and not one.begun and time.monotonic() - one.since > self.config.runtime.wait_seconds:
                self._fail(
                    f"runtime.wait_seconds: a node for server {one.index} within {self.config.runtime.wait_seconds:g} s; got none"
                )

    def _take(self, one: Held, answer: Any) -> None:
        if isinstance(answer, Exception):
            told = self.cluster.ask([one.told], 1, each=lambda error: error)[0] if one.told is not None else None
            lines = str(told if isinstance(told, Exception) else answer).strip().splitlines()  # it may not even have begun
            self._drop(one)
            self._died(one, f"its actor is gone: {lines[-1].strip()[:200]}")
        elif not one.begun:
            self._start(one, answer)
        else:
            one.log.add(answer["log"])
            if answer["state"] == "ready" and not one.alive:
                one.url, one.alive, one.start = answer["url"], True, one.start + 1
            elif answer["state"] == "dead":
                self._died(one, answer["said"])

    def _begin(self, one: Held) -> None:
        """A new actor; it is told what to start when it has said where it is."""
        cluster, runtime = self.cluster, self.config.runtime
        one.begun, one.alive, one.since = False, False, time.monotonic()
        if one.actor is None:
            if cluster.servers is None:
                group, bundle = cluster.ranks, place_of_server(self.config, one.index)[0]
                gpus = 0
            else:
                group, bundle, gpus = cluster.servers, one.index, server_gpus(self.config)
            one.actor = cluster.actor(ServerActor, group, bundle, runtime.server_cpus, gpus)

    def _start(self, one: Held, place: Mapping[str, Any]) -> None:
        env, choice = dict(self.env), self.config.engine
        if self.cluster.servers is None and server_gpus(self.config):
            host, first = place_of_server(self.config, one.index)
            env[VISIBLE_VARIABLE] = ",".join(self.gpus_of_host(host))
            choice = replace(choice, first_gpu=first)
        one.log.begin(f"server {one.index} on {place['host']} ({place['address']})")
        one.begun = True
        one.told = one.actor.begin.remote(choice, self.wanted, one.index, env, self.cwd, str(one.log.path))

    def _died(self, one: Held, said: str) -> None:
        was_ready, one.alive = one.start > 0, False
        where = f"see {one.log.path}"
        if not was_ready:
            text = said if said.startswith("engine") else f"engine=sglang: server {one.index} starts; got {said}; {where}"
            self._fail(text)
        elif self.deaths >= self.config.engine.restarts:
            self._fail(
                f"engine.restarts: at most {self.config.engine.restarts} in a run; got one more death of server {one.index}: "
                f"{said}; {where}"
            )
        else:
            self.deaths += 1
            print(f"runtime=ray: server {one.index} has died ({said}); starting it again", file=sys.stderr, flush=True)
            self._begin(one)

    def _fail(self, text: str) -> None:
        if not self.failure:
            self.failure = text
            self.end()

    def _drop(self, one: Held) -> None:
        if one.actor is not None:
            self.cluster.ray.kill(one.actor)
        one.actor = one.call = one.told = None

    def end(self) -> None:
        """End all of them and their actors."""
        calls = [one.actor.end.remote() for one in self.held if one.actor is not None and one.begun]
        self.cluster.ask(calls, END_SECONDS, each=lambda error: None)
        for one in self.held:
            one.alive, one.begun = False, False
            self._drop(one)
