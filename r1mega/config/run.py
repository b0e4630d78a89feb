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
    attention: str = knob(
        "auto",
        "kernel of core attention on a GPU: auto: the first of torch's that can, cuDNN's before others; cudnn, flash, math: that "
        "one of torch's alone; flash_attn: the package's. flash and flash_attn get values filled up with zeros to the keys' width, "
        "and know no masks: where packed samples do not see each other (sft, packing=isolated) auto does their work",
        "name",
        **one_of("auto", "cudnn", "flash", "math", "flash_attn"),
    )


@dataclass
class LaunchConfig:
    """Who starts the processes. Under torchrun (RANK and WORLD_SIZE set) the command joins and starts nothing."""

    kind: str = knob(
        "local",
        "local: on this machine; torchrun: on each host where the same command is typed; slurm: as a job that sbatch gets",
        "name",
        **one_of("local", "torchrun", "slurm"),
    )
    processes: int = knob(1, "processes started on each host", "processes", **at_least(1))
    hosts: int = knob(1, "hosts of the run, above 1 with torchrun and slurm", "hosts", **at_least(1))
    rendezvous: str | None = knob(
        None, "ADDRESS:PORT of the host where all hosts meet; torchrun needs it above one host", "address"
    )
    host_rank: int | None = knob(
        None,
        "torchrun: this host's index, 0 on the host of launch.rendezvous; null: hosts are numbered as they join",
        "1",
        **at_least(0),
    )
    interface: str | None = knob(None, "network interface between hosts, as eth0; null: the one towards the rendezvous", "name")
    rendezvous_timeout_seconds: float = knob(600.0, "longest wait until all ranks have met", "seconds", **at_least(1))
    timeout_seconds: float = knob(3600.0, "longest wait in one collective", "seconds", **at_least(1))
    stall_timeout_seconds: float = knob(
        600.0,
        "longest wait in a collective for a rank that does not reach it; then all ranks end and name it; 0: no such watch",
        "seconds",
        rule=lambda value: value == 0 or value >= 2,
        says="0 or at least 2",
    )
    restarts: int = knob(
        0, "after a rank's failure all ranks start again from the last checkpoint, so many times", "1", **at_least(0)
    )
    dry_run: bool = knob(False, "print the command, or with slurm the sbatch file, and start nothing", "bool")
    partition: str | None = knob(None, "slurm: partition", "name")
    account: str | None = knob(None, "slurm: account", "name")
    time_limit: str | None = knob(None, "slurm: time limit of the job, as 12:00:00 or 2-00:00:00; null: the partition's", "time")
    gpus: int | None = knob(
        None, "slurm: GPUs of each host; null: one a process with device=cuda, else none asked for", "GPUs", **at_least(0)
    )
    cpus: int | None = knob(None, "slurm: CPU cores of each process; null: slurm's own default", "cores", **at_least(1))
    output: str | None = knob(
        None, "slurm: file of the job's output, %j its number; null: slurm-%j.log in the run's folder", "file"
    )
    save_seconds: int = knob(300, "slurm: how long before the time limit the ranks are told to save", "seconds", **at_least(0))
    requeue: bool = knob(True, "slurm: a job that has saved, or has lost a host, is queued again", "bool")
    options: list[str] = knob([], "slurm: further options of sbatch, as ['--qos=high','--exclusive']", "text")
    setup: list[str] = knob([], "slurm: shell lines that each rank runs first, as ['module load x']", "text")


RECOMPUTED = ("norms", "mla_up", "swiglu")
"""Kinds of activations that a backward pass can make again; :mod:`r1mega.model.recompute` says what each frees."""


def are_recomputed(kinds: list[str]) -> bool:
    """True for a list of some of :data:`RECOMPUTED`, each once."""
    return len(set(kinds)) == len(kinds) and set(kinds) <= set(RECOMPUTED)


@dataclass
class ParallelConfig:
    """Degrees of parallelism, data being processes / (tensor x pipeline x context); and what a rank does not keep.

    The optimizer's states are cut over data and context ranks (ZeRO-1).
    """

    tensor: int = knob(1, "tensor parallel degree; above 1 with sequence parallelism", "ranks", **at_least(1))
    pipeline: int = knob(1, "pipeline parallel degree; pipeline= chooses the schedule", "ranks", **at_least(1))
    context: int = knob(1, "context parallel degree: each sequence is cut into that many parts", "ranks", **at_least(1))
    expert: int = knob(1, "expert parallel degree, over the ranks of tensor, context and data", "ranks", **at_least(1))
    expert_tensor: int = knob(1, "tensor parallel degree inside each expert", "ranks", **at_least(1))
    context_exchange: str = knob(
        "allgather",
        "how context ranks see each other's keys: allgather (the latents, once a layer) or ring (one part at a time)",
        "name",
        **one_of("allgather", "ring"),
    )
    stages: str | None = knob(
        None,
        "what each pipeline stage holds, in Megatron's letters: E embedding, t layer, m MTP, L head and loss, as Ett|ttt|tmL; "
        "null: cut evenly by work",
        "text",
    )
    recompute: list[str] = knob(
        [],
        "activations that the backward pass makes again, to the same bits, instead of keeping them (V3 3.2.3: all; []: fastest); "
        "in bf16 of a token and layer, over the tensor ranks, norms 2 x (2 x hidden_size + q_lora_rank + kv_lora_rank) bytes, "
        "mla_up 2 x num_heads x (2 x (nope + rope) + v), swiglu 2 x the width of the dense or shared FFN",
        "name",
        rule=are_recomputed,
        says=f"in [{','.join(RECOMPUTED)}], each once",
    )
    fused_loss: bool = knob(
        False,
        "make logits a piece of the vocabulary at a time and never hold them all, in pretrain, sft and rl: for large vocabularies; "
        "a fourth product of the head's size beside three",
        "bool",
    )


@dataclass
class PrecisionConfig:
    """Number formats of parameters, activations and matrix products.

    Master weights and gradients are fp32, moments too but for ``optim.moment_dtype``.
    """

    dtype: str = knob("fp32", "format of parameters and activations", "name", **one_of("fp32", "bf16"))
    products: str = knob(
        "plain",
        "matrix products of linear layers and experts: plain: in dtype; fp8: E4M3 in blocks of 1x128 and 128x128 (V3 3.3); "
        "te: the same by Transformer Engine (extra te). Embedding, head, router, norms and attention are in dtype",
        "name",
        **one_of("plain", "fp8", "te"),
    )
    power_of_two_scales: bool = knob(False, "with products=fp8: scales that are powers of two, as DeepSeek-V3.1 has", "bool")
    expert_weight_gradients: str = knob(
        "fp8",
        "with products=fp8: operands of the products that routed experts' weight gradients are; fp8: 1x128 by 1x128 (V3 3.3)",
        "name",
        **one_of("fp8", "bf16"),
    )
    fp32_head: bool = knob(
        False,
        "rl: log-probabilities of logits that are sums in fp32, never rounded to dtype (MiniMax-M1's remedy for differences of "
        "trainer and engine), made a piece at a time as with parallel.fused_loss; the engine has a switch of its own (SGLang: "
        "enable_fp32_lm_head)",
        "bool",
    )


@dataclass
class LogConfig:
    """Where the metric lines of a training go besides the run's folder."""

    wandb: bool = knob(False, "mirror metric lines and config to Weights & Biases (extra wandb); WANDB_MODE=offline works", "bool")
    project: str = knob("r1mega", "the project there; the run has this run's name", "name")
    prometheus_port: int = knob(
        0, "port at which rank 0 serves the newest metric line to Prometheus, at /metrics; 0: none", "port", **between(0, 65535)
    )
    prometheus_host: str = knob("127.0.0.1", "address of that port; 0.0.0.0: for other machines too", "address")


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
    nvtx: bool = knob(
        False, "name each layer and each op of ours for a profiler, in pretrain, sft and rl: NVTX on a GPU, else torch's", "bool"
    )


@dataclass
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = knob(1.0, "softmax temperature; 0: the likeliest token", "1", **between(0, 10))
    max_new_tokens: int = knob(256, "longest response", "tokens", **at_least(1))
