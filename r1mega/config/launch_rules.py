"""Rules of the section launch: what each kind of launch needs, and enough devices on this machine for the processes that it starts.

In: a command's config whose fields keep their own rules. Out: Violations with the way out. Imports no torch and asks no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from r1mega.config.errors import Violation
from r1mega.config.run import ComputeConfig, LaunchConfig

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What the backends read to find the network interface; a value that is set is the user's, and stays."""

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
"""Which GPUs a process sees."""

TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE")
GPUS_OF_DRIVER = Path("/proc/driver/nvidia/gpus")
OURS = (
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--signal",
    "--requeue",
    "--no-requeue",
    "--output",
    "--job-name",
    "--open-mode",
)
"""Options of sbatch that the file has already."""


def launch_violations(config: ComputeConfig) -> Iterator[Violation]:
    """Broken rules between the knobs of ``launch``; those of who starts ranks only where nobody has started them yet."""
    launch = config.launch
    on_ray = getattr(getattr(config, "runtime", None), "kind", "local") == "ray"  # runtime_rules has the rules of that
    if "RANK" not in os.environ and not on_ray:
        yield from _hosts(launch)
        yield from _slurm(launch)
    if "RANK" in os.environ or not on_ray:
        yield from _devices(config)


def num_processes(launch: LaunchConfig) -> int:
    """Processes of the whole run, before anybody has started them."""
    return launch.hosts * launch.processes


def _hosts(launch: LaunchConfig) -> Iterator[Violation]:
    if launch.kind == "local" and launch.hosts > 1:
        hint = "or launch=torchrun on each host, or launch=slurm"
        yield Violation("launch.hosts", "1 with launch=local, which is this machine", launch.hosts, (("launch.hosts", (1,)),), hint)
    if launch.kind != "torchrun":
        for key in ("rendezvous", "host_rank"):
            if getattr(launch, key) is not None:
                hint = "or launch=torchrun"
                rule = f"null with launch={launch.kind}, which finds it itself"
                yield Violation(f"launch.{key}", rule, getattr(launch, key), ((f"launch.{key}", ("null",)),), hint)
        return
    if launch.rendezvous is None and launch.hosts > 1:
        hint = "give launch.rendezvous=ADDRESS:PORT of one of the hosts, the same on all"
        yield Violation("launch.rendezvous", f"needed for launch.hosts={launch.hosts}", "null", hint=hint)
    elif launch.rendezvous is not None and not address_of(launch.rendezvous):
        hint = "give launch.rendezvous=node1:29500, an IPv6 address as '[ADDRESS]:PORT'"
        yield Violation("launch.rendezvous", "ADDRESS:PORT, a port from 1 to 65535", repr(launch.rendezvous), hint=hint)
    if launch.host_rank is not None and launch.host_rank >= launch.hosts:
        fixes = (("launch.host_rank", tuple(range(min(launch.hosts, 4)))), ("launch.hosts", (launch.host_rank + 1,)))
        yield Violation("launch.host_rank", f"below launch.hosts {launch.hosts}", launch.host_rank, fixes)
    if launch.host_rank is not None and launch.hosts > 1 and launch.restarts:
        rule = "null with launch.restarts above 0 and several hosts, which meet anew and are numbered anew"
        fixes = (("launch.host_rank", ("null",)), ("launch.restarts", (0,)))
        yield Violation("launch.host_rank", rule, launch.host_rank, fixes)


def _slurm(launch: LaunchConfig) -> Iterator[Violation]:
    if launch.time_limit is not None and not TIME.fullmatch(launch.time_limit):
        hint = "give launch.time_limit=12:00:00, or 2-00:00:00 for two days"
        yield Violation("launch.time_limit", "[DAYS-]HOURS:MINUTES:SECONDS", repr(launch.time_limit), hint=hint)
    for key in ("partition", "account", "output"):
        value = getattr(launch, key)
        if value is not None and (not value.strip() or len(value.split("\n")) > 1):
            yield Violation(f"launch.{key}", "one line of text", repr(value), hint=f"give launch.{key}=TEXT")
    for option in launch.options:
        name = option.partition("=")[0]
        if not re.fullmatch(r"--?[A-Za-z][\w-]*([= ]\S.*)?", option):
            yield Violation("launch.options", "options of sbatch", repr(option), hint="give launch.options=['--qos=high']")
        elif name in OURS:
            yield Violation("launch.options", f"none that the file has already, as {name}", repr(option), hint="leave it out")


def _devices(config: ComputeConfig) -> Iterator[Violation]:
    """As many GPUs as local processes, where this machine is the one that runs them and its GPUs can be counted without torch."""
    if config.device.kind != "cuda" or ("RANK" not in os.environ and config.launch.kind == "slurm"):
        return
    joined = "RANK" in os.environ
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if joined else config.launch.processes
    found = visible_gpus()
    if found is not None and 0 < found < processes:
        source = "LOCAL_WORLD_SIZE" if joined else "launch.processes"
        hint = f"start at most {found} here" if joined else "and more hosts for more processes"
        fixes = () if joined else (("launch.processes", (found,)),)
        yield Violation(source, f"at most the {found} GPUs that this machine shows, one a process", processes, fixes, hint)


def visible_gpus() -> int | None:
    """GPUs that a process here may use: the driver's files, cut by CUDA_VISIBLE_DEVICES. None: they cannot be counted so."""
    named = os.environ.get(VISIBLE_VARIABLE)
    driver = len(list(GPUS_OF_DRIVER.iterdir())) if GPUS_OF_DRIVER.is_dir() else None
    if named is None:
        return driver
    listed = []
    for name in named.split(","):
        if name.strip() in ("", "-1"):  # what follows is not seen either
            break
        listed.append(name)
    whole = all(name.strip().isdecimal() for name in listed)  # parts of a GPU have names of their own, and are more than GPUs
    return min(len(listed), driver) if whole and driver else len(listed)


def address_of(text: str) -> tuple[str, int] | None:
    """``ADDRESS:PORT`` or ``[IPV6]:PORT`` in its parts; None for anything else."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/]+)):(\d{1,5})", text)
    if found is None or not 0 < int(found[3]) < 1 << 16:
        return None
    return found[1] or found[2], int(found[3])
