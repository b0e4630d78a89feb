"""The commands as Python functions, and the one place that runs a command: compose, check, start ranks, save the config, call.

In: overrides as on the command line, or a ready config. Out: what the command's function returns. Nothing heavy is imported before
the config and its input files are checked.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import sys
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from r1mega import provenance
from r1mega.config import rules
from r1mega.config.environment import check_ranks
from r1mega.config.errors import UserError, nearest
from r1mega.config.launch_rules import num_processes
from r1mega.config.paths import check_paths
from r1mega.config.rl import ProblemDataConfig
from r1mega.config.run import ComputeConfig
from r1mega.config.schema import schema
from r1mega.files import View, quoted
from r1mega.launch.local import RESULT_VARIABLE
from r1mega.launch.start import start, starts
from r1mega.train import manifest


@dataclasses.dataclass(frozen=True)
class Command:
    """``target``: "module:function"; ``all_ranks``: every rank calls it, else rank 0; ``saves``: the config goes to ``out``."""

    target: str
    about: str
    all_ranks: bool = True
    saves: bool = True

    def load(self) -> Any:
        """Import the function."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        "r1mega.data.prepare:prepare", "text and problems to tokenizer, token files and problem files", all_ranks=False
    ),
    "pretrain": Command("r1mega.train.pretrain:pretrain", "next-token training from token files"),
    "sft": Command("r1mega.train.sft:sft", "training on the answers alone"),
    "rl": Command("r1mega.rl.loop:rl", "reinforcement learning with verifiable rewards: GRPO and its kin"),
    "eval": Command("r1mega.eval.evaluate:evaluate", "pass@1 of a checkpoint on problems"),
    "export": Command("r1mega.train.export:export", "a checkpoint as a Hugging Face model", all_ranks=False),
    "convert": Command(
        "r1mega.train.convert.run:convert", "a checkpoint from Hugging Face's format or into it", all_ranks=False, saves=False
    ),
    "recipe": Command("r1mega.recipe.run:recipe", "stages as a graph, from text to a reasoning model"),
    "report": Command("r1mega.report.page:report", "one HTML page of a run", all_ranks=False, saves=False),
    "compare": Command(
        "r1mega.report.compare:compare", "what differs between runs, and their curves", all_ranks=False, saves=False
    ),
    "chat": Command("r1mega.eval.chat:chat", "talk to a checkpoint", saves=False),
    "timeline": Command(
        "r1mega.report.timeline:timeline",
        "what each rank of a pipeline, or each sample of an rl run, does when",
        all_ranks=False,
        saves=False,
    ),
    "lineage": Command(
        "r1mega.train.lineage:lineage", "where a checkpoint comes from, each ancestor by its hash", all_ranks=False, saves=False
    ),
    "why": Command("r1mega.report.why:why", "where the tokens of an rl run's rollout came from", all_ranks=False, saves=False),
    "autopsy": Command(
        "r1mega.rl.autopsy.command:autopsy", "why engine and trainer disagreed in a rollout", all_ranks=False, saves=False
    ),
    "bench": Command("r1mega.testing.measure.run:bench", "ops, a MoE layer or a training step, measured", all_ranks=False),
    "doctor": Command("r1mega.doctor.report:doctor", "what is here and usable, what is missing", all_ranks=False, saves=False),
    "completion": Command(
        "r1mega.config.completion:completion", "a script that completes the command line", all_ranks=False, saves=False
    ),
}
"""The table of commands; their configs are in :data:`r1mega.config.schema.SCHEMAS`."""


def run(command: str, overrides: Iterable[str] | Any = ()) -> Any:
    """Run ``command`` and return its result.

    ``overrides``: ``group=choice`` and ``key=value`` texts, or the command's config. With ``launch.processes`` above 1, and no
    ranks started by somebody else, this process starts the ranks and returns rank 0's result. Raises UserError for anything wrong
    with config or input files, before torch is imported; :class:`r1mega.launch.local.LaunchError` where a rank fails.
    """
    view, arguments, choices = _viewed(command, overrides, begin=True)
    entry, config = COMMANDS[command], view.config
    if "RANK" not in os.environ and starts(config):
        return _run_ranks(command, arguments, config, view.env)
    is_first = int(os.environ.get("RANK", "0")) == 0
    if not is_first and not entry.all_ranks:
        return None
    if entry.all_ranks and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ:
        from r1mega.device import open_device
        from r1mega.mesh.rendezvous import agree_on_config

        open_device(config.device)  # a device that is not here is told at once, not after the other ranks have come
        agree_on_config(view.given)
    if is_first and entry.saves:
        from r1mega.config.compose import save_config

        _tell_changes(view.given, config.out)
        save_config(view.given, config.out, overrides=arguments or (), choices=choices)
        provenance.record(view.given, config.out, command, arguments)
    result_file = os.environ.pop(RESULT_VARIABLE, None)
    with view:
        if entry.all_ranks and isinstance(config, ComputeConfig) and command != "recipe":  # which checks its stages first
            from r1mega.compat import megatron_jit

            megatron_jit.apply()
        result = view.finish(entry.load()(config))
    if is_first and result_file:
        Path(result_file).write_bytes(pickle.dumps(result))
    return result


def checked(command: str, overrides: Iterable[str] | Any = ()) -> tuple[Any, tuple[str, ...] | None, dict[str, str]]:
    """The config of ``command`` with its rules, input files and checkpoints checked; the overrides (None of a ready config) and the
    group choices that it came from. ``overrides`` and UserError: as of :func:`run`. Writes nothing but copies of remote inputs.
    """
    view, arguments, choices = _viewed(command, overrides, begin=False)
    return view.given, arguments, choices


def _viewed(command: str, overrides: Iterable[str] | Any, *, begin: bool) -> tuple[View, tuple[str, ...] | None, dict[str, str]]:
    """As :func:`checked`, with the config's view. ``begin``: what a run at a URL goes on from is fetched and checked too."""
    cls = schema(command)
    check_ranks()
    from r1mega.config.compose import composition, resolved

    if dataclasses.is_dataclass(overrides):
        if type(overrides) is not cls:
            raise UserError(
                f"{command}: a {cls.__name__}; got {type(overrides).__name__}; make it with compose({command!r}, overrides)"
            )
        config, arguments, choices = resolved(overrides), None, {}
    else:
        made = composition(command, map(quoted, overrides))
        config, arguments, choices = made.config, made.overrides, made.choices
    rules.check(config)
    view = View(config, saves=COMMANDS[command].saves)
    with view:
        check_paths(view.config)
        _check_problems(view.config)
        if begin:
            view.begin()
        _check_checkpoints(command, view.config)
    return view, arguments, choices


def _check_problems(config: Any) -> None:
    """Read a problem file, which raises UserError with the number of a bad line, before the command imports torch."""
    if isinstance(getattr(config, "data", None), ProblemDataConfig):
        from r1mega.data.problems import load_problems

        problems = load_problems(config.data.problems, limit=config.data.limit)
        held_out = getattr(getattr(config, "rl", None), "valid", None)
        if held_out is not None and held_out.every:
            problems = problems + load_problems(held_out.problems, limit=held_out.limit)
        sources = {problem.source for problem in problems}
        for pattern in config.reward.by_source:
            if not any(fnmatchcase(source, pattern) for source in sources):
                raise UserError(
                    f"reward.by_source: a pattern matches the source of a problem; got {pattern!r}, which matches none; "
                    f"{nearest(pattern, sources)}the sources are {', '.join(sorted(sources)[:5])}"
                )


def _check_checkpoints(command: str, config: Any) -> None:
    """Is there a checkpoint to start from, is the one to go on from this command's and of this model? Before torch is imported."""
    given = getattr(config, "init", None) or getattr(config, "checkpoint", None)
    if given is not None and command != "lineage":  # which also looks at exports
        model = manifest.read_model(given)
        if command == "sft":
            rules.check_cut(config, model)
    if command in ("pretrain", "sft", "rl"):
        held = manifest.latest_readable(Path(config.out) / "checkpoints")
        if held is not None:
            manifest.check_same_command(command, held)
            if command == "pretrain":
                manifest.check_same_model(config.model, held)


def _tell_changes(config: Any, folder: str) -> None:
    """On stderr, a line a key: what a run that goes on does from now on otherwise. How it is started and shown is not told."""
    from r1mega.config.compose import load_config

    if manifest.latest(Path(folder) / "checkpoints") is None:
        return
    try:
        before = _flat(dataclasses.asdict(load_config(folder)))
    except (UserError, OSError):  # the config of another version, or none
        return
    for key, value in _flat(dataclasses.asdict(config)).items():
        if (
            key in before
            and before[key] != value
            and key.partition(".")[0] not in ("launch", "runtime", "log", "profile", "nvtx", "debug", "out", "name")
        ):
            print(f"going on with {key}={value}, which was {before[key]} until here", file=sys.stderr)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _run_ranks(command: str, arguments: Iterable[str] | None, config: ComputeConfig, env: dict[str, str]) -> Any:
    """Start ``python -m r1mega`` with the same arguments once a rank; rank 0's result where it ran here, else None."""
    if arguments is None:
        raise UserError(
            f"launch.processes: 1 for a ready config, which runs in this process; got {num_processes(config.launch)} (launch.kind "
            f"{config.launch.kind}); give overrides as "
            "text, or start the script under torchrun"
        )

    package_parent = str(Path(__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory(prefix="r1mega-") as folder:
        result_file = Path(folder) / "result.pickle"
        env = {**env, "PYTHONPATH": search, RESULT_VARIABLE: str(result_file)}
        start(command, arguments, config, env)
        return pickle.loads(result_file.read_bytes()) if result_file.exists() else None  # from our own rank 0


def _call(command: str, overrides: tuple[Any, ...]) -> Any:
    return run(command, overrides[0] if len(overrides) == 1 and dataclasses.is_dataclass(overrides[0]) else overrides)


def prepare(*overrides: Any) -> Any:
    """Text and problems to tokenizer, token files and problem files; overrides as texts, or one PrepareConfig."""
    return _call("prepare", overrides)


def pretrain(*overrides: Any) -> Any:
    """Next-token training: ``pretrain("model=tiny", "trainer.steps=10", "data.train={text:1}")``, or one PretrainConfig."""
    return _call("pretrain", overrides)


def sft(*overrides: Any) -> Any:
    """Training on the answers alone, from a checkpoint; overrides as texts, or one SftConfig."""
    return _call("sft", overrides)


def rl(*overrides: Any) -> Any:
    """Reinforcement learning from a checkpoint: ``rl("init=...", "data.problems=...", "rl.rollouts=50")``, or one RlConfig."""
    return _call("rl", overrides)


def eval(*overrides: Any) -> Any:  # noqa: A001 - the command's name
    """pass@1 of a checkpoint on problems; overrides as texts, or one EvalConfig."""
    return _call("eval", overrides)


def export(*overrides: Any) -> Any:
    """A checkpoint as a Hugging Face model; overrides as texts, or one ExportConfig."""
    return _call("export", overrides)


def recipe(*overrides: Any) -> Any:
    """A whole recipe: ``recipe("recipe=quickstart")``, or one RecipeConfig."""
    return _call("recipe", overrides)


def report(*overrides: Any) -> Any:
    """One HTML page of a run: ``report("run=runs/quickstart")``, or one ReportConfig."""
    return _call("report", overrides)


def compare(*overrides: Any) -> Any:
    """What differs between runs: ``compare("run=runs/a", "run=runs/b")``, or one CompareConfig."""
    return _call("compare", overrides)


def chat(*overrides: Any) -> Any:
    """Talk to a checkpoint; overrides as texts, or one ChatConfig."""
    return _call("chat", overrides)


def convert(*overrides: Any) -> Any:
    """A checkpoint between Hugging Face's format and Megatron's: ``convert("source=A", "target=B")``, or one ConvertConfig."""
    return _call("convert", overrides)


def timeline(*overrides: Any) -> Any:
    """A schedule drawn: ``timeline("run=runs/x")`` or ``timeline("pipeline=zb1p", "ranks=4")``, or one TimelineConfig."""
    return _call("timeline", overrides)


def lineage(*overrides: Any) -> Any:
    """Where a checkpoint comes from: ``lineage("checkpoint=runs/x")``, or one LineageConfig."""
    return _call("lineage", overrides)


def why(*overrides: Any) -> Any:
    """Where a rollout's tokens came from: ``why("run=runs/x", "step=3")``, or one WhyConfig."""
    return _call("why", overrides)


def autopsy(*overrides: Any) -> Any:
    """Why engine and trainer disagreed: ``autopsy("run=runs/x", "step=12")``, or one AutopsyConfig."""
    return _call("autopsy", overrides)


def bench(*overrides: Any) -> Any:
    """What is fast and how fast: ``bench("bench=ops", "op=permute", "device=cuda")``, or one BenchConfig."""
    return _call("bench", overrides)


def doctor(*overrides: Any) -> Any:
    """What is here and usable, printed and as a dict with ``usable`` and ``checks``; overrides as texts, or one DoctorConfig."""
    return _call("doctor", overrides)


def completion(*overrides: Any) -> Any:
    """The script that completes r1mega's command line: ``completion("shell=zsh")``, or one CompletionConfig."""
    return _call("completion", overrides)
