"""``r1mega doctor`` and ``r1mega completion``: what they take."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.knob import at_least, knob, one_of
from r1mega.config.run import RunConfig


@dataclass
class DoctorConfig(RunConfig):
    """``r1mega doctor``: what is here and usable, what is missing, what that switches off, and the command that adds it.

    Every package is really tried, in a process of its own under a time limit. Exit status 0: all that make quickstart and make
    test need works; 1: something of it does not. Writes nothing; the disk looked at is the one of ``out``.
    """

    json: bool = knob(False, "print one JSON object instead of the table", "bool")
    timeout_seconds: float = knob(180.0, "longest time of one check", "seconds", **at_least(1))


@dataclass
class CompletionConfig(RunConfig):
    """``r1mega completion``: a script that teaches a shell to complete r1mega's command line.

    In ~/.bashrc or ~/.zshrc: ``source <(r1mega completion shell=bash)``; fish: ``r1mega completion shell=fish | source``.
    """

    shell: str = knob("bash", "the shell", "name", **one_of("bash", "zsh", "fish"))
