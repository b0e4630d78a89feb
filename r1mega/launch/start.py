"""One way in for all kinds of launch: ``launch.kind`` and the command line in, ranks that have ended, or a job that is queued, out.

Owns restarts on this machine and ``launch.dry_run``. Whatever the kind, a rank runs ``python -m r1mega COMMAND OVERRIDES`` with
RANK and WORLD_SIZE set, so that the same config is started everywhere.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from r1mega.config.errors import STOPPED
from r1mega.config.rl import RlConfig
from r1mega.config.run import ComputeConfig, LaunchConfig
from r1mega.launch.local import LaunchError, start_ranks

FINAL = (2, STOPPED, 130, 143)
"""Statuses after which the same start would end the same way, or was asked to end: wrong input, saved, Ctrl-C, SIGTERM."""


def starts(config: Any) -> bool:
    """Does somebody have to start ranks for ``config``, or can this process be the only one?"""
    return isinstance(config, ComputeConfig) and (
        _is_on_ray(config)
        or config.launch.kind != "local"
        or config.launch.processes > 1
        or config.launch.restarts > 0
        or config.launch.dry_run
    )


def _is_on_ray(config: ComputeConfig) -> bool:
    return isinstance(config, RlConfig) and config.runtime.kind == "ray"


def start(command: str, arguments: Sequence[str], config: ComputeConfig, env: Mapping[str, str]) -> bool:
    """Start the ranks of ``r1mega COMMAND ARGUMENTS`` and wait for those of this machine; ``env`` is added to their environment.

    True: they have run. False: none has here (a dry run, or a job that slurm has taken). Raises UserError, LaunchError, and what
    :func:`r1mega.launch.local.start_ranks` raises for signals.
    """
    rank = ["-m", "r1mega", command, *(text for text in arguments if not text.startswith("launch.dry_run="))]
    if _is_on_ray(config):
        from r1mega.launch.ray import driver

        return driver.start(rank, config, env, FINAL)
    if config.launch.kind == "torchrun":
        from r1mega.launch import torchrun

        return torchrun.start(rank, config, env)
    if config.launch.kind == "slurm":
        from r1mega.launch import slurm

        return slurm.start(rank, config)
    if config.launch.dry_run:
        print(f"{config.launch.processes} x {shlex.join([sys.executable, *rank])}")
        return False
    restarted(rank, config.launch, env)
    return True


def restarted(arguments: Sequence[str], launch: LaunchConfig, env: Mapping[str, str]) -> None:
    """:func:`start_ranks`, and again after a rank's failure, at most ``launch.restarts`` times."""
    for attempt in range(launch.restarts + 1):
        try:
            return start_ranks(arguments, launch.processes, env=env)
        except LaunchError as error:
            if error.status in FINAL or attempt == launch.restarts:
                raise
            print(
                f"launch: rank {error.rank} of {launch.processes} has ended with status {error.status}; all ranks start again from "
                f"the last checkpoint, restart {attempt + 1} of {launch.restarts}",
                file=sys.stderr,
                flush=True,
            )
