"""Rules of number formats: among themselves, against the device and the command, and against the widths of the model.

In: a config; out: Violations. Transformer Engine's blockwise recipe (``precision.products=te``) wants a GPU, whole weights in each
expert, sixteenths of every width, and weight gradients in the order of the forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from r1mega import registry
from r1mega.config.errors import Violation, either
from r1mega.config.model import ModelConfig
from r1mega.config.model_rules import multiples
from r1mega.config.run import ComputeConfig, DeviceConfig, ParallelConfig, PrecisionConfig
from r1mega.config.train import PretrainConfig, SftConfig

BLOCK = 128
"""Numbers of a row that share a scale."""
TE_STEP = 16
"""Rows and widths of a product in FP8 are multiples of it: a row of FP8 numbers begins at a 16-byte address."""
TE_PIPELINES = ("none", "1f1b", "interleaved")
"""Schedules whose backward passes come whole and in the order of the forward passes: the first one of a step overwrites what the
gradient buffers hold."""


def precision_violations(config: ComputeConfig) -> Iterator[Violation]:
    """Formats among themselves, against device and layout, and against the command."""
    precision, key = config.precision, "precision.products"
    if precision.products != "plain" and not isinstance(config, PretrainConfig | SftConfig):
        rule = "plain but for pretrain and sft: the engine that generates has no FP8 yet"
        yield Violation(key, rule, precision.products, ((key, ("plain",)),))
    yield from dtype_violations(precision)
    yield from attention_violations(config.device, precision, config.parallel)
    if precision.products == "te":
        yield from _device_of_te(config.device)
        yield from expert_violations_of_te(config.parallel)
        if isinstance(config, PretrainConfig | SftConfig):
            yield from _training_with_te(config)


def bench_violations(device: DeviceConfig, precision: PrecisionConfig, model: ModelConfig) -> Iterator[Violation]:
    """The same for one layer or model on one device."""
    alone = ParallelConfig()
    yield from dtype_violations(precision)
    yield from attention_violations(device, precision, alone)
    yield from width_violations(precision, model, alone)
    if precision.products == "te":
        yield from _device_of_te(device)


def dtype_violations(precision: PrecisionConfig) -> Iterator[Violation]:
    """The format of products against that of activations, and the scales against whose they are."""
    if precision.products != "plain" and precision.dtype != "bf16":
        key, rule = "precision.dtype", f"bf16 with precision.products={precision.products}, whose activations are"
        yield Violation(key, rule, precision.dtype, ((key, ("bf16",)), ("precision.products", ("plain",))))
    if precision.products == "te" and precision.power_of_two_scales:
        key, rule = "precision.power_of_two_scales", "false with precision.products=te, whose recipe has scales of its own"
        yield Violation(key, rule, "true", ((key, (False,)), ("precision.products", ("fp8",))))
    if precision.products != "fp8" and precision.expert_weight_gradients == "bf16":
        key, rule = "precision.expert_weight_gradients", "fp8, its default, where precision.products is not fp8"
        yield Violation(key, rule, "bf16", ((key, ("fp8",)), ("precision.products", ("fp8",))))


def attention_violations(device: DeviceConfig, precision: PrecisionConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    """The kernel that was asked for against device, format and layout."""
    key, usual = "device.attention", (("device.attention", ("auto",)),)
    if device.attention == "auto":
        return
    if device.kind == "cpu":
        yield Violation(key, "auto on a CPU, for which torch has one kernel", device.attention, usual)
    elif parallel.context > 1:
        yield Violation(key, "auto with parallel.context above 1, whose blocks have kernels of their own", device.attention, usual)
    elif device.attention == "cudnn" and device.deterministic:
        rule = "any but cudnn with device.deterministic, whose gradients are summed in any order"
        yield Violation(key, rule, device.attention, (*usual, ("device.deterministic", (False,))))
    elif device.attention != "math" and precision.dtype != "bf16":
        rule = f"bf16 with device.attention={device.attention}, whose kernel takes no other"
        yield Violation("precision.dtype", rule, precision.dtype, (("precision.dtype", ("bf16",)), *usual))


def width_violations(precision: PrecisionConfig, model: ModelConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    """With ``fp8`` experts are made of whole blocks, and a linear layer that is not keeps its products in dtype; ``te`` has no way
    back: every layer fits."""
    if precision.products == "te":
        yield from _widths_of_te(model, parallel)
        return
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


def row_violations(where: str, length: int, parallel: ParallelConfig, sequences: int = 1, whose: str = "") -> Iterator[Violation]:
    """The rows of a microbatch with ``te``: ``sequences`` (the knob ``whose``) of ``length`` tokens each (the knob ``where``)."""
    step = (TE_STEP if parallel.tensor == 1 else BLOCK * parallel.tensor) * parallel.context
    if sequences * length % step:
        rule = f"{f'{whose} {sequences} x it is ' if whose else ''}a multiple of {step} with precision.products=te"
        fitting = multiples(step // math.gcd(step, sequences), length)
        yield Violation(where, rule, length, ((where, fitting), ("precision.products", ("plain",))))


def _device_of_te(device: DeviceConfig) -> Iterator[Violation]:
    if device.kind != "cuda":
        key, rule = "device.kind", "cuda with precision.products=te, whose kernels are a GPU's"
        yield Violation(key, rule, device.kind, ((key, ("cuda",)), ("precision.products", ("plain",))))


def expert_violations_of_te(parallel: ParallelConfig) -> Iterator[Violation]:
    """What a layout may not have with ``te``."""
    if parallel.expert_tensor > 1:
        key, rule = "parallel.expert_tensor", "1 with precision.products=te, for which an expert is whole on its rank"
        yield Violation(key, rule, parallel.expert_tensor, ((key, (1,)), ("precision.products", ("plain",))))


def _training_with_te(config: PretrainConfig | SftConfig) -> Iterator[Violation]:
    instead = ("precision.products", ("plain",))
    name = registry.name_of("pipeline", config.pipeline)
    if name not in TE_PIPELINES:
        rule = f"{either(TE_PIPELINES)} with precision.products=te, whose weight gradients never wait"
        yield Violation("pipeline", rule, name, (("pipeline", ("1f1b",)), instead))
    if config.optim.moment_dtype != "fp32":
        key, rule = "optim.moment_dtype", "fp32 with precision.products=te, beside which Megatron-Core takes its package's Adam"
        yield Violation(key, rule, config.optim.moment_dtype, ((key, ("fp32",)), instead))
    whose, size = "trainer.micro_batch_size", config.trainer.micro_batch_size
    yield from row_violations("data.sequence_length", config.data.sequence_length, config.parallel, size, whose)


def _widths_of_te(m: ModelConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    """Both sides of every matrix, as a tensor rank holds it; and the blocks in which tensor ranks send activations."""
    cut, instead = parallel.tensor, (("precision.products", ("plain",)),)
    share = "" if cut == 1 else f" / parallel.tensor {cut}"
    one = [("hidden_size", m.hidden_size), ("kv_lora_rank", m.kv_lora_rank), ("q_lora_rank", m.q_lora_rank or 0)]
    if m.num_layers > m.first_k_dense or m.num_mtp_layers:
        one.append(("moe_ffn_size", m.moe_ffn_size))
    shared = [
        ("(kv_lora_rank + qk_rope_head_dim)", m.kv_lora_rank + m.qk_rope_head_dim),
        ("num_heads x (qk_nope_head_dim + qk_rope_head_dim)", m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)),
        ("num_heads x (qk_nope_head_dim + v_head_dim)", m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)),
        ("num_heads x v_head_dim", m.num_heads * m.v_head_dim),
        ("num_shared_experts x moe_ffn_size", m.num_shared_experts * m.moe_ffn_size),
        *([("q_lora_rank", m.q_lora_rank)] if m.q_lora_rank and cut > 1 else []),
        *([("ffn_size", m.ffn_size)] if m.first_k_dense else []),
    ]
    for name, width in one:
        step = BLOCK if cut > 1 and name != "moe_ffn_size" else TE_STEP
        if width % step:
            why = " and parallel.tensor above 1" if step == BLOCK else ""
            key = f"model.{name}"
            rule = f"a multiple of {step} with precision.products=te{why}"
            yield Violation(key, rule, width, ((key, multiples(step, width)), *instead))
    for name, width in shared:
        if width % (TE_STEP * cut):
            rule = f"{name}{share} is a multiple of {TE_STEP} with precision.products=te"
            yield Violation("model", rule, f"{width / cut:g}", instead)
