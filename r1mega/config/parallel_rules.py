"""Rules of the layout: degrees against the processes, and the choices of dispatcher, pipeline and balance against the degrees.

In: a command's config whose fields keep their own rules. Out: Violations with the nearest values. Nothing here makes a process
group: a layout is refused before the first one. What needs the model is in :mod:`r1mega.config.model_rules`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator

from r1mega import registry
from r1mega.config.errors import UserError, Violation
from r1mega.config.launch_rules import num_processes
from r1mega.config.model import ModelConfig
from r1mega.config.model_rules import divisors, multiples, near, suits
from r1mega.config.rl import RlConfig
from r1mega.config.run import ComputeConfig, ParallelConfig
from r1mega.config.train import PretrainConfig, SftConfig

MOST_TRIED = 256
"""Numbers of microbatches for which a schedule from outside the package is asked for its actions before the run."""

LARGEST_TRIED = 16384
"""Of those numbers: its lists are long."""

DENSE, SPARSE = ("tensor", "pipeline", "context"), ("expert", "expert_tensor", "pipeline")
"""The same ranks are cut twice: for the experts, and for all else."""

Trained = PretrainConfig | SftConfig


def world_size(config: ComputeConfig) -> int:
    """Processes of the run: WORLD_SIZE where someone has started them, otherwise ``launch.processes`` on each host."""
    return int(os.environ.get("WORLD_SIZE") or num_processes(config.launch))


def data_ranks(config: ComputeConfig) -> int:
    """Ranks that see different data; 0 where the layout itself is wrong."""
    world, replica = world_size(config), _product(config.parallel, DENSE)
    return 0 if world % replica else world // replica


def stages_per_rank(config: Trained) -> int:
    """Model chunks that a pipeline rank holds: 1, or more where the schedule says so. Raises UserError as the schedule does."""
    return len(config.pipeline.build(config.parallel.pipeline).placement[0])


def num_stages(config: Trained) -> int:
    """Stages that the model is cut into. Raises UserError as the schedule does."""
    return config.parallel.pipeline * stages_per_rank(config)


def microbatch_step(config: Trained) -> int:
    """What a step's number of microbatches is a multiple of: the size by which a growing batch grows."""
    return _demand(config)[1]


def layout_violations(config: ComputeConfig) -> Iterator[Violation]:
    """Degrees against the number of processes."""
    p, world = config.parallel, world_size(config)
    hosts, key = config.launch.hosts, "launch.processes"
    source = "WORLD_SIZE" if os.environ.get("WORLD_SIZE") else key if hosts == 1 else f"launch.hosts x {key}"
    for axes in (DENSE, SPARSE):
        product = _product(p, axes)
        if world % product == 0:
            continue
        fixes = []
        for axis in axes:
            others, degree = product // getattr(p, axis), getattr(p, axis)
            if degree > 1 and world % others == 0:
                fixes.append((f"parallel.{axis}", near(_fitting(config, axis, divisors(world // others)), degree)))
        if source != "WORLD_SIZE":
            step = math.lcm(_product(p, DENSE), _product(p, SPARSE))
            fixes.append((key, multiples(step // math.gcd(step, hosts), config.launch.processes)))
        got = f"{' x '.join(str(getattr(p, axis)) for axis in axes)} = {product}"
        hint = "" if any(values for _, values in fixes) else f"start a multiple of {product} processes"
        yield Violation("parallel", f"{' x '.join(axes)} divides {source} {world}", got, tuple(fixes), hint)
        return


def _product(parallel: ParallelConfig, axes: tuple[str, ...]) -> int:
    return math.prod(getattr(parallel, axis) for axis in axes)


def _fitting(config: ComputeConfig, axis: str, degrees: tuple[int, ...]) -> tuple[int, ...]:
    """Those of ``degrees`` that mend both cuts of the ranks, for the model where the config has one."""
    model, world = getattr(config, "model", None), world_size(config)
    found = []
    for degree in degrees:
        changed = dataclasses.replace(config.parallel, **{axis: degree})
        divides = all(world % _product(changed, axes) == 0 for axes in (DENSE, SPARSE))
        if divides and (not isinstance(model, ModelConfig) or suits(model, axis, degree)):
            found.append(degree)
    return tuple(found)


def whole_model_violations(config: ComputeConfig) -> Iterator[Violation]:
    """A rank of these commands hands whole weights to its engine or its file; RL gathers them for that."""
    if isinstance(config, RlConfig):
        return
    for axis in ("tensor", "pipeline", "expert", "expert_tensor", "context"):
        degree, key = getattr(config.parallel, axis), f"parallel.{axis}"
        if degree != 1:
            yield Violation(key, "1, every rank of this command holds whole weights", degree, ((key, (1,)),))
    if config.parallel.stages is not None:
        key, rule = "parallel.stages", "null, every rank of this command holds all layers"
        yield Violation(key, rule, config.parallel.stages, ((key, ("null",)),))


def choice_violations(config: Trained) -> Iterator[Violation]:
    """Dispatcher, balance and pipeline against degrees, device and number format."""
    p = config.parallel
    dispatcher = registry.name_of("dispatcher", config.dispatcher)
    if dispatcher == "local":
        yield from _one("expert", p.expert, "dispatcher=local, whose tokens stay on their rank", ("dispatcher", "alltoall"))
    if dispatcher == "deepep":
        yield from _deepep(config)
    if dispatcher in ("local", "deepep"):
        why = f"dispatcher={dispatcher}, for which an expert is whole on its rank"
        yield from _one("expert_tensor", p.expert_tensor, why, ("dispatcher", "alltoall"))
    if registry.name_of("balance", config.balance) == "eplb":
        yield from _several_experts(config, "balance=eplb, which moves experts between ranks", ("balance", "none"))
    if registry.name_of("balance", config.balance) != "none":
        yield from _movable(config)
    if registry.name_of("pipeline", config.pipeline) == "none" and p.pipeline > 1:
        yield from _one("pipeline", p.pipeline, "pipeline=none, which cuts the model into no stages", ("pipeline", "1f1b"))
        return
    if p.pipeline > world_size(config):  # told by layout_violations; a schedule lists its ranks, which may be any number here
        return
    try:
        stages_per_rank(config)
    except UserError as error:
        yield from _as_violations(error, f"parallel.pipeline={p.pipeline}", "use pipeline=1f1b")


def _one(axis: str, degree: int, why: str, instead: tuple[str, str]) -> Iterator[Violation]:
    """``instead``: the kind of the choice that wants this, and another choice that does not."""
    if degree > 1:
        key, (kind, other) = f"parallel.{axis}", instead
        yield Violation(key, f"1 with {why}", degree, ((key, (1,)), (kind, (other,))))


def _movable(config: Trained) -> Iterator[Violation]:
    """Experts move by the load that the bias counts, at checkpoints."""
    name, instead = registry.name_of("balance", config.balance), ("balance", ("none",))
    if isinstance(config, PretrainConfig) and not config.model.use_expert_bias:
        key, rule = "model.use_expert_bias", f"true with balance={name}, whose load is what the bias counts"
        yield Violation(key, rule, "false", ((key, (True,)), instead))
    if not config.trainer.save_every:
        key, rule = "trainer.save_every", f"above 0 with balance={name}, which moves experts at checkpoints"
        yield Violation(key, rule, 0, ((key, (max(1, config.trainer.steps // 10),)), instead))


def _several_experts(config: Trained, why: str, instead: tuple[str, str]) -> Iterator[Violation]:
    p, key, (kind, other) = config.parallel, "parallel.expert", instead
    if p.expert == 1:
        degrees = _fitting(config, "expert", divisors(world_size(config) // (p.pipeline * p.expert_tensor))[1:])
        yield Violation(key, f"above 1 with {why}", 1, ((key, near(degrees, 2)), (kind, (other,))))


def _deepep(config: Trained) -> Iterator[Violation]:
    """What can be told without torch; whether package and hardware are there is told when the dispatcher is built."""
    instead = (("dispatcher", ("alltoall",)),)
    if config.device.kind != "cuda":
        rule, got = "deepep needs GPUs, device=cuda", f"deepep with device={config.device.kind}"
        yield Violation("dispatcher", rule, got, instead)
    elif config.precision.dtype != "bf16":
        rule, got = "deepep moves bf16, precision=bf16", f"deepep with precision={config.precision.dtype}"
        yield Violation("dispatcher", rule, got, (("precision.dtype", ("bf16",)), *instead))
    yield from _several_experts(config, "dispatcher=deepep, which moves tokens between GPUs", ("dispatcher", "alltoall"))


def batch_violations(config: Trained) -> Iterator[Violation]:
    """Global batch against micro batch, data ranks and schedule; the ramp's start too."""
    ranks, t, start = data_ranks(config), config.trainer, config.optim.batch_ramp_start
    if not ranks:
        return
    least, step = _demand(config)
    one = t.micro_batch_size * ranks
    words = f"trainer.micro_batch_size {t.micro_batch_size} x {ranks} data ranks"
    multiple = f"a multiple of {words}" + (f" x parallel.pipeline {step}, for pipeline=interleaved" if step > 1 else "")
    enough = f"at least {least} microbatches of {words}, for pipeline=dualpipev with parallel.pipeline {config.parallel.pipeline}"
    key, ramp = "trainer.global_batch_size", "optim.batch_ramp_start"

    def fitting(wanted: int) -> tuple[int, ...]:
        return tuple(size for size in multiples(one * step, wanted) if size >= one * least) or (one * least,)

    size = t.global_batch_size
    if size % (one * step) or size < one * least:
        fixes = ((key, fitting(size)), ("trainer.micro_batch_size", near(_micro_sizes(config, size, ranks), t.micro_batch_size)))
        yield Violation(key, multiple if size % (one * step) else enough, size, fixes)
    elif start > size:
        yield Violation(ramp, f"at most {key} {size}", start, ((ramp, (size,)),))
    elif start and (start % (one * step) or start < one * least):
        yield Violation(ramp, multiple if start % (one * step) else enough, start, ((ramp, fitting(start)[:1]),))
    elif _is_foreign(config):
        yield from _tried(config, (start or size) // one, size // one)
    if bool(start) != bool(config.optim.batch_ramp_steps):
        rule = "batch_ramp_start and batch_ramp_steps are both 0 or both above 0"
        got = f"{start} and {config.optim.batch_ramp_steps}"
        yield Violation(ramp, rule, got, ((ramp, (0,)),) if start else (("optim.batch_ramp_steps", (0,)),))


def _micro_sizes(config: Trained, size: int, ranks: int) -> tuple[int, ...]:
    """Micro batches into which a step of ``size`` sequences can be cut."""
    if size % ranks:
        return ()
    least, step = _demand(config)
    shares = {num: size // ranks // num for num in divisors(size // ranks)}
    return tuple(num for num, share in shares.items() if share % step == 0 and share >= least)


def _demand(config: Trained) -> tuple[int, int]:
    """The fewest microbatches of a step that the schedule can serve, and what their number is a multiple of."""
    num_ranks = config.parallel.pipeline
    demands = {"interleaved": (num_ranks, num_ranks), "dualpipev": (2 * num_ranks, 1)}
    return demands.get(registry.name_of("pipeline", config.pipeline), (1, 1))


def _is_foreign(config: Trained) -> bool:
    """True for a schedule from outside the package, whose demands are known to itself alone."""
    return type(config.pipeline).__module__.partition(".")[0] != "r1mega"


def _tried(config: Trained, first: int, last: int) -> Iterator[Violation]:
    """What a schedule from outside the package says about every number of microbatches that the run has."""
    try:
        schedule = config.pipeline.build(config.parallel.pipeline)
    except UserError:  # told by choice_violations
        return
    for num in sorted({last, *range(first, min(last, first + MOST_TRIED))} & set(range(LARGEST_TRIED + 1))):
        try:
            schedule.actions(num)
        except UserError as error:
            yield from _as_violations(error, f"{num} microbatches", "use another number, or pipeline=1f1b")
            return


def _as_violations(error: UserError, got: str, hint: str) -> Iterator[Violation]:
    """The lines of an error that a schedule raised; ``got`` and ``hint``: of a line that is not in the grammar."""
    for line in str(error).splitlines():
        parts = re.fullmatch(r"([^:]+): (.+); got (.+); (.+)", line)
        yield Violation(*parts.groups()[:3], hint=parts[4]) if parts else Violation("pipeline", line, got, hint=hint)


def length_violations(config: Trained) -> Iterator[Violation]:
    """The sequence against the ranks that share it: two chunks a context rank, so that causal work is even, cut by tensor ranks."""
    p, length = config.parallel, config.data.sequence_length
    step = p.tensor * (2 * p.context if p.context > 1 else 1)
    if length % step:
        rule = f"a multiple of {step}, which tensor and context parallel cut it into"
        yield Violation("data.sequence_length", rule, length, (("data.sequence_length", multiples(step, length)),))
