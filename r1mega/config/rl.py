"""Reinforcement learning with verifiable rewards, evaluation, and what both need: prompts, rewards, an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1mega import registry
from r1mega.config.convert import DTYPES, ConversionConfig
from r1mega.config.knob import REQUIRED, above, at_least, between, knob, one_of
from r1mega.config.run import ComputeConfig, SamplingConfig
from r1mega.config.train import EXPORT_DTYPES, OptimConfig

GROUP_BACKENDS = ("auto", "nccl", "gloo")
"""Of the process group between trainer and servers. NCCL refuses two ranks on one card: gloo, where they share it."""


@dataclass
class RewardConfig:
    """Which rewards, with which weights, under which limits.

    Each call runs in a process that is killed at its limit, with all that it started; it then counts 0 and the run goes on.
    """

    weights: dict[str, float] = knob(
        {"accuracy": 1.0, "format": 1.0},
        "reward (registered, or the dotted path of a class or function) to weight; the sum of weight x value is the reward; "
        "~reward.weights.NAME drops one of the preset's",
        "name: 1",
    )
    by_source: dict[str, Any] = knob(
        {},
        "weights for the problems of some sources, by shell-style pattern (reasoning_gym*, gsm8k): the first pattern that matches "
        "decides alone, weights are for the sources that none matches",
        "pattern: {name: 1}",
    )
    options: dict[str, Any] = knob({}, "knobs of rewards where they are not the defaults", "name: {knob: value}")
    timeout_seconds: float = knob(
        5.0, "longest time of one call, with all processes that it starts; code and judge have more", "seconds", **at_least(0.01)
    )
    memory_bytes: int = knob(2 << 30, "address space of each process of a reward", "bytes", **at_least(64 << 20))
    workers: int = knob(1, "reward processes of one rank", "processes", **at_least(1))


@dataclass
class OverlongConfig:
    """What becomes of responses near or at the longest length (DAPO, arXiv 2503.14476 3.4)."""

    cache_tokens: int = knob(
        0,
        "the last so many tokens before sampling.max_new_tokens lower the reward, in a line from 0 to -penalty; 0: no punishment",
        "tokens",
        **at_least(0),
    )
    penalty: float = knob(1.0, "what the reward of a response of the longest length is lowered by", "1", **at_least(0))
    mask_truncated: bool = knob(False, "responses cut off at max_new_tokens count in no baseline and no loss", "bool")


@dataclass
class DynamicSamplingConfig:
    """Prompts are drawn until enough groups have something to learn from (DAPO, arXiv 2503.14476 3.2)."""

    by: str = knob(
        "",
        "keep groups whose responses differ in this reward (accuracy: 0 < correct < group_size), or in reward, the sum of all; "
        "empty: keep every group",
        "name",
    )
    oversampling: int = knob(
        10,
        "most prompts drawn a rollout, as a multiple of prompts_per_rollout; then groups without anything to learn from fill it up",
        "1",
        **at_least(1),
    )


@dataclass
class DiffBudgetConfig:
    """How far the engine's log-probability of a token may be from the trainer's, over a rollout's tokens that the trainer's present
    weights drew; and what becomes of a rollout that is further away. Null limits are those of the number format, see
    :data:`r1mega.rl.autopsy.watch.USUAL`."""

    action: str = knob(
        "warn",
        "outside the budget: warn (an event, and evidence for r1mega autopsy), skip (also do not train on the rollout), stop; off: "
        "no look at all",
        "name",
        **one_of("warn", "skip", "stop", "off"),
    )
    mean: float | None = knob(None, "largest mean absolute difference; null: the format's", "nats", **above(0))
    max: float | None = knob(None, "largest difference of one token; null: the format's", "nats", **above(0))
    kl: float | None = knob(
        None,
        "largest mean of exp(d) - 1 - d, d = trainer - engine: KL(engine || trainer) by k3; null: the format's",
        "nats",
        **above(0),
    )
    stale_mean: float | None = knob(
        0.5, "largest mean absolute difference of tokens that older weights drew (lag, oversample); null: any", "nats", **above(0)
    )
    rows: int = knob(16, "responses kept as evidence by each data rank, those that differ most", "responses", **at_least(1))
    weights_bytes: int = knob(
        256 << 20, "the trainer's weights are kept with the evidence where they are no larger; 0: never", "bytes", **at_least(0)
    )
    keep: int = knob(4, "rollouts whose evidence a run keeps, the first ones", "rollouts", **at_least(1))


@dataclass
class ValidConfig:
    """Held-out problems during the run, before its first rollout too: pass@1 and response length over the rollouts."""

    every: int = knob(0, "rollouts between them; 0: never", "rollouts", **at_least(0))
    problems: str | None = knob(None, "JSONL of held-out problems; null: none", "path")
    limit: int = knob(0, "problems taken from the start of the file; 0: all", "problems", **at_least(0))
    samples: int = knob(1, "responses a problem", "responses", **at_least(1))
    temperature: float = knob(0.6, "of these responses; 0: the likeliest token", "1", **between(0, 10))
    verifier: str = knob("accuracy", "reward of the run whose value 1 means correct", "name")


@dataclass
class RolloutConfig:
    """The RL loop's sizes (R1: 32 x 16 an update, 16 updates a rollout, reference reset every 400 updates)."""

    rollouts: int = knob(REQUIRED, "rollouts of the run", "rollouts", **at_least(1))
    prompts_per_rollout: int = knob(32, "questions P a rollout, over all ranks", "prompts", **at_least(1))
    group_size: int = knob(16, "responses G a question", "responses", **at_least(2))
    updates_per_rollout: int = knob(
        1, "minibatches that one rollout is cut into, one optimizer step each", "updates", **at_least(1)
    )
    micro_batch_size: int = knob(32, "responses one forward pass of one rank", "responses", **at_least(1))
    sampling: SamplingConfig = knob(SamplingConfig, "how responses are drawn", "section")
    lag: int = knob(
        0,
        "rollouts that may be in the making while one is trained on, and so how many pushes old the weights are that a response is "
        "begun with, at most; 0: on-policy",
        "rollouts",
        **at_least(0),
    )
    oversample: float = knob(
        1.0,
        "groups begun as a multiple of those wanted; the first to end are taken, the others go on into the next rollout, one more "
        "push old (1: none, and groups are taken in the order of the questions)",
        "1",
        **at_least(1),
    )
    overlong: OverlongConfig = knob(OverlongConfig, "responses near the longest length", "section")
    dynamic_sampling: DynamicSamplingConfig = knob(DynamicSamplingConfig, "groups without anything to learn from", "section")
    routing_replay: str = knob(
        "none",
        "experts that tokens take: r3 the engine's in scoring and updates (engine.routed_experts=true), r2 in updates the "
        "trainer's own of the scoring pass, none what each pass chooses",
        "name",
        **one_of("none", "r2", "r3"),
    )
    valid: ValidConfig = knob(ValidConfig, "held-out problems during the run", "section")
    step_seconds: float = knob(
        60.0,
        "longest call of an environment, unless it asks for more; one that takes longer ends its episode alone",
        "seconds",
        **above(0),
    )
    ref_refresh_updates: int = knob(
        400, "updates between copies of the policy into the reference; 0: never", "updates", **at_least(0)
    )
    shuffle_rewards: bool = knob(False, "control: rewards permuted over the whole rollout, so that they carry no signal", "bool")
    on_spike: str = knob(
        "skip",
        "at a loss or gradient that is not finite: skip the update, rollback to the last checkpoint with other prompts, or stop",
        "name",
        **one_of("skip", "rollback", "stop"),
    )
    diff_budget: DiffBudgetConfig = knob(DiffBudgetConfig, "how far engine and trainer may differ", "section")
    log_every: int = knob(1, "rollouts between metric lines", "rollouts", **at_least(1))
    save_every: int = knob(0, "rollouts between checkpoints; 0: at the end only", "rollouts", **at_least(0))
    keep_last: int = knob(2, "newest checkpoints kept", "checkpoints", **at_least(1))
    keep_every: int = knob(
        0, "checkpoints of rollouts that are a multiple of it are kept for good; 0: none", "rollouts", **at_least(0)
    )
    async_save: bool = knob(True, "write checkpoints beside the rollouts, from a copy in host memory; false: stand still", "bool")
    export_every: int = knob(
        0,
        "rollouts between exports to out/exports as Hugging Face models, a multiple of save_every; 0: none",
        "rollouts",
        **at_least(0),
    )
    export_dtype: str = knob("bf16", "number format of these exports", "name", **one_of(*EXPORT_DTYPES))


@dataclass
class ProblemDataConfig:
    """Problems to train or evaluate on."""

    problems: str = knob(REQUIRED, "JSONL of problems", "path")
    limit: int = knob(0, "problems taken from the start of the file; 0: all", "problems", **at_least(0))


@dataclass
class RuntimeConfig:
    """Who holds the roles of ``r1mega rl``: trainer ranks and, with engine=sglang, its servers."""

    kind: str = knob(
        "local",
        "local: ranks of the launcher, servers as children of rank 0; ray: both as actors of a Ray cluster, launch.processes ranks "
        "on each of launch.hosts nodes (extra ray)",
        "name",
        **one_of("local", "ray"),
    )
    address: str = knob(
        "auto",
        "ray: the cluster, of which this machine is a node: HOST:PORT of its head; auto: the one that this machine has joined; "
        "local: one of this machine alone, for this run",
        "address",
    )
    placement: str = knob(
        "spread",
        "ray: where servers go: spread: on GPUs of their own, over the nodes; packed: the same on as few nodes as can be; "
        "colocated: on the trainer's GPUs (engine.memory_saver=true)",
        "name",
        **one_of("spread", "packed", "colocated"),
    )
    rank_cpus: int = knob(1, "ray: CPU cores of each rank, as Ray counts them", "cores", **at_least(1))
    server_cpus: int = knob(1, "ray: CPU cores of each server, as Ray counts them", "cores", **at_least(1))
    connect_seconds: float = knob(60.0, "ray: longest wait for the cluster to answer", "seconds", **at_least(1))
    wait_seconds: float = knob(
        300.0,
        "ray: longest wait for GPUs and cores that others use, and for a node in a lost one's place",
        "seconds",
        **at_least(1),
    )
    environment: dict[str, str] = knob({}, "ray: variables of all roles, beside their nodes' own", "name: value")


@dataclass
class RlConfig(ComputeConfig):
    """``r1mega rl``: GRPO and its kin, on-policy or running ahead."""

    model: dict[str, Any] = knob({}, "changes of the checkpoint's training fields (TUNABLE_MODEL_FIELDS)", "field: value")
    init: str = knob(REQUIRED, "checkpoint to start from", "path")
    teacher: str | None = knob(
        None, "checkpoint of the same architecture and tokenizer, for policy_loss.distill_coef; null: none", "path"
    )
    data: ProblemDataConfig = knob(ProblemDataConfig, "problems", "section")
    rl: RolloutConfig = knob(RolloutConfig, "the loop's sizes", "section")
    reward: RewardConfig = knob(RewardConfig, "rewards", "section")
    advantage: Any = knob(None, "registered choice: how rewards become advantages", "choice")
    policy_loss: Any = knob(None, "registered choice: the objective", "choice")
    engine: Any = knob(None, "registered choice: who generates", "choice")
    push: Any = knob(None, "registered choice: how the weights come to the engine", "choice")
    environment: Any = knob(None, "registered choice: what answers the policy's turns", "choice")
    runtime: RuntimeConfig = knob(RuntimeConfig, "who holds the roles", "section")
    optim: OptimConfig = knob(OptimConfig, "optimizer and schedule", "section")


@dataclass
class EvalConfig(ComputeConfig):
    """``r1mega eval``: pass@1 with k samples a problem (R1: temperature 0.6)."""

    checkpoint: str = knob(REQUIRED, "checkpoint to evaluate", "path")
    data: ProblemDataConfig = knob(ProblemDataConfig, "problems", "section")
    samples: int = knob(8, "responses a problem", "responses", **at_least(1))
    batch_prompts: int = knob(128, "problems generated at once by one rank", "prompts", **at_least(1))
    sampling: SamplingConfig = knob(SamplingConfig, "how responses are drawn", "section")
    reward: RewardConfig = knob(RewardConfig, "the verifier's limits and options; weights and by_source are not used", "section")
    verifier: str = knob("accuracy", "reward whose value 1 means correct: a registered one (code, judge), or a dotted path", "name")
    verifier_by_source: dict[str, str] = knob(
        {}, "verifiers for the problems of some sources, by shell-style pattern; the first that matches decides", "pattern: name"
    )
    engine: Any = knob(None, "registered choice: who generates", "choice")
    push: Any = knob(None, "registered choice: how the weights come to the engine; None in Python: auto", "choice")
    environment: Any = knob(None, "registered choice: what answers the policy's turns; None in Python: single", "choice")
    step_seconds: float = knob(60.0, "longest call of an environment, unless it asks for more", "seconds", **above(0))
    keep: str | None = knob(None, "file for the correct responses as SFT problems (rejection sampling); null: none", "path")
    keep_per_problem: int = knob(1, "most correct responses kept a problem", "responses", **at_least(1))

    def __post_init__(self) -> None:
        _fill(self)


@dataclass
class ExportConfig(ComputeConfig):
    """``r1mega export``: a checkpoint as a Hugging Face model."""

    checkpoint: str = knob(REQUIRED, "checkpoint to export", "path")
    target: str = knob("${out}/hf", "folder of the Hugging Face model", "path")
    dtype: str = knob("as_is", "bf16, fp32, fp8 (128x128 blocks, as V3), or as_is: the checkpoint's", "name", **one_of(*DTYPES))
    shard_bytes: int = knob(5 << 30, "largest safetensors file", "bytes", **at_least(1 << 10))
    convert: ConversionConfig = knob(ConversionConfig, "how it works", "section")


@dataclass
class ChatConfig(ComputeConfig):
    """``r1mega chat``: ask a checkpoint, each question by itself."""

    checkpoint: str = knob(REQUIRED, "checkpoint to talk to", "path")
    sampling: SamplingConfig = knob(SamplingConfig, "how responses are drawn", "section")
    engine: Any = knob(None, "registered choice: who generates", "choice")
    push: Any = knob(None, "registered choice: how the weights come to the engine; None in Python: auto", "choice")
    environment: Any = knob(None, "registered choice: what answers the policy's turns; None in Python: single", "choice")
    prompt: str | None = knob(None, "one question, answered and done; null: questions from the terminal", "text")

    def __post_init__(self) -> None:
        _fill(self)


def _fill(config: EvalConfig | ChatConfig) -> None:
    """One response is the episode, and the engine's own push serves, where a config made in Python chooses nothing."""
    if config.environment is None:
        config.environment = registry.lookup("environment", "single")()
    if config.push is None:
        config.push = registry.lookup("push", "auto")()
