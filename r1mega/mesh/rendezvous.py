"""Where ranks find each other: the store at MASTER_ADDR:MASTER_PORT, who has come, and whether all have the same config.

In: the variables that torchrun sets. Out: :class:`Meeting`, one a process. Raises UserError, one line: a name that is unknown, an
address that nobody answers at, a port that is taken, a rank that came twice, ranks that did not come, a config that differs.
Nothing here needs a process group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import __version__
from r1mega.config.errors import UserError, shown
from r1mega.config.launch_rules import INTERFACE_VARIABLES
from r1mega.config.run import LaunchConfig

OWN_KEYS = ("device.threads", "debug")
"""What each host may have for itself; of the section launch only the timeouts are the same everywhere."""

SHARED_LAUNCH_KEYS = ("launch.timeout_seconds", "launch.stall_timeout_seconds", "launch.rendezvous_timeout_seconds")
PAUSE_SECONDS = 0.1
LINGER_SECONDS = 1.0
"""Rank 0, which keeps the store, goes that much later, so that the others hear why."""

MOST_NAMED = 8
"""Ranks that an error names."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """One rank's process. ``place``: equal on processes that see each other in /proc."""

    host: str
    pid: int
    place: str


@dataclasses.dataclass(frozen=True)
class Meeting:
    """All ranks, met. ``store``: torch's, of this process alone; ``address``: where it is kept, empty for one process."""

    rank: int
    world_size: int
    store: dist.Store
    peers: tuple[Peer, ...]
    address: str = ""


_meeting: Meeting | None = None
_names: dict[str, int] = {}


def meet(launch: LaunchConfig) -> Meeting:
    """Wait for all ranks, once a process: its port is taken once. A process without RANK and MASTER_ADDR is alone."""
    global _meeting
    if _meeting is None:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 and "MASTER_ADDR" not in os.environ:
            _meeting = Meeting(rank, world, dist.HashStore(), (_here(),))
        else:
            _meeting = _join(rank, world, launch)
    return _meeting


def fresh_store(meeting: Meeting, name: str) -> dist.Store:
    """Names of their own in the store of ``meeting`` for each call with ``name``; all ranks call it equally often."""
    _names[name] = _names.get(name, 0) + 1
    return dist.PrefixStore(f"{name}-{_names[name]}", meeting.store)


def _join(rank: int, world: int, launch: LaunchConfig) -> Meeting:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address, deadline = f"{host}:{port}", time.monotonic() + launch.rendezvous_timeout_seconds
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun keeps it
    if keeps:
        check_port(port, "MASTER_PORT")
    else:
        await_listener(host, port, deadline, launch.rendezvous_timeout_seconds, f"MASTER_ADDR {address}")
    choose_interface(host, port, launch.interface)
    left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        store = dist.TCPStore(host, port, world, is_master=keeps, timeout=left, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, ValueError) as error:  # the port was taken, or its owner went, between the look above and now
        said = str(error).splitlines()[0]
        raise UserError(f"MASTER_ADDR {address}: rank 0 keeps the ranks' store there; got {said}; start all ranks again") from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a failed attempt and its keys
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    peers = _gather_peers(store, rank, world, launch.rendezvous_timeout_seconds, deadline)
    store.set_timeout(datetime.timedelta(seconds=launch.timeout_seconds))
    return Meeting(rank, world, store, peers, address)


def _gather_peers(store: dist.Store, rank: int, world: int, seconds: float, deadline: float) -> tuple[Peer, ...]:
    """Every rank's process, once all have come; the first fault that a rank finds is every rank's."""
    keys, me, fault = [f"peer-{other}" for other in range(world)], _here(), ""
    try:
        if store.add(f"came-{rank}", 1) > 1:
            first = json.loads(store.get(f"peer-{rank}"))["host"]
            way = "check RANK on each host, or launch.host_rank"
            fault = f"RANK: each rank once; got rank {rank} on host {me.host} and on host {first}; {way}"
            store.set("fault", fault)
        else:
            store.set(f"peer-{rank}", json.dumps(dataclasses.asdict(me)))
        while not fault and not store.check(keys):
            if store.check(["fault"]):
                fault = store.get("fault").decode()
            elif time.monotonic() > deadline:
                missing = [other for other, key in enumerate(keys) if not store.check([key])]
                named = ", ".join(map(str, missing[:MOST_NAMED])) + (", ..." if len(missing) > MOST_NAMED else "")
                fault = (
                    f"launch.rendezvous_timeout_seconds: all {world} ranks meet within {seconds:g} seconds; "
                    f"got {world - len(missing)}, without rank {named}; start the other hosts, look at their output, or wait longer"
                )
                store.set("fault", fault)
            else:
                time.sleep(PAUSE_SECONDS)
        if not fault:
            return tuple(Peer(**json.loads(text)) for text in store.multi_get(keys))
    except dist.DistError as error:
        said = str(error).splitlines()[0]
        fault = f"MASTER_ADDR: rank 0 keeps the ranks' store until all have met; got {said}; look at rank 0's output"
    if rank == 0:
        time.sleep(LINGER_SECONDS)
    raise UserError(fault)


def check_port(port: int, where: str) -> None:
    """Raise UserError where another program on this host listens on ``port``."""
    for family, wildcard in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        with contextlib.suppress(OSError), socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((wildcard, port))
                server.listen()
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    continue  # no such family here
                why = "in use" if error.errno == errno.EADDRINUSE else "for root alone"
                raise UserError(
                    f"{where}: a free port of this host; got {port}, which is {why}; use another, as {_free_port()}"
                ) from error


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def await_listener(
    host: str, port: int, deadline: float, seconds: float, where: str, step: Callable[[], None] | None = None
) -> None:
    """Return once somebody listens at ``host:port``. Raises UserError for an unknown name at once, for silence at ``deadline``.

    ``step``: called between tries.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{where}: a host that this one can find; got {host!r}: {why}; check the name, or give its address"
        ) from error
    said = "no try"
    while True:
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as client:
                client.settimeout(max(0.2, min(5.0, deadline - time.monotonic())))
                try:
                    client.connect(address)
                    return
                except TimeoutError:
                    said = "no answer at all: the host is off, or a firewall drops the port"
                except OSError as error:
                    said = {
                        errno.ECONNREFUSED: "nobody listens: rank 0 has not started, or the port is wrong",
                        errno.EHOSTUNREACH: "no route to the host",
                        errno.ENETUNREACH: "no network towards the host",
                    }.get(error.errno, error.strerror or str(error))
        if time.monotonic() >= deadline:
            raise UserError(
                f"{where}: rank 0's host answers there within launch.rendezvous_timeout_seconds={seconds:g}; got {said}; "
                "check address and port, start that host first, or use a longer time"
            )
        if step:
            step()
        time.sleep(PAUSE_SECONDS)


def choose_interface(host: str, port: int, wanted: str | None) -> None:
    """Name the network interface for the backends, which otherwise take the one that the host's name leads to.

    ``wanted``: the user's; None: the one that this host uses towards ``host``. A variable that is set stays. Raises UserError for
    an interface that is not here.
    """
    here = [name for _, name in socket.if_nameindex()]
    if wanted is not None and wanted not in here:
        raise UserError(
            f"launch.interface: an interface of this host; got {wanted!r} on {socket.gethostname()}; use one of {', '.join(here)}"
        )
    name = wanted or interface_to(host, port)
    for variable in INTERFACE_VARIABLES if name else ():
        if name != "lo" or variable == INTERFACE_VARIABLES[0]:  # the second backend finds its ways inside one host by itself
            os.environ.setdefault(variable, name)


def interface_to(host: str, port: int) -> str | None:
    """The interface whose address this host uses towards ``host``; its own address leads to the interface that has it."""
    import psutil

    own = local_address(host, port)
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name
    return None


def local_address(host: str, port: int) -> str | None:
    """This host's address towards ``host``. No packet is sent: a datagram socket that connects only looks up the route."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.connect(address)
            return client.getsockname()[0].partition("%")[0]
    except OSError:
        return None


@functools.cache
def _here() -> Peer:
    """This process. Two containers of one machine have the same host name and boot, and do not see each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        place = ""
    return Peer(socket.gethostname(), os.getpid(), place)


def agree_on_config(config: Any) -> None:
    """Raise UserError on every rank where one has another config than rank 0, with the first key that differs and both values.

    ``config``: a command's dataclass, as given (local copies of remote files have other paths). Compared before any process group
    is made, since another layout there is a hang. May differ: :data:`OWN_KEYS`, and who starts the processes (``launch.*`` but the
    timeouts). r1mega's and torch's versions are compared too.
    """
    meeting = meet(config.launch)
    if meeting.world_size == 1:
        return
    rank, world = meeting.rank, meeting.world_size
    store, mine = fresh_store(meeting, "config"), shared_keys(config)
    if rank == 0:
        store.set("first", json.dumps(mine))
    found = "" if rank == 0 else difference(json.loads(store.get("first")), mine, meeting)
    store.set(f"found-{rank}", found)
    if rank == 0:
        texts = [store.get(f"found-{other}").decode() for other in range(world)]
        store.set("verdict", next(filter(None, texts), ""))
    verdict = store.get("verdict").decode()
    store.set(f"heard-{rank}", "1")
    if verdict and rank == 0:
        with contextlib.suppress(RuntimeError):  # rank 0 keeps the store: it goes last
            store.wait([f"heard-{other}" for other in range(world)], datetime.timedelta(seconds=10))
    if verdict:
        raise UserError(verdict)


def difference(first: Mapping[str, str], mine: Mapping[str, str], meeting: Meeting) -> str:
    """The line that says where this rank's keys leave rank 0's; empty where they do not."""
    for key in [*first, *(key for key in mine if key not in first)]:
        left, right = first.get(key, "no such key"), mine.get(key, "no such key")
        if left != right:
            hosts = meeting.peers[0].host, meeting.peers[meeting.rank].host
            return (
                f"{key}: the same on all ranks; got {shown(left)} on rank 0 (host {hosts[0]}) and {shown(right)} on rank "
                f"{meeting.rank} (host {hosts[1]}); start the same command on each host"
            )
    return ""


def shared_keys(config: Any) -> dict[str, str]:
    """Dotted key to value as text, of all that must be the same on every rank, in the order of the config's fields."""
    keys = {"version of r1mega": __version__, "version of torch": torch.__version__}
    keys |= {key: value for key, value in _flat(config) if key not in OWN_KEYS and not key.startswith("launch.")}
    return keys | {key: value for key, value in _flat(config) if key in SHARED_LAUNCH_KEYS}


def _flat(value: Any, key: str = ""):
    """(dotted key, text) of every leaf; a section's own key has its class, as two choices may have the same knobs."""
    if dataclasses.is_dataclass(value):
        if key:
            yield key, f"{type(value).__module__}.{type(value).__qualname__}"
        for field in dataclasses.fields(value):
            yield from _flat(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)
    elif isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}")
    else:
        yield key, json.dumps(value) if isinstance(value, str | bool | int | float | list | tuple | None) else repr(value)
