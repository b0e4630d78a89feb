"""Buckets by /update_weights_from_distributed: one broadcast a bucket, in a process group of trainer and servers.

The trainer is rank 0 and keeps the store where all meet; a server's ranks follow one another. The group is made by hand beside the
trainer's own groups, of which it knows nothing. It is made at the first push and again where a push failed, the servers are others,
or one reports another version than the last push gave it, which is one that was started again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch.distributed import Backend, PrefixStore, TCPStore
from torch.distributed.distributed_c10d import _new_process_group_helper

from r1mega import device as devices
from r1mega.config.errors import UserError
from r1mega.rl.push.choices import DistributedPush
from r1mega.rl.push.contract import PushRuntime
from r1mega.rl.push.tensor import LOOPBACK
from r1mega.rl.push.wire import Bucket, Format

if TYPE_CHECKING:
    from r1mega.rl.engine.sglang.client import Server
    from r1mega.rl.push.update import Fleet

PAUSE_SECONDS = 2e-4
"""Between looks at a broadcast."""
LEAVE_SECONDS = 20.0
_numbers = itertools.count()


class ByGroup:
    """See :class:`r1mega.rl.push.update.Way`."""

    tight, needs_session = True, True

    def __init__(self, choice: DistributedPush, runtime: PushRuntime):
        self.choice, self.runtime = choice, runtime
        backend = devices.group_backend(runtime.device) if choice.backend == "auto" else choice.backend
        self.backend, self._on_host = backend, backend == devices.group_backend("cpu")
        self.fleet: Fleet | None = None
        self.servers: list[Server] = []
        self._group: Any = None
        self._store: TCPStore | None = None
        self._name = ""
        self._pushed: str | None = None
        self._restarted = False

    def device(self, servers: list[Server]) -> torch.device:
        """The trainer's, or the CPU for a backend of the host's network."""
        return torch.device("cpu" if self._on_host else self.runtime.device)

    def open(self, fleet: Fleet, form: Format, version: int) -> None:
        """The group, made where it is not there. Raises UserError for servers that this way does not reach whole."""
        self.fleet, servers = fleet, fleet.servers
        for server in servers:
            if server.features.draft and not server.features.draft_over_group:
                raise UserError(
                    f"push=distributed: reaches a draft model from SGLang 0.5.21 on; got {server.version} with one at "
                    f"{server.url}; use push=tensor or push=disk"
                )
            if server.pp_size > 1:
                raise UserError(
                    f"push=distributed: servers of one pipeline stage; got pp_size {server.pp_size} at {server.url}; use push=disk"
                )
        if self._group is not None and [id(one) for one in servers] == [id(one) for one in self.servers] and not self._restarted:
            self._pushed = str(version)
            return
        self.abandon()
        self.servers = servers
        self._make()
        self._pushed = str(version)

    def knows(self, labels: list[str]) -> None:
        """What servers report before a push: another version than the last one's is of a server that was started again."""
        self._restarted = self._pushed is not None and any(label != self._pushed for label in labels)

    def _make(self) -> None:
        ranks = [server.tp_size for server in self.servers]
        limit = timedelta(seconds=self.choice.group_seconds)
        self._name = f"r1mega-{os.getpid()}-{next(_numbers)}"
        host = self.choice.address or _address(self.servers[0])
        try:
            self._store = TCPStore(host, 0, 1 + sum(ranks), is_master=True, wait_for_workers=False, timeout=limit)
        except (RuntimeError, OSError) as error:
            raise UserError(f"push.address: an address of this machine; got {host} ({error}); give it") from error
        offsets = {id(server): 1 + sum(ranks[:at]) for at, server in enumerate(self.servers)}

        def join(server: Server) -> None:
            body = {
                "master_address": host,
                "master_port": self._store.port,
                "rank_offset": offsets[id(server)],
                "world_size": 1 + sum(ranks),
                "group_name": self._name,
                "backend": self.backend,
            }
            server.post("/init_weights_update_group", body, self.choice.group_seconds)

        joined = self.fleet.start(join)
        try:
            store = PrefixStore(self._name, self._store)
            self._group, _ = _new_process_group_helper(
                1 + sum(ranks), 0, [], Backend(self.backend), store, group_name=self._name, timeout=limit
            )
        except Exception as error:  # whatever torch raises of a rank that did not come
            self.abandon()
            raise _first(joined) or UserError(
                f"push=distributed: servers join the group within push.group_seconds {self.choice.group_seconds:g}; got "
                f"({str(error).splitlines()[0]}); check push.address {host} and the servers' logs"
            ) from error
        if error := _first(joined):
            self.abandon()
            raise error

    def deliver(self, bucket: Bucket) -> None:
        """Broadcast, and return once every server has answered; a server's refusal ends the wait for the broadcast."""
        body = {
            "names": bucket.names,
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.pairs],
            "shapes": [list(tensor.shape) for _, tensor in bucket.pairs],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }

        def post(server: Server) -> None:
            more = {"selector": "all"} if server.features.selector else {}
            server.post("/update_weights_from_distributed", body | more, self.choice.request_seconds)

        answers = self.fleet.start(post)
        try:
            work = self._group.broadcast(bucket.memory, root=0)
            deadline = time.monotonic() + self.choice.group_seconds
            while not work.is_completed():
                early = next((error for answer in answers if answer.done() and (error := answer.exception())), None)
                if early or time.monotonic() > deadline:
                    raise early or UserError(
                        f"push=distributed: a bucket is taken within push.group_seconds {self.choice.group_seconds:g}; got no end; "
                        f"see the logs of {', '.join(server.url for server in self.servers)}"
                    )
                time.sleep(PAUSE_SECONDS)
            work.wait()
            devices.fence(bucket.memory.device)
        except RuntimeError as error:
            raise _first(answers, wait=False) or UserError(
                f"push=distributed: servers stay in the group; got {str(error).splitlines()[0]}; see their logs"
            ) from error
        if error := _first(answers):
            raise error

    def finish(self) -> None:
        """Every answer has come already."""

    def abandon(self) -> None:
        """Take the group down on both sides; the next push makes another one, of another name."""
        group, self._group, self._pushed = self._group, None, None
        if group is not None:  # first: a server that waits for a broadcast answers nothing else
            with contextlib.suppress(Exception):
                group.shutdown() if self._on_host else group.abort()
            del group
        if self._name:
            with ThreadPoolExecutor(len(self.servers)) as pool:
                list(pool.map(lambda server: _leave(server, self._name), self.servers))
        self._store, self._name = None, ""

    def close(self) -> None:
        """As after a failure."""
        self.abandon()


def _leave(server: Server, name: str) -> None:
    with contextlib.suppress(UserError):
        server.post("/destroy_weights_update_group", {"group_name": name}, LEAVE_SECONDS)


def _first(futures: list[Future], *, wait: bool = True) -> Exception | None:
    """The first error of requests."""
    found = [future.exception() for future in futures if wait or future.done()]
    return next((error for error in found if error is not None), None)


def _address(server: Server) -> str:
    """This machine's address on the way to ``server``."""
    host = urlsplit(server.url).hostname or "127.0.0.1"
    if host in LOOPBACK:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]
