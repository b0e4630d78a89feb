"""Shell completion: what may stand at the cursor, from the schema and the YAML files; and the scripts that make a shell ask.

In: the words before the cursor's and the cursor's own, up to the cursor. Out: candidates with a doc string each. A script calls
``r1mega`` again with :data:`VARIABLE` set, which answers before Hydra is imported. Imports no torch; a dotted choice on the line is
imported, for its knobs.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from r1mega import registry
from r1mega.config.groups import config_dir, default_groups, options, overridden
from r1mega.config.help import leaves, value_text, yaml_defaults
from r1mega.config.knob import REQUIRED
from r1mega.config.schema import SCHEMAS, Key, fields, kinds, plain_type
from r1mega.config.tools import CompletionConfig
from r1mega.config.train import TUNABLE_MODEL_FIELDS

VARIABLE = "R1MEGA_COMPLETE"
"""Set to the shell's name: ``r1mega`` answers with candidates, a line each, and runs nothing."""

FLAGS = {
    "--help": "groups and keys with default, unit and meaning",
    "--version": "the version",
    "--config-dir": "a folder with more choices as YAML",
    "--cfg": "job: print the config, run nothing",
    "-m": "a sweep: key=a,b runs the command once for each value",
}
VALUED = {"--config-dir": "DIR", "-cd": "DIR", "--cfg": "job", "-c": "job"}
"""Flags whose value is the next word."""

OPEN_ENDS = ("=", ".", "/", ",")
"""A candidate that ends so goes on: no space after it."""

_PLAIN_NAME = re.compile(r"[\w./+@%-]+")  # Hydra and the shells take such a file name without quotes

Candidate = tuple[str, str]

SCRIPTS = {
    "bash": """\
_r1mega_complete() {
    mapfile -t COMPREPLY < <(R1MEGA_COMPLETE=bash "$1" "$1" "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null)
}
complete -o nospace -F _r1mega_complete r1mega
""",
    "zsh": """\
#compdef r1mega
_r1mega_complete() {
    local line word
    local -a whole whole_shown open open_shown
    for line in "${(@f)$(R1MEGA_COMPLETE=zsh ${(Q)words[1]} "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        word=${line%%$'\\t'*}
        case $word in
            '') ;;
            *[=./,]) open+=("$word"); open_shown+=("${line/$'\\t'/  }") ;;
            *) whole+=("$word"); whole_shown+=("${line/$'\\t'/  }") ;;
        esac
    done
    (( $#whole )) && compadd -Q -l -d whole_shown -a whole
    (( $#open )) && compadd -Q -S '' -l -d open_shown -a open
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _r1mega_complete r1mega
""",
    "fish": """\
function _r1mega_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program $words[1]
    set -e words[1]
    R1MEGA_COMPLETE=fish $program $words "$current" 2>/dev/null
end
complete -c r1mega -f -a '(_r1mega_complete)'
""",
}
"""Shell to its script. bash hands over its line, since it splits words at ``=``; the others their words."""


def completion(cfg: CompletionConfig) -> dict[str, str]:
    """Print the script of ``cfg.shell`` and return it as ``{"script": text}``."""
    script = SCRIPTS[cfg.shell]
    print(script, end="")
    return {"script": script}


def answer(shell: str, arguments: Sequence[str], about: Mapping[str, str]) -> str:
    """The text for the script of ``shell``: a candidate a line; empty where nothing fits or the line cannot be read.

    ``arguments``: of bash the program's name, the line up to the cursor and COMP_WORDBREAKS; of the others the words after the
    program's name, the cursor's last. ``about``: command to one line.
    """
    if shell != "bash":
        found = candidates(arguments[:-1], arguments[-1], about)
        return "".join(f"{word}\t{doc}\n" for word, doc in found)
    program, line, breaks = arguments
    try:
        words = shlex.split(line)
    except ValueError:  # inside quotes
        return ""
    current = "" if not words or line[-1].isspace() else words.pop()
    if not line.endswith(current):  # the word has quotes: bash would put the candidate behind them
        return ""
    words = words[words.index(program) + 1 :] if program in words else words
    # bash replaces only what stands behind the last of its word breaks
    kept = max((current.rfind(character) + 1 for character in breaks if not character.isspace()), default=0)
    found = candidates(words, current, about)
    return "".join(f"{word[kept:]}{'' if word.endswith(OPEN_ENDS) else ' '}\n" for word, _ in found)


def candidates(words: Sequence[str], current: str, about: Mapping[str, str] | None = None) -> list[Candidate]:
    """(whole word, doc string) of all that may stand for ``current`` after ``words`` (the program's name left out)."""
    return [found for found in _candidates(list(words), current, about or {}) if found[0].startswith(current)]


def _candidates(words: list[str], current: str, about: Mapping[str, str]) -> Iterator[Candidate]:
    arguments, folders = _without_flags(words)
    if words and words[-1] in VALUED:
        yield from [("job", "the config of the command")] if VALUED[words[-1]] == "job" else _files(current, folders_only=True)
    elif current.startswith("-"):
        yield from FLAGS.items()
    elif not arguments:
        yield from ((command, about.get(command, "")) for command in SCHEMAS)
    elif arguments[0] in SCHEMAS:
        line = _Line(arguments[0], arguments[1:], [config_dir(), *folders], "-m" in words or "--multirun" in words)
        name, equals, value = current.partition("=")
        yield from line.values(name, value) if equals else line.names(current)


def _without_flags(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The command and its overrides, and the folders of ``--config-dir``."""
    rest, folders = [], []
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag in VALUED:
            value = value if equals else next(waiting, "")
            folders += [Path(value)] if VALUED[flag] == "DIR" and value else []
        elif not word.startswith("-"):
            rest.append(word)
    return rest, folders


class _Line:
    """One command line: the groups and keys that its command and its choices have."""

    def __init__(self, command: str, overrides: Sequence[str], folders: Sequence[Path], is_sweep: bool):
        self.cls, self.folders, self.is_sweep = SCHEMAS[command], folders, is_sweep
        pairs = [override.lstrip("+").partition("=") for override in overrides]
        self.given = {name for name, _, _ in pairs}
        groups = default_groups(command, config_dir())
        groups |= {name: value for name, _, value in pairs if name in groups}
        self.groups = overridden(groups, self.given, folders)
        self.defaults = yaml_defaults(command, self.groups, config_dir())
        self.keys = {key.path: key for key in leaves(self.cls, self._chosen())}

    def _chosen(self) -> dict[str, type]:
        found = {}
        for kind in kinds(self.cls):
            try:
                found[kind] = registry.lookup(kind, self.groups[kind])
            except Exception:  # noqa: BLE001 - an unfinished or faulty choice offers no knobs; running the command says why
                continue
        return found

    def names(self, current: str) -> Iterator[Candidate]:
        """Groups and keys, a section at a time: ``optim.`` first, its keys once that is typed."""
        for group in self.groups:
            if group not in self.given:
                yield f"{group}=", f"a choice (now {self.groups[group]})"
        seen = set()
        for path, key in self._reachable(current):
            dot = path.find(".", len(current))
            word = path[: dot + 1] if dot >= 0 else f"{path}="
            if path.startswith(current) and path not in self.given and path not in self.groups and word not in seen:
                seen.add(word)
                yield word, f"keys of {word[:-1]}" if dot >= 0 else self._doc(key)

    def _reachable(self, current: str) -> Iterator[tuple[str, Key]]:
        """All keys by path; where a path goes through a name of the user's (``problems.NAME.path``), with the name typed."""
        typed = current.split(".")
        for path, key in self.keys.items():
            parts = path.split(".")
            if "NAME" not in parts:
                yield path, key
                yield from self._entries(key)
            elif parts.index("NAME") >= len(typed):  # the name is not reached yet
                yield path, key
            elif parts.index("NAME") < len(typed) - 1:
                parts[parts.index("NAME")] = typed[parts.index("NAME")]
                yield ".".join(parts), key

    def _entries(self, key: Key) -> Iterator[tuple[str, Key]]:
        """Names that an open mapping is known to take: rewards and their knobs, a checkpoint's training fields."""
        if key.path in ("reward.weights", "reward.options"):
            for name, cls in registry.choices("reward").items():
                if key.path == "reward.weights":
                    yield f"{key.path}.{name}", Key(f"{key.path}.{name}", float, 1.0, "weight of the reward", "1")
                else:
                    yield from ((knob.path, knob) for knob in fields(cls, f"{key.path}.{name}.").values())
        elif key.path == "model" and key.is_open:
            for name in TUNABLE_MODEL_FIELDS:
                yield f"model.{name}", Key(f"model.{name}", float, None, "training field of the checkpoint's model", "1")

    def _doc(self, key: Key) -> str:
        default = value_text(self.defaults.get(key.path, key.default))
        return f"{key.doc}{f' ({key.says})' if key.says else ''} [{key.unit}], default {default}"

    def values(self, name: str, value: str) -> Iterator[Candidate]:
        """``NAME=VALUE``; of a sweep (``-m``) the part behind the last comma is completed."""
        head = ""
        if self.is_sweep and "," in value and not re.search(r"[\[{('\"]", value):
            head, _, value = value.rpartition(",")
            head += ","
        if name in self.groups:
            known = [(option, "") for option in options(self.cls, name, self.folders)]
        else:
            key = dict(self._reachable(name)).get(name)
            known = [] if key is None else self._known(key, value)
        yield from ((f"{name}={head}{word}", doc) for word, doc in known)

    def _known(self, key: Key, value: str) -> list[Candidate]:
        base, _ = plain_type(key.type)
        default = self.defaults.get(key.path, key.default)
        if base is bool:
            return [("true", ""), ("false", "")]
        if key.says.startswith("one of "):
            return [(name, "") for name in key.says.removeprefix("one of ").split(", ")]
        if key.unit == "path" and base is str:
            return list(_files(value))
        if default is None or default == REQUIRED or base not in (int, float, str):
            return []
        return [(value_text(default), "the default")]


def _files(start: str, folders_only: bool = False) -> Iterator[Candidate]:
    """Files and folders (with a slash) whose path begins with ``start``; hidden ones where a dot is typed."""
    folder, slash, last = start.rpartition("/")
    try:
        found = sorted(os.scandir(folder + slash or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        if entry.name.startswith(last) and (last or not entry.name.startswith(".")) and _PLAIN_NAME.fullmatch(entry.name):
            if entry.is_dir():
                yield f"{folder}{slash}{entry.name}/", ""
            elif not folders_only:
                yield f"{folder}{slash}{entry.name}", ""
