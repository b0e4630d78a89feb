"""The process that runs torch's launcher for one host: ``python -m r1mega.launch.agent OPTIONS_AS_JSON``.

As ``python -m torch.distributed.run OPTIONS``, with three differences. What goes wrong before the ranks run is one line, left in
the folder of notes. A failed rank's number and status are left there too. SIGTERM goes to the ranks and the launcher waits.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from r1mega.config.errors import UserError
from r1mega.config.launch_rules import address_of
from r1mega.launch.local import NOTES_VARIABLE


def main(arguments: Sequence[str]) -> int:
    """Run the launcher; returns the exit status. Notes: ``fault`` (a line), ``failed`` ([rank, status])."""
    notes = Path(os.environ[NOTES_VARIABLE])
    # a store of each attempt's own: torch's shared one keeps the names of the attempt before
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its tracebacks repeat what is told in one line
    args = run.parse_args(list(arguments))
    signal.signal(signal.SIGTERM, lambda number, frame: hand_on(number))
    try:
        check_meeting(args)
        run.run(args)
    except UserError as fault:
        (notes / "fault").write_text(str(fault), encoding="utf-8")
        return 2
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        (notes / "failed").write_text(json.dumps([rank, failure.exitcode]))
        return 1
    except SignalException as came:  # Ctrl-C in the terminal: the launcher has ended its ranks
        return 128 + came.sigval
    except Exception as error:  # noqa: BLE001 - torch raises half a dozen kinds where hosts do not meet
        line = meeting_fault(args, error)
        if line is None:
            raise
        (notes / "fault").write_text(line, encoding="utf-8")
        return 2
    return 0


def hand_on(number: int) -> None:
    """Give a signal to this process's children, which save and end by themselves."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            os.kill(int(pid), number)


def check_meeting(args) -> None:
    """Raise UserError for a port that is taken on the host that must keep it, and for a meeting place that nobody answers at."""
    from r1mega.mesh.rendezvous import await_listener, check_port

    text = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
    if text.endswith(":0"):
        return
    host, port = address_of(text) or address_of(f"[{args.master_addr}]:{args.master_port}")
    seconds, is_host = settings(args)
    if is_host:
        if args.rdzv_backend == "static":
            check_own_address(host)
        check_port(port, "launch.rendezvous")
    else:
        await_listener(host, port, time.monotonic() + seconds, seconds, f"launch.rendezvous {text}")


def check_own_address(host: str) -> None:
    """The host with number 0 is the one where all meet."""
    import socket

    from r1mega.launch.torchrun import is_here

    try:
        socket.getaddrinfo(host, 0)
    except OSError as error:
        raise UserError(
            f"launch.rendezvous: a host that this one can find; got {host!r}: {error.strerror}; check the name, or give its address"
        ) from error
    if not is_here(host):
        raise UserError(
            f"launch.host_rank: 0 on the host of launch.rendezvous alone; got 0 on host {socket.gethostname()}, which has no "
            f"address {host}; use launch.host_rank=1 or above here, or this host's address in launch.rendezvous"
        )


def settings(args) -> tuple[float, bool]:
    """(seconds to wait for the others, does this host keep the store) as the options say."""
    conf = dict(part.split("=", 1) for part in args.rdzv_conf.split(",") if "=" in part)
    is_host = args.node_rank == 0 if args.rdzv_backend == "static" else conf.get("is_host") == "1"
    return float(conf.get("join_timeout") or conf.get("timeout") or 600), is_host


def meeting_fault(args, error: Exception) -> str | None:
    """The line for an error of torch's rendezvous; None for any other."""
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if not isinstance(error, RendezvousError | dist.DistError | TimeoutError):
        return None
    seconds, _ = settings(args)
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"launch.hosts: {args.nnodes} hosts meet at launch.rendezvous within launch.rendezvous_timeout_seconds={seconds:g}; "
        f"got fewer ({said[:200]}); start the same command on the other hosts, or use a longer time"
    )


if __name__ == "__main__":
    status = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
