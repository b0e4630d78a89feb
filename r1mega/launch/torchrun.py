"""``launch=torchrun``: the same command on each host starts that host's ranks through torch's own launcher.

In: what a rank runs and the config. Out: ranks that have ended, or LaunchError, or UserError for hosts that do not meet. The
launcher runs in a process of its own (:mod:`r1mega.launch.agent`), since this one imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1mega.config.errors import STOPPED, UserError
from r1mega.config.launch_rules import address_of, num_processes
from r1mega.config.run import ComputeConfig, LaunchConfig
from r1mega.launch.local import NOTES_VARIABLE, LaunchError, _dies_with, _end, _sigterm_forwarded

END_SECONDS = 5.0
"""From SIGTERM to SIGKILL for the ranks that are left after a failure, and for the launcher itself."""


def start(rank: Sequence[str], config: ComputeConfig, env: Mapping[str, str]) -> bool:
    """Start this host's ranks and wait for them; True when they have run. See :func:`r1mega.launch.start.start`."""
    launch = config.launch
    if launch.dry_run:
        print(shlex.join([sys.executable, "-m", "torch.distributed.run", *options(config, hosts_store(launch)), *rank]))
        return False
    arguments = [*options(config, hosts_store(launch)), *rank]
    with contextlib.ExitStack() as stack:
        notes = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="r1mega-")))
        agents: list[subprocess.Popen] = []
        stack.callback(_end, agents, END_SECONDS)
        came = stack.enter_context(_sigterm_forwarded(agents))
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "r1mega.launch.agent", json.dumps(arguments)],
                env={**os.environ, **_threads(launch), **env, NOTES_VARIABLE: str(notes)},
                preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509 - runs two system calls, takes no lock
            )
        )
        if came:
            agents[0].send_signal(came[0])
        status = agents[0].wait()
        _raise(status, notes, launch, bool(came))
    return True


def _raise(status: int, notes: Path, launch: LaunchConfig, was_asked: bool) -> None:
    """Turn the launcher's end and the notes of it and of the ranks into what the caller is told."""
    total = num_processes(launch)
    if (notes / "stopped").exists():
        raise LaunchError(0, total, STOPPED)
    if (notes / "fault").exists():
        raise UserError((notes / "fault").read_text(encoding="utf-8"))
    if was_asked and status:
        raise SystemExit(128 + signal.SIGTERM)
    if (notes / "failed").exists():
        rank, code = json.loads((notes / "failed").read_text())
        raise LaunchError(rank, total, code if code > 0 else 128 - code)
    if status:
        raise LaunchError(0, total, status if status > 0 else 128 - status)


def options(config: ComputeConfig, is_host: bool) -> list[str]:
    """The launcher's options for this host. ``is_host``: the address where all meet is this host's."""
    launch = config.launch
    seconds = max(1, round(launch.rendezvous_timeout_seconds))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.name)
    found = [f"--nnodes={launch.hosts}", f"--nproc-per-node={launch.processes}", f"--max-restarts={launch.restarts}"]
    if launch.hosts == 1 and launch.rendezvous is None:
        found += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=is_host=1", "--local-addr=127.0.0.1"]
    elif launch.host_rank is not None and launch.hosts > 1:
        host, port = address_of(launch.rendezvous)
        found += [f"--node-rank={launch.host_rank}", f"--master-addr={host}", f"--master-port={port}"]
        found += [f"--rdzv-conf=timeout={seconds}"]
    else:
        found += ["--rdzv-backend=c10d", f"--rdzv-endpoint={launch.rendezvous}"]
        found += [f"--rdzv-conf=is_host={int(is_host)},join_timeout={seconds},read_timeout={seconds}"]
        found += [f"--local-addr={address}"] if (address := _own_address(launch)) else []
    # SIGTERM is ours: it goes to the ranks, which save and end
    return [*found, f"--rdzv-id={name}", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", f"--shutdown-timeout={END_SECONDS:g}"]


def hosts_store(launch: LaunchConfig) -> bool:
    """True where this host's launcher keeps the store in which the hosts meet."""
    if launch.rendezvous is None:
        return True
    if launch.host_rank is not None and launch.hosts > 1:
        return launch.host_rank == 0
    return is_here(address_of(launch.rendezvous)[0])


def is_here(host: str) -> bool:
    """Is ``host`` this machine? An address that one can be bound to is. False for a name that nobody knows."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


def _own_address(launch: LaunchConfig) -> str | None:
    """This host's address towards the rendezvous, under which its ranks are found; no packet is sent."""
    host, port = address_of(launch.rendezvous)
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    return None


def _threads(launch: LaunchConfig) -> dict[str, str]:
    """A share of the cores for each rank, as ``launch=local`` gives, unless the user has said how many."""
    share = max(1, len(os.sched_getaffinity(0)) // launch.processes)
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share)}
