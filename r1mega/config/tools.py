"""``r1mega doctor``, ``r1mega completion``, ``r1mega timeline``, ``r1mega lineage`` and ``r1mega why``: what they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1mega import registry
from r1mega.config.knob import REQUIRED, at_least, knob, one_of
from r1mega.config.run import RunConfig


@dataclass
class DoctorConfig(RunConfig):
    """``r1mega doctor``: what is here and usable, what is missing, what that switches off, and the command that adds it.

    Every package is really tried, in a process of its own under a time limit. Exit status 0: all that make quickstart and make
    test need works; 1: something of it does not. Writes nothing; the disk looked at is the one of ``out``.

    With ``engine=sglang engine.url=URL`` that server instead, against what engine=sglang relies on; ``engine.may_update=true``
    also tries what would disturb its other users.
    """

    json: bool = knob(False, "print one JSON object instead of the table", "bool")
    timeout_seconds: float = knob(180.0, "longest time of one check", "seconds", **at_least(1))
    engine: Any = knob(None, "engine.url=URL: a server to look at, instead of this machine; None in Python: sglang", "choice")

    def __post_init__(self) -> None:
        if self.engine is None:
            self.engine = registry.lookup("engine", "sglang")()


@dataclass
class CompletionConfig(RunConfig):
    """``r1mega completion``: a script that teaches a shell to complete r1mega's command line.

    In ~/.bashrc or ~/.zshrc: ``source <(r1mega completion shell=bash)``; fish: ``r1mega completion shell=fish | source``.
    """

    shell: str = knob("bash", "the shell", "name", **one_of("bash", "zsh", "fish"))


@dataclass
class TimelineConfig(RunConfig):
    """``r1mega timeline``: what each pipeline rank does when, as SVG and text, and the share of time in which it idles.

    With ``run=FOLDER`` what a training ran, recorded with ``profile=true``; else a simulation of ``pipeline=`` with given times.
    Of a run of ``r1mega rl`` when each sample was generated, judged and used, from its ledger, as a trace for Perfetto or Chrome
    (timeline.json in the run's folder).
    """

    run: str | None = knob(None, "folder of a run whose newest recorded step is drawn; null: simulate", "path")
    rollouts: int = knob(8, "newest rollouts of an rl run that are in its trace; 0: all", "rollouts", **at_least(0))
    pipeline: Any = knob(None, "registered choice: the schedule to simulate; None in Python: 1f1b", "choice")
    ranks: int = knob(4, "pipeline ranks to simulate", "ranks", **at_least(1))
    microbatches: int = knob(8, "microbatches of the simulated step", "microbatches", **at_least(1))
    forward: float = knob(1.0, "time of one forward of a stage", "ms", **at_least(0))
    input_grad: float = knob(1.0, "time of one gradient of a stage's input", "ms", **at_least(0))
    weight_grad: float = knob(1.0, "time of the gradients of a stage's weights, once a microbatch", "ms", **at_least(0))
    backward: float | None = knob(None, "time of one whole backward; null: input_grad + weight_grad", "ms", **at_least(0))
    overlapped: float | None = knob(
        None,
        "time of a forward and a backward that the schedule overlaps (F&B); null: they run one after the other",
        "ms",
        **at_least(0),
    )
    message: float = knob(0.0, "time from the end of a stage's work until another rank has the result", "ms", **at_least(0))
    target: str | None = knob(None, "the SVG file; null: timeline.svg in the run's folder, or in out", "path")

    def __post_init__(self) -> None:
        if self.pipeline is None:
            self.pipeline = registry.lookup("pipeline", "1f1b")()


@dataclass
class LineageConfig(RunConfig):
    """``r1mega lineage``: where a checkpoint comes from, back to fresh weights or to a published checkpoint.

    One line an ancestor: command, step, tokens, digest, verified, changed or gone, and where it lies. Exit status 2 where one that
    is still on disk has changed. Also for an export (its ``r1mega.json``) and for a run's folder (its newest checkpoint).
    """

    checkpoint: str = knob(REQUIRED, "a checkpoint, a run or an export", "path")
    hashes: bool = knob(True, "read every file of the ancestors on disk; false: only the digests of their manifests", "bool")
    json: bool = knob(False, "print one JSON object instead of the table", "bool")


@dataclass
class WhyConfig(RunConfig):
    """``r1mega why``: where the tokens of a rollout came from, by the ledger of an ``r1mega rl`` run.

    With ``step=N`` the samples that rollout N was trained on: problem, weights that drew them, rewards, advantage, update. With
    ``sample=ID`` one of them with its text. With neither the run's lineage: its starts, returns and rollouts, and whether each
    sample was used exactly once; exit status 1 where that does not hold.
    """

    run: str = knob(REQUIRED, "folder of an r1mega rl run", "path")
    step: int | None = knob(None, "a rollout; null: the lineage of all", "rollout", **at_least(1))
    sample: str | None = knob(None, "a sample's id, as step= shows it", "id")
    json: bool = knob(False, "print one JSON object instead of tables", "bool")
