"""Rules of number formats: among themselves, and against the widths of the model. In: a config; out: Violations."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.config.errors import Violation
from r1mega.config.model import ModelConfig
from r1mega.config.model_rules import multiples
from r1mega.config.run import ComputeConfig, ParallelConfig, PrecisionConfig
from r1mega.config.train import PretrainConfig, SftConfig

BLOCK = 128
"""Numbers of a row that share a scale."""


def precision_violations(config: ComputeConfig) -> Iterator[Violation]:
    """Formats among themselves and against the command."""
    precision = config.precision
    if precision.products == "fp8" and not isinstance(config, PretrainConfig | SftConfig):
        key, rule = "precision.products", "plain but for pretrain and sft: the engine that generates has no FP8 yet"
        yield Violation(key, rule, precision.products, ((key, ("plain",)),))
    yield from dtype_violations(precision)


def dtype_violations(precision: PrecisionConfig) -> Iterator[Violation]:
    """The format of products against that of activations."""
    if precision.products == "fp8" and precision.dtype != "bf16":
        key, rule = "precision.dtype", "bf16 with precision.products=fp8, whose activations are"
        yield Violation(key, rule, precision.dtype, ((key, ("bf16",)), ("precision.products", ("plain",))))


def width_violations(precision: PrecisionConfig, model: ModelConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    """Experts are made of whole blocks; a linear layer that is not keeps its products in dtype."""
    if precision.products != "fp8" or model.num_layers <= model.first_k_dense:
        return
    for name, width, step in (
        ("hidden_size", model.hidden_size, BLOCK),
        ("moe_ffn_size", model.moe_ffn_size, BLOCK * parallel.expert_tensor),
    ):
        if width % step:
            cut = f" x parallel.expert_tensor {parallel.expert_tensor}" if step > BLOCK else ""
            key, rule = f"model.{name}", f"a multiple of {BLOCK}{cut} with precision.products=fp8"
            yield Violation(key, rule, width, ((key, multiples(step, width)), ("precision.products", ("plain",))))
