"""Pretraining and SFT: data, optimizer, schedule, trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1mega import registry
from r1mega.config.knob import REQUIRED, above, at_least, between, knob, one_of
from r1mega.config.model import ModelConfig
from r1mega.config.run import ComputeConfig


@dataclass
class OptimConfig:
    """AdamW and its schedule: linear warm-up, constant, decay (V3 4.2)."""

    lr: float = knob(2.2e-4, "peak learning rate", "1", **above(0))
    min_lr: float = knob(2.2e-5, "learning rate after the decay", "1", **at_least(0))
    warmup_steps: int = knob(2000, "linear warm-up from 0", "steps", **at_least(0))
    constant_steps: int = knob(0, "steps at the peak between warm-up and decay", "steps", **at_least(0))
    decay: str = knob("cosine", "shape of the decay, which ends at trainer.steps", "name", **one_of("constant", "cosine"))
    beta1: float = knob(0.9, "decay of the first moment", "1", **between(0, 1))
    beta2: float = knob(0.95, "decay of the second moment", "1", **between(0, 1))
    eps: float = knob(1e-8, "Adam's epsilon", "1", **above(0))
    weight_decay: float = knob(0.1, "decoupled weight decay (not on norms and biases)", "1", **at_least(0))
    moment_dtype: str = knob("fp32", "what both moments are held in; bf16: as V3 (3.3.3)", "name", **one_of("fp32", "bf16"))
    clip_grad: float = knob(1.0, "largest global gradient norm; 0: no clipping", "1", **at_least(0))
    batch_ramp_start: int = knob(0, "sequences a step at the start of the ramp; 0: no ramp", "sequences", **at_least(0))
    batch_ramp_steps: int = knob(0, "steps over which the batch grows to its full size", "steps", **at_least(0))


@dataclass
class TokenDataConfig:
    """Token files to learn from."""

    train: dict[str, float] = knob({}, "token file (without suffix) to weight of its share of sequences", "path: 1")
    valid: str | None = knob(None, "token file for the validation loss", "path")
    sequence_length: int = knob(4096, "tokens S a sequence", "tokens", **at_least(2))
    packing: str = knob(
        "windows",
        "windows: the documents as one stream, cut anywhere; documents: whole ones, best fit, as V3 (4.1); isolated: documents "
        "that do not see each other",
        "name",
        **one_of("windows", "documents", "isolated"),
    )


EXPORT_DTYPES = ("as_is", "fp32", "bf16", "fp8")
"""Number formats of an export; as_is: the checkpoint's."""


@dataclass
class TrainerConfig:
    """Steps, batches, logs, checkpoints."""

    steps: int = knob(REQUIRED, "optimizer steps", "steps", **at_least(1))
    global_batch_size: int = knob(32, "sequences an optimizer step, over all ranks", "sequences", **at_least(1))
    micro_batch_size: int = knob(8, "sequences one forward pass of one rank", "sequences", **at_least(1))
    log_every: int = knob(10, "steps between metric lines", "steps", **at_least(1))
    valid_every: int = knob(0, "steps between validation losses; 0: at the end only", "steps", **at_least(0))
    valid_batches: int = knob(8, "global batches of one validation loss", "batches", **at_least(1))
    save_every: int = knob(0, "steps between checkpoints; 0: at the end only", "steps", **at_least(0))
    keep_last: int = knob(2, "newest checkpoints kept", "checkpoints", **at_least(1))
    keep_every: int = knob(0, "checkpoints whose step is a multiple of it are kept for good; 0: none", "steps", **at_least(0))
    async_save: bool = knob(True, "write checkpoints beside the training, from a copy in host memory; false: stand still", "bool")
    export_every: int = knob(
        0,
        "steps between exports to out/exports as Hugging Face models, a multiple of save_every; 0: none",
        "steps",
        **at_least(0),
    )
    export_dtype: str = knob("bf16", "number format of these exports", "name", **one_of(*EXPORT_DTYPES))
    on_spike: str = knob(
        "skip",
        "at a loss that is not finite or spikes: skip the step, rollback to the last checkpoint with the data moved on, or stop",
        "name",
        **one_of("skip", "rollback", "stop"),
    )
    spike_sigma: float = knob(
        6.0,
        "a loss so far above the mean of the last spike_window steps is a spike; 0: only what is not finite",
        "standard deviations",
        **at_least(0),
    )
    spike_window: int = knob(128, "steps that a loss is compared with", "steps", **at_least(8))
    spike_limit: int = knob(10, "spikes, fewer than spike_window steps apart, that a run endures", "spikes", **at_least(0))
    peak_tflops: float = knob(0.0, "peak of one device for MFU; 0: measured once by a matrix product", "TFLOP/s", **at_least(0))


USUAL = {"dispatcher": "alltoall", "pipeline": "1f1b", "balance": "none"}
"""Kind to the choice that a config made in Python has where it names none; the YAML files say the same."""


def _fill(config: Any) -> None:
    """A config made in Python need not name these choices; the trainer finds none of them missing."""
    for kind, name in USUAL.items():
        if getattr(config, kind) is None:
            setattr(config, kind, registry.lookup(kind, name)())


@dataclass
class PretrainConfig(ComputeConfig):
    """``r1mega pretrain``: next-token training from token files."""

    model: ModelConfig = knob(ModelConfig, "the architecture", "section")
    tokenizer: str | None = knob(None, "tokenizer folder to keep with the checkpoints", "path")
    init: str | None = knob(None, "checkpoint to start from; null: fresh weights", "path")
    optim: OptimConfig = knob(OptimConfig, "optimizer and schedule", "section")
    data: TokenDataConfig = knob(TokenDataConfig, "token files", "section")
    trainer: TrainerConfig = knob(TrainerConfig, "steps and batches", "section")
    dispatcher: Any = knob(None, "registered choice: how tokens reach their experts; None in Python: alltoall", "choice")
    pipeline: Any = knob(None, "registered choice: in which order pipeline ranks work; None in Python: 1f1b", "choice")
    balance: Any = knob(None, "registered choice: where experts lie; None in Python: none", "choice")

    def __post_init__(self) -> None:
        _fill(self)


TUNABLE_MODEL_FIELDS = ("expert_bias_update_rate", "seq_aux_loss_coef", "mtp_loss_coef")
"""Model fields that a run started from a checkpoint may change: they alter no weight's shape or meaning."""


@dataclass
class SftDataConfig:
    """Conversations with a loss mask."""

    train: dict[str, float] = knob({}, "sample file (without suffix) to weight of its share of samples", "path: 1")
    valid: str | None = knob(None, "sample file for the validation loss", "path")
    sequence_length: int = knob(4096, "tokens S a packed sequence; a longer sample is an error", "tokens", **at_least(2))


@dataclass
class SftConfig(ComputeConfig):
    """``r1mega sft``: training on the answers alone, samples packed whole and masked from each other."""

    model: dict[str, Any] = knob({}, "changes of the checkpoint's training fields (TUNABLE_MODEL_FIELDS)", "field: value")
    init: str = knob(REQUIRED, "checkpoint to start from", "path")
    optim: OptimConfig = knob(OptimConfig, "optimizer and schedule", "section")
    data: SftDataConfig = knob(SftDataConfig, "sample files", "section")
    trainer: TrainerConfig = knob(TrainerConfig, "steps and batches", "section")
    dispatcher: Any = knob(None, "registered choice: how tokens reach their experts; None in Python: alltoall", "choice")
    pipeline: Any = knob(None, "registered choice: in which order pipeline ranks work; None in Python: 1f1b", "choice")
    balance: Any = knob(None, "registered choice: where experts lie; None in Python: none", "choice")

    def __post_init__(self) -> None:
        _fill(self)
