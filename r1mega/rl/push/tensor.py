"""Buckets by /update_weights_from_tensor: a handle to GPU memory on this machine, or the bytes inside the request."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch

from r1mega import device as devices
from r1mega.config.errors import UserError
from r1mega.rl.push.choices import TensorPush
from r1mega.rl.push.contract import PushRuntime
from r1mega.rl.push.wire import Bucket, Format, encode

if TYPE_CHECKING:
    from r1mega.rl.engine.sglang.client import Server
    from r1mega.rl.push.update import Fleet

LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


class ByTensor:
    """See :class:`r1mega.rl.push.update.Way`. One entry a tensor parallel rank, which cuts its share out."""

    tight, needs_session = False, True

    def __init__(self, choice: TensorPush, runtime: PushRuntime):
        self.choice, self.runtime = choice, runtime
        self.fleet: Fleet | None = None

    def device(self, servers: list[Server]) -> torch.device:
        """The trainer's where every server can take a handle, else the CPU."""
        here = torch.device(self.runtime.device)
        able = devices.is_shared_by_handle(here) and all(_takes_handles(server) for server in servers)
        if self.choice.payload == "handle" and not able:
            raise UserError(
                "push.payload: handles where trainer and servers have GPUs of one machine; got handle; use push.payload=auto"
            )
        return here if able and self.choice.payload != "inline" else torch.device("cpu")

    def open(self, fleet: Fleet, form: Format, version: int) -> None:
        """Nothing is held."""
        self.fleet = fleet

    def deliver(self, bucket: Bucket) -> None:
        """Return once every server has answered."""
        payload = encode(bucket)

        def post(server: Server) -> None:
            body = {
                "serialized_named_tensors": [payload] * server.tp_size,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            body |= {"selector": "all"} if server.features.selector else {}
            server.post("/update_weights_from_tensor", body, self.choice.request_seconds)

        self.fleet.ask(post)

    def finish(self) -> None:
        """Every answer has come already."""

    def abandon(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def _takes_handles(server: Server) -> bool:
    host = urlsplit(server.url).hostname or ""
    return devices.is_shared_by_handle(str(server.info.get("device") or "cpu")) and (
        host in LOOPBACK or host == socket.gethostname() or _is_here(host)
    )


def _is_here(host: str) -> bool:
    """An address that one can be bound to is this machine's."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            return True
    except OSError:
        return False
