"""``r1mega bench``: what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.knob import at_least, between, knob, one_of
from r1mega.config.model import ModelConfig
from r1mega.config.run import RECOMPUTED, DeviceConfig, PrecisionConfig, RunConfig, are_recomputed


@dataclass
class BenchConfig(RunConfig):
    """``r1mega bench``: our ops beside their peers, a MoE layer, or a training step, on one device with random data.

    ``bench=ops`` prints a table and writes bench.json and roofline.svg into ``out``; ``moe`` and ``step`` print one JSON line.
    Shares are of what the device's own copy and matrix products reach in the same run. Exit status 1: a figure of ``check=true``
    has fallen, or an op of ours failed.
    """

    bench: str = knob(
        "ops",
        "ops: each op and its peers; moe: one MoE layer, forward and backward; step: a training step of the whole model",
        "name",
        **one_of("ops", "moe", "step"),
    )
    op: str | None = knob(None, "ops: those of this name alone, as permute or quantize*; null: all", "name")
    device: DeviceConfig = knob(DeviceConfig, "the device that is measured", "section")
    precision: PrecisionConfig = knob(PrecisionConfig, "moe, step: number formats", "section")
    model: ModelConfig = knob(ModelConfig, "moe, step: the architecture", "section")
    recompute: list[str] = knob(
        [],
        "moe, step: activations that the backward pass makes again, see parallel.recompute of pretrain",
        "name",
        rule=are_recomputed,
        says=f"in [{','.join(RECOMPUTED)}], each once",
    )
    tokens: int = knob(16384, "moe: tokens of one pass", "tokens", **at_least(1))
    routed_only: bool = knob(
        False,
        "moe: from permute to unpermute alone, without router and shared experts; the choice of experts is random and even: 1,024 "
        "tokens with top-8 of 32 are 256 rows an expert",
        "bool",
    )
    peer: bool = knob(
        False,
        "moe, step: with precision=fp8, the same again with precision=fp8_te in this process, and the peer's median time over ours",
        "bool",
    )
    sequence_length: int = knob(4096, "step: tokens of a sequence", "tokens", **at_least(2))
    micro_batch_size: int = knob(1, "step: sequences of a microbatch", "sequences", **at_least(1))
    microbatches: int = knob(4, "step: microbatches of a step", "microbatches", **at_least(1))
    warmup: int = knob(3, "rounds that come first and do not count", "rounds", **at_least(0))
    rounds: int | None = knob(
        None, "rounds of which the median is taken; null: 30 for ops, 10 for moe and step", "rounds", **at_least(1)
    )
    nvtx: bool = knob(False, "step: name each layer and each op of ours for a profiler", "bool")
    baseline: str | None = knob(
        None, "file of figures to compare with; null: tools/bench/baseline/DEVICE.json of the checkout", "path"
    )
    check: bool = knob(False, "fail where a figure has fallen below the baseline's by more than tolerance", "bool")
    write_baseline: bool = knob(False, "keep the figures in the baseline", "bool")
    tolerance: float = knob(0.1, "share of its baseline by which a figure may fall", "1", **between(0, 1))
