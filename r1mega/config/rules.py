"""Rules of a whole config: every knob's own, then those across sections. Touches no file and imports no torch.

In: a command's dataclass. Out: nothing, or one UserError with a line a broken rule: ``key: rule; got value; way out``, where the
way out names the nearest values that keep the rule.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import typing
from collections.abc import Iterator
from typing import Any

from r1mega import registry
from r1mega.config.bench import BenchConfig
from r1mega.config.errors import UserError, Violation, nearest
from r1mega.config.knob import REQUIRED
from r1mega.config.launch_rules import launch_violations
from r1mega.config.model import ModelConfig
from r1mega.config.model_rules import divisors, model_violations, multiples, near
from r1mega.config.parallel_rules import (
    batch_violations,
    choice_violations,
    data_ranks,
    layout_violations,
    length_violations,
    num_stages,
    whole_model_violations,
    world_size,
)
from r1mega.config.precision_rules import bench_violations, precision_violations, row_violations, width_violations
from r1mega.config.rl import ChatConfig, EvalConfig, ExportConfig, RewardConfig, RlConfig
from r1mega.config.run import ComputeConfig, LogConfig, ParallelConfig
from r1mega.config.runtime_rules import runtime_violations
from r1mega.config.saving_rules import export_violations
from r1mega.config.schema import plain_type
from r1mega.config.train import TUNABLE_MODEL_FIELDS, OptimConfig, PretrainConfig, SftConfig

LARGEST = 2**63 - 1
"""Of whole numbers: what torch takes as a seed or a size."""

_PATHS = {list: "[PATH]", dict: "{PATH: 1}"}


def check(config: Any) -> None:
    """Raise UserError, one line a broken rule of ``config``; rules across sections wait until each field is right."""
    found = list(field_violations(config)) or list(cross_violations(config))
    if found:
        raise UserError("\n".join(map(str, found)))


def field_violations(config: Any, prefix: str = "") -> Iterator[Violation]:
    """Broken rules of single knobs, nested sections, choices and mappings of sections included."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        rule = field.metadata.get("rule")
        if dataclasses.is_dataclass(value):
            yield from field_violations(value, f"{path}.")
        elif isinstance(value, dict):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from field_violations(item, f"{path}.{name}.")
        elif isinstance(value, int) and abs(value) > LARGEST:
            yield Violation(path, f"a whole number of at most {LARGEST}", shown_number(value), hint=f"give a smaller {path}")
        elif field.metadata.get("unit", "").partition(":")[0] == "path" and _has_blank(value):
            yield Violation(path, "a path", "''", hint=f"give {path}={_PATHS.get(type(value), 'PATH')}")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Violation(path, "a finite number", value, hint=f"give a number ({field.metadata.get('unit')})")
        elif value is None:
            if field.name in registry.KINDS and field.metadata.get("unit") == "choice":
                names = sorted(registry.choices(field.name))
                yield Violation(path, "a choice is needed", "null", hint=f"give one of {', '.join(names)}")
            elif not plain_type(hints[field.name])[1] and hints[field.name] is not Any:
                yield Violation(path, "a value is needed", "null", hint=f"give {path}=VALUE")
        elif rule is not None and not rule(value):
            usual = field.default
            fixes = ((path, (usual,)),) if usual not in (dataclasses.MISSING, REQUIRED, None) and rule(usual) else ()
            says = field.metadata["says"]
            yield Violation(path, says, value, fixes, "" if fixes else f"use a value {says}")


def _has_blank(value: Any) -> bool:
    """True for an empty text of a path knob, which would stand for the working folder."""
    return any(isinstance(item, str) and not item.strip() for item in ([value] if isinstance(value, str) else value or ()))


def shown_number(value: int) -> str:
    """A large number; Python writes out none of more than some thousand digits."""
    return str(value) if abs(value) < 10**40 else f"one of about {value.bit_length() * 3 // 10} digits"


def cross_violations(config: Any) -> Iterator[Violation]:
    """Broken rules between sections, for whichever sections the command has."""
    if isinstance(config, ComputeConfig):
        yield from launch_violations(config)
        yield from layout_violations(config)
        yield from precision_violations(config)
        if config.precision.fp32_head and not isinstance(config, RlConfig):
            rule = "false but for rl, whose log-probabilities it is for"
            yield Violation("precision.fp32_head", rule, "true", (("precision.fp32_head", (False,)),))
        yield from _log(config.log)
    if isinstance(config, BenchConfig):
        yield from _bench(config)
    if isinstance(config, PretrainConfig | SftConfig):
        yield from choice_violations(config)
    if isinstance(config, PretrainConfig):
        yield from _cut(config, config.model)
        yield from _length("data.sequence_length", config.data.sequence_length, config.model)
    if isinstance(config, SftConfig | RlConfig):
        yield from _tunable(config.model)
    if isinstance(config, PretrainConfig | SftConfig):
        yield from _blend(config)
        yield from length_violations(config)
        yield from batch_violations(config)
        yield from _schedule(config.optim, config.trainer.steps, "trainer.steps")
        yield from export_violations("trainer", config.trainer)
    if isinstance(config, RlConfig):
        yield from runtime_violations(config)
        yield from _loop(config)
        yield from _algorithm(config)
        yield from export_violations("rl", config.rl)
        yield from _rewards(config.reward)
        updates = config.rl.rollouts * config.rl.updates_per_rollout
        yield from _schedule(config.optim, updates, "rl.rollouts x rl.updates_per_rollout")
    if isinstance(config, RlConfig | EvalConfig):
        yield from _reward_options(config.reward.options)
    if isinstance(config, EvalConfig):
        yield from _verifiers(config)
    if isinstance(config, RlConfig | EvalConfig | ChatConfig | ExportConfig):
        yield from whole_model_violations(config)
    if isinstance(config, ChatConfig) and world_size(config) > 1:
        yield Violation("launch.processes", "1, a conversation has one terminal", world_size(config), (("launch.processes", (1,)),))


def _bench(config: BenchConfig) -> Iterator[Violation]:
    """What is measured against what it is measured with; with ``peer`` both have to be there."""
    for key, given, benches in (("peer", config.peer, ("moe", "step")), ("routed_only", config.routed_only, ("moe",))):
        if given and config.bench not in benches:
            rule = f"false but for bench={' and '.join(benches)}"
            yield Violation(key, rule, "true", ((key, (False,)), ("bench", benches)))
    if config.bench == "ops":
        return
    precision, alone = config.precision, ParallelConfig()
    yield from model_violations(config.model, alone, 1)
    yield from bench_violations(config.device, precision, config.model)
    if config.peer and precision.products != "fp8":
        rule = "false but for precision=fp8, which the peer's is compared with"
        yield Violation("peer", rule, "true", (("peer", (False,)), ("precision", ("fp8",))))
    if config.bench == "step":
        yield from _length("sequence_length", config.sequence_length, config.model)
    if precision.products != "te" and not config.peer:
        return
    if config.peer and precision.products == "fp8":
        yield from width_violations(dataclasses.replace(precision, products="te"), config.model, alone)
    if config.bench == "step":
        yield from row_violations("sequence_length", config.sequence_length, alone, config.micro_batch_size, "micro_batch_size")
    elif not config.routed_only:
        yield from row_violations("tokens", config.tokens, alone)


def check_cut(config: PretrainConfig | SftConfig | RlConfig, model: ModelConfig) -> None:
    """Raise UserError, a line each, where ``model`` (of a checkpoint: no rule has seen it yet) cannot be cut as ``config`` says."""
    found = list(_cut(config, model))
    if found:
        raise UserError("\n".join(map(str, found)))


def _cut(config: PretrainConfig | SftConfig | RlConfig, model: ModelConfig) -> Iterator[Violation]:
    parallel, world = config.parallel, world_size(config)
    if parallel.pipeline > world:  # layout_violations tells it; the stages come after that
        parallel = dataclasses.replace(parallel, pipeline=1, stages=None)
    try:
        chooses = hasattr(config, "pipeline")  # rl has one stage a rank
        stages = num_stages(dataclasses.replace(config, parallel=parallel)) if chooses else parallel.pipeline
    except UserError:  # choice_violations tells it
        stages = parallel.pipeline
    yield from model_violations(model, parallel, world, stages)
    yield from width_violations(config.precision, model, parallel)


def _length(where: str, length: int, model: ModelConfig) -> Iterator[Violation]:
    longest = model.max_position_embeddings
    if length > longest:
        yield Violation(where, f"at most model.max_position_embeddings {longest}", length, ((where, (longest,)),))


def _blend(config: PretrainConfig | SftConfig) -> Iterator[Violation]:
    if not config.data.train:
        yield Violation(
            "data.train", "at least one token file with its weight", "none", hint="give data.train={PATH:1}, PATH without suffix"
        )
    for name, weight in config.data.train.items():
        if not weight > 0 or not math.isfinite(weight):
            yield Violation(
                "data.train", f"a weight above 0 for {name}", weight, hint="give a positive weight or leave the file out"
            )


def _schedule(optim: OptimConfig, steps: int, what: str) -> Iterator[Violation]:
    """``steps``: optimizer steps of the run, which ``what`` gives."""
    if optim.decay != "constant" and optim.min_lr > optim.lr:
        fixes = (("optim.min_lr", (optim.lr / 10,)), ("optim.decay", ("constant",)))
        yield Violation("optim.min_lr", f"at most optim.lr {optim.lr}", optim.min_lr, fixes)
    if optim.warmup_steps > steps:
        yield Violation(
            "optim.warmup_steps",
            f"at most the run's {steps} steps ({what})",
            optim.warmup_steps,
            (("optim.warmup_steps", (steps // 10,)),),
        )
    elif optim.decay != "constant" and optim.warmup_steps + optim.constant_steps > steps:
        rule = f"with warmup_steps {optim.warmup_steps} at most the run's {steps} steps ({what}), so that the decay can end with it"
        fixes = (("optim.constant_steps", (steps - optim.warmup_steps,)), ("optim.decay", ("constant",)))
        yield Violation("optim.constant_steps", rule, optim.constant_steps, fixes)


def _log(log: LogConfig) -> Iterator[Violation]:
    """W&B is there when it is wanted; a folder of that name in the working directory, where it keeps its own files, is not it."""
    found = importlib.util.find_spec("wandb") if log.wandb else None
    if log.wandb and (found is None or found.origin is None):
        hint = "or pip install 'r1mega[wandb]'"
        yield Violation("log.wandb", "the package wandb is installed", "no such package", (("log.wandb", (False,)),), hint)


def _loop(config: RlConfig) -> Iterator[Violation]:
    """One rollout cut into updates and ranks."""
    r, ranks = config.rl, data_ranks(config)
    if not ranks:
        return
    if r.prompts_per_rollout % ranks:
        fixes = (("rl.prompts_per_rollout", multiples(ranks, r.prompts_per_rollout)),)
        yield Violation("rl.prompts_per_rollout", f"a multiple of the {ranks} data ranks", r.prompts_per_rollout, fixes)
        return
    responses, parts = r.prompts_per_rollout * r.group_size, r.updates_per_rollout * ranks
    if responses % parts:
        rule = f"divides the {responses} responses of a rollout (prompts_per_rollout x group_size) over {ranks} data ranks"
        fixes = (("rl.updates_per_rollout", near(divisors(responses // ranks), r.updates_per_rollout)),)
        yield Violation("rl.updates_per_rollout", rule, r.updates_per_rollout, fixes)
    servers = registry.name_of("engine", config.engine) == "sglang" and not config.engine.url
    if servers and config.launch.hosts > 1 and config.runtime.kind == "local":
        rule = "servers that every host reaches, with launch.hosts above 1: ours listen on one host alone"
        yield Violation("engine.url", rule, "null", hint="give engine.url=URL of servers, or use runtime=ray")
    if servers and config.engine.memory_saver and (r.lag or r.oversample > 1):
        rule = "false with rollouts that run ahead: servers cannot sleep while they generate"
        yield Violation("engine.memory_saver", rule, "true", (("engine.memory_saver", (False,)), ("rl.lag", (0,))))
    if r.sampling.temperature == 0:
        rule = "above 0, the likeliest token has no probability to learn from"
        yield Violation("rl.sampling.temperature", rule, 0, (("rl.sampling.temperature", (1.0,)),))


def _algorithm(config: RlConfig) -> Iterator[Violation]:
    """Lengths, rewards and bounds that the loss and what comes before it name."""
    r, longest = config.rl, config.rl.sampling.max_new_tokens
    if r.overlong.cache_tokens > longest:
        fixes = (("rl.overlong.cache_tokens", (longest // 5,)),)
        yield Violation("rl.overlong.cache_tokens", f"at most rl.sampling.max_new_tokens {longest}", r.overlong.cache_tokens, fixes)
    names = {"reward", *config.reward.weights}
    names.update(name for own in config.reward.by_source.values() if isinstance(own, dict) for name in own)
    by = r.dynamic_sampling.by
    if by and by not in names:
        hint = f"{nearest(by, names)}use one of {', '.join(sorted(names))}, or rl.dynamic_sampling.by='' for none"
        yield Violation("rl.dynamic_sampling.by", "a reward of the run, or reward, their sum", repr(by), hint=hint)
    if r.valid.every and r.valid.problems is None:
        hint = "or give rl.valid.problems=FILE"
        yield Violation("rl.valid.every", "0 without held-out problems", r.valid.every, (("rl.valid.every", (0,)),), hint)
    if r.valid.problems is not None and not r.valid.every:
        fixes = (("rl.valid.every", (10,)), ("rl.valid.problems", ("null",)))
        yield Violation("rl.valid.every", "above 0 with held-out problems", 0, fixes)
    weights = [own for own in (config.reward.weights, *config.reward.by_source.values()) if isinstance(own, dict)]
    if r.valid.every and any(r.valid.verifier not in own for own in weights):
        everywhere = sorted(names.intersection(*weights))
        hint = f"{nearest(r.valid.verifier, everywhere)}use one of {', '.join(everywhere)}; weight 0 makes one count nothing"
        yield Violation("rl.valid.verifier", "a reward of the problems of every source", r.valid.verifier, hint=hint)
    distill = getattr(config.policy_loss, "distill_coef", None)
    if distill and config.teacher is None:
        hint = "or give teacher=CHECKPOINT"
        yield Violation("policy_loss.distill_coef", "0 without a teacher", distill, (("policy_loss.distill_coef", (0.0,)),), hint)
    if distill == 0 and config.teacher is not None:
        fixes = (("teacher", ("null",)), ("policy_loss.distill_coef", (1.0,)))
        yield Violation("teacher", "null where policy_loss.distill_coef is 0", config.teacher, fixes)
    if r.routing_replay == "r3" and not getattr(config.engine, "routed_experts", False):
        fixes = (("engine.routed_experts", (True,)), ("rl.routing_replay", ("r2", "none")))
        rule, hint = "r2 or none where the engine does not tell its experts", ""
        if not hasattr(config.engine, "routed_experts"):
            fixes, hint = fixes[1:], "or an engine with routed_experts: local, sglang"
        yield Violation("rl.routing_replay", rule, "r3", fixes, hint)
    low, high = (getattr(config.policy_loss, f"correction_{side}", None) for side in ("low", "high"))
    if getattr(config.policy_loss, "correction", None) == "mask" and low > high:
        rule = f"with correction=mask at most policy_loss.correction_high {high}"
        yield Violation("policy_loss.correction_low", rule, low, (("policy_loss.correction_low", (high / 4,)),))


def _rewards(reward: RewardConfig) -> Iterator[Violation]:
    """Every reward that is named with a weight is there, and its weight is a number."""
    places = {"reward.weights": reward.weights, **{f"reward.by_source[{name}]": own for name, own in reward.by_source.items()}}
    for place, weights in places.items():
        give = "reward.weights={accuracy:1}" if place == "reward.weights" else "reward.by_source={PATTERN:{accuracy:1}}"
        if not isinstance(weights, dict) or not weights:
            got = "none" if isinstance(weights, dict) else repr(weights)
            yield Violation(place, "at least one reward with its weight", got, hint=f"give {give}")
            continue
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                yield Violation(place, f"a finite number as the weight of {name}", repr(weight), hint=f"give {give}")
            yield from _reward_faults(place, name)


def _reward_faults(place: str, name: str) -> Iterator[Violation]:
    """Why ``name`` is no reward: neither registered, nor a dotted path to a dataclass or a function."""
    known = registry.choices("reward")
    if "." in name:
        try:
            cls = registry.lookup("reward", name)
        except UserError as error:
            way = f"{error.__cause__}, check PYTHONPATH and the name" if error.__cause__ else "write {MODULE.CLASS: 1}"
            yield Violation(place, "a dotted reward is imported", repr(name), hint=way)
        else:
            is_class = isinstance(cls, type)
            if not (dataclasses.is_dataclass(cls) and hasattr(cls, "build") if is_class else callable(cls)):
                rule = "a reward is a frozen dataclass with build(), or a function of a problem and a response"
                yield Violation(place, rule, repr(name), hint="add @dataclass(frozen=True) and build")
    elif name not in known:
        yield Violation(
            place, "a registered reward", repr(name), hint=f"{nearest(name, known)}use one of {', '.join(sorted(known))}"
        )


def _verifiers(config: EvalConfig) -> Iterator[Violation]:
    """What says whether a response is correct is a reward."""
    yield from _reward_faults("verifier", config.verifier)
    for pattern, name in config.verifier_by_source.items():
        yield from _reward_faults(f"verifier_by_source[{pattern}]", str(name))


def _reward_options(options: dict[str, Any]) -> Iterator[Violation]:
    """Options are knobs of a reward that is there, with values that keep their rules."""
    for name, knobs in options.items():
        place = f"reward.options.{name}"
        faults = list(_reward_faults("reward.options", name))
        if faults:
            yield from faults
            continue
        cls = registry.lookup("reward", name)
        known = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        if not isinstance(knobs, dict):
            yield Violation(
                place, "knobs with their values", repr(knobs), hint=f"use {', '.join(known) or 'none, it has no knobs'}"
            )
            continue
        for knob, value in knobs.items():
            if knob not in known:
                hint = f"{nearest(knob, known)}use one of {', '.join(known)}" if known else f"it has none, leave {place} out"
                yield Violation(place, "a knob of the reward", repr(knob), hint=hint)
                continue
            usual, rule = known[knob].default, known[knob].metadata.get("rule")
            kind = (int, float) if type(usual) is float else type(usual)
            if usual in (dataclasses.MISSING, None):
                continue
            if not isinstance(value, kind) or isinstance(value, bool) is not isinstance(usual, bool) or (rule and not rule(value)):
                says = known[knob].metadata.get("says") or f"a value like {usual!r}"
                yield Violation(f"{place}.{knob}", says, repr(value), ((f"{place}.{knob}", (usual,)),))


def _tunable(model: dict[str, Any]) -> Iterator[Violation]:
    """What a run from a checkpoint changes of its model: only fields that alter no weight, with values that keep their rules."""
    known = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for name, value in model.items():
        path = f"model.{name}"
        if name not in TUNABLE_MODEL_FIELDS:
            rule = "a field that alters no weight, the checkpoint decides the others"
            hint = f"{nearest(name, TUNABLE_MODEL_FIELDS)}use one of {', '.join(TUNABLE_MODEL_FIELDS)}"
            yield Violation(path, rule, value, hint=hint)
            continue
        field = known[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not field.metadata["rule"](value):
            yield Violation(path, f"a number, {field.metadata['says']}", repr(value), ((path, (field.default,)),))
