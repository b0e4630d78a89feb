"""``r1mega COMMAND [group=choice] [key=value] ...``: arguments in, exit status out. Owns flags, help and how errors look.

Status 0 done, 1 a job of a sweep failed, doctor found something required that does not work, a figure of bench has fallen, or a
rank has lost another one, 2 wrong input (one line a fault, no traceback unless ``debug=true``), 75 SIGTERM came and the run is
saved, so that the same command goes on (EX_TEMPFAIL), 130 Ctrl-C, a failed rank's own status. Any other error is a defect of ours
and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1mega import __version__
from r1mega.api import COMMANDS, checked, run
from r1mega.config.errors import FAILED, STOPPED, Failed, Stopped, UserError
from r1mega.config.schema import schema

LOST, USER_ERROR, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a dotted choice may lie in the user's folder; last, so that it shadows nothing
    if "R1MEGA_COMPLETE" in os.environ:
        return _complete(os.environ["R1MEGA_COMPLETE"], arguments)
    try:
        return _main(arguments)
    except UserError as error:
        if _wants_traceback(arguments):
            traceback.print_exc()
        else:
            print(error, file=sys.stderr)
        return USER_ERROR
    except OSError as error:  # a folder that cannot be written, a disk that is full: nothing that a traceback explains better
        if error.errno is None or isinstance(error, ConnectionError):
            raise  # not a file's: a library's own, a socket's
        if _wants_traceback(arguments):
            traceback.print_exc()
        else:
            where, got = error.filename or "disk", error.strerror or str(error) or type(error).__name__
            print(f"{where}: can be read and written; got {got}; give another path, or make room or rights there", file=sys.stderr)
        return USER_ERROR
    except RuntimeError as error:
        told = _lost_rank(error)
        if told is None or _wants_traceback(arguments):
            raise
        print(told, file=sys.stderr)
        return LOST
    except Failed as failed:
        print(failed, file=sys.stderr)
        return FAILED
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(arguments: list[str]) -> int:
    flags, rest = _flags(arguments)
    command, overrides = (rest[0], rest[1:]) if rest else ("", [])
    if "version" in flags:
        print(f"r1mega {__version__}")
        return 0
    if command:
        schema(command)  # an unknown command is refused before its help is asked for
    if not command or "help" in flags:
        return _help(command, overrides)
    if "config_dir" in flags:
        folder = Path(flags["config_dir"]).resolve()
        if not folder.is_dir():
            raise UserError(f"--config-dir: a folder of YAML files; got {flags['config_dir']!r}; check the path")
        quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        overrides.append(f"hydra.searchpath=['file://{quoted}']")
    if "multirun" in flags:
        return _sweep(command, overrides, flags)
    if "cfg" in flags:
        return _print_config(command, overrides)
    if command == "doctor":
        from r1mega.doctor.report import main as doctor_status

        return doctor_status(overrides)
    from r1mega.config.environment import check_ranks
    from r1mega.launch.local import LaunchError

    check_ranks(meeting=True)
    try:
        run(command, overrides)
    except LaunchError as error:
        if error.status != STOPPED:  # a rank that has stopped has said so
            print(error, file=sys.stderr)
        return error.status
    return 0


def _lost_rank(error: RuntimeError) -> str | None:
    """The line that names the rank because of which a collective of this one has failed; None for any other error."""
    watch = sys.modules.get("r1mega.mesh.watch")  # there where this process is one of several ranks
    return None if watch is None else watch.explain(error)


def _flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Hydra's own flags that have a meaning here, and everything else. Raises UserError for a flag without its value."""
    flags: dict[str, str] = {}
    rest: list[str] = []
    names = {
        "--help": "help",
        "-h": "help",
        "--version": "version",
        "--config-dir": "config_dir",
        "-cd": "config_dir",
        "--cfg": "cfg",
        "-c": "cfg",
        "--multirun": "multirun",
        "-m": "multirun",
    }
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag not in names:
            rest.append(argument)
            continue
        name = names[flag]
        if name in ("config_dir", "cfg") and not equals:
            value = next(waiting, "")
        if name in ("config_dir", "cfg") and not value:
            raise UserError(f"{flag}: a flag with a value; got none; write {flag} {'DIR' if name == 'config_dir' else 'job'}")
        flags[name] = value
    if flags.get("cfg", "job") != "job":
        raise UserError(f"--cfg: job, the config of the command; got {flags['cfg']!r}; write --cfg job")
    return flags, rest


def _sweep(command: str, overrides: Sequence[str], flags: Mapping[str, str]) -> int:
    """``-m``: the command once for every combination of values."""
    if "cfg" in flags:
        raise UserError("--cfg: the config of one job; got -m too; leave one of them out")
    if not COMMANDS[command].saves:
        raise UserError(f"-m: a command whose runs have a folder; got {command}; leave -m out")
    from r1mega.launch.sweep import sweep

    return sweep(command, overrides, check=checked)


def _complete(shell: str, arguments: Sequence[str]) -> int:
    """Answer a shell's completion script. What goes wrong while somebody types is not said: it is, once the line is run."""
    try:
        from r1mega.config.completion import answer

        print(answer(shell, arguments, {name: entry.about for name, entry in COMMANDS.items()}), end="")
    except Exception:  # noqa: BLE001 - see above
        return 1
    return 0


def _help(command: str, overrides: Sequence[str]) -> int:
    # Written in one piece: a pager that is closed early then breaks no loop of prints.
    from r1mega.config.help import command_help, overview

    if not command:
        text = overview({name: entry.about for name, entry in COMMANDS.items()})
    else:
        from r1mega.config.groups import config_dir

        text = command_help(command, COMMANDS[command].about, config_dir(), overrides)
    print(text)
    return 0


def _print_config(command: str, overrides: Sequence[str]) -> int:
    """``--cfg job``: the resolved config as YAML, checked, nothing run."""
    import dataclasses

    import yaml

    from r1mega.config.compose import compose

    print(yaml.safe_dump(dataclasses.asdict(compose(command, overrides)), sort_keys=False, allow_unicode=True), end="")
    return 0


def _wants_traceback(arguments: Sequence[str]) -> bool:
    return any(argument.lower() in ("debug=true", "debug=1", "debug=yes", "debug=on") for argument in arguments)
