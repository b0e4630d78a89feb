"""What every run has: name, folder, seed, device, processes, layout, precision."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.knob import at_least, between, knob, one_of


def _is_name(text: str) -> bool:
    return bool(text.strip()) and ".." not in text.split("/") and not text.startswith("/")


@dataclass
class DeviceConfig:
    """The device of this process."""

    kind: str = knob("cpu", "cpu (Gloo) or cuda (NCCL)", "name", **one_of("cpu", "cuda"))
    deterministic: bool = knob(True, "two runs give the same bits (device=cuda has false: it costs speed there)", "bool")
    threads: int = knob(0, "CPU threads of one process; 0: cores divided by local processes", "threads", **at_least(0))


@dataclass
class LaunchConfig:
    """Who starts the processes. Under torchrun (RANK and WORLD_SIZE set) the command joins and starts nothing."""

    processes: int = knob(1, "processes started on this machine", "processes", **at_least(1))
    timeout_seconds: float = knob(3600.0, "longest wait in one collective", "seconds", **at_least(1))


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data is processes / (tensor x pipeline x context)."""

    tensor: int = knob(1, "tensor parallel degree; above 1 with sequence parallelism", "ranks", **at_least(1))
    pipeline: int = knob(1, "pipeline stages", "ranks", **at_least(1))
    context: int = knob(1, "context parallel degree", "ranks", **at_least(1))
    expert: int = knob(1, "expert parallel degree", "ranks", **at_least(1))


@dataclass
class PrecisionConfig:
    """Number formats of parameters and activations; master weights, gradients and moments are fp32."""

    dtype: str = knob("fp32", "format of parameters and activations", "name", **one_of("fp32", "bf16"))


@dataclass
class LogConfig:
    """Where the metric lines of a training go besides the run's folder."""

    wandb: bool = knob(False, "mirror metric lines and config to Weights & Biases (extra wandb); WANDB_MODE=offline works", "bool")
    project: str = knob("r1mega", "the project there; the run has this run's name", "name")


@dataclass
class RunConfig:
    """Fields of every command."""

    name: str = knob("run", "the run's name", "name", rule=_is_name, says="a name below runs/, without ..")
    out: str = knob("runs/${name}", "folder of everything that the run writes", "path")
    seed: int = knob(1, "seed of weights, data order and sampling", "1", **at_least(0))
    debug: bool = knob(False, "show tracebacks", "bool")


@dataclass
class ComputeConfig(RunConfig):
    """Fields of every command that runs a model."""

    device: DeviceConfig = knob(DeviceConfig, "this process's device", "section")
    launch: LaunchConfig = knob(LaunchConfig, "who starts the processes", "section")
    parallel: ParallelConfig = knob(ParallelConfig, "degrees of parallelism", "section")
    precision: PrecisionConfig = knob(PrecisionConfig, "number formats", "section")
    log: LogConfig = knob(LogConfig, "where metric lines go besides the run's folder (pretrain, sft, rl)", "section")
    profile: bool = knob(
        False,
        "trace a few steps (rl: one rollout) of pretrain, sft or rl into out/profile, and record who allocates memory",
        "bool",
    )


@dataclass
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = knob(1.0, "softmax temperature; 0: the likeliest token", "1", **between(0, 10))
    max_new_tokens: int = knob(256, "longest response", "tokens", **at_least(1))
