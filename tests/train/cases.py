"""What the tests of training share: a model of a few thousand weights, a tokenizer, token files, and a run's numbers read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig
from r1mega.config.train import OptimConfig, PretrainConfig, SftConfig, SftDataConfig, TokenDataConfig, TrainerConfig
from r1mega.data.tokenfile import TokenFileWriter
from r1mega.data.tokenizer import encode_sample, load_tokenizer, train_tokenizer
from r1mega.device import open_device
from r1mega.mesh import Mesh, open_mesh

CPU = DeviceConfig(kind="cpu", threads=1)
LENGTH = 16
"""Tokens a sequence."""

MODEL = ModelConfig(
    vocab_size=272,
    max_position_embeddings=128,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    yarn=YarnConfig(factor=4.0, original_max_position_embeddings=32),
    first_k_dense=1,
    ffn_size=48,
    moe_ffn_size=16,
    num_experts=8,
    top_k=4,
    num_groups=4,
    topk_groups=2,
    num_mtp_layers=1,
    init_std=0.05,
)
OPTIM = OptimConfig(lr=2e-3, min_lr=2e-4, warmup_steps=2, eps=1e-6)
"""Adam's epsilon is above the rounding of tiny gradients, so that a sum in another order moves no weight by a whole step."""


def one_rank() -> Mesh:
    """The mesh of this process alone."""
    return open_mesh(open_device(CPU), ParallelConfig(), LaunchConfig(), 1)


def write_data(folder: Path) -> Path:
    """A tokenizer (``tok``), a repetitive text (``text``) and sums as samples (``samples``) in ``folder``."""
    tokenizer = train_tokenizer(["What is 1 + 2? It is 3."] * 4, folder / "tok", vocab_size=MODEL.vocab_size)
    about = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash}
    with TokenFileWriter(folder / "text", **about) as out:
        for start in range(40):
            out.add([20 + (start + place) % 7 for place in range(50)])
    with TokenFileWriter(folder / "samples", **about, kind="samples") as out:
        for left in range(3):
            for right in range(7):
                out.add(*encode_sample(load_tokenizer(folder / "tok"), f"{left}+{right}", f"{left + right}"))
    return folder


def pretrain_config(data: Path, out: Path, steps: int, *, model: ModelConfig = MODEL, **trainer: Any) -> PretrainConfig:
    """A run over ``text``; ``trainer``: fields of TrainerConfig."""
    return PretrainConfig(
        name=out.name,
        out=str(out),
        device=CPU,
        model=model,
        tokenizer=str(data / "tok"),
        optim=OPTIM,
        data=TokenDataConfig(train={str(data / "text"): 1.0}, valid=str(data / "text"), sequence_length=LENGTH),
        trainer=trainer_config(steps, **trainer),
    )


def sft_config(data: Path, init: Path, out: Path, steps: int, **trainer: Any) -> SftConfig:
    """A run over ``samples`` from the checkpoint ``init``."""
    return SftConfig(
        name=out.name,
        out=str(out),
        device=CPU,
        init=str(init),
        optim=OPTIM,
        data=SftDataConfig(train={str(data / "samples"): 1.0}, valid=str(data / "samples"), sequence_length=3 * LENGTH),
        trainer=trainer_config(steps, **trainer),
    )


def trainer_config(steps: int, **fields: Any) -> TrainerConfig:
    """Eight sequences a step in two microbatches of one rank, every step logged."""
    usual = TrainerConfig(steps=steps, global_batch_size=8, micro_batch_size=4, log_every=1, valid_batches=1, peak_tflops=0.01)
    return replace(usual, **fields)


def lines(run: Path) -> list[dict[str, Any]]:
    """A run's metric lines."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(checkpoint: Path | str, folder: str = "weights") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, expert biases, moments, main parameters; ``reference``: those of RL's reference."""
    from megatron.core import dist_checkpointing

    one_rank()  # reading asks which rank this is
    return {
        name: value
        for name, value in dist_checkpointing.load_plain_tensors(str(Path(checkpoint) / folder)).items()
        if isinstance(value, torch.Tensor)
    }
