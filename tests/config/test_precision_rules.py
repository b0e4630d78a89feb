"""Rules of number formats: what is refused, in whole lines, and that the ways out mend it."""

from __future__ import annotations

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from tests.config.test_compose import RL
from tests.config.test_rules import PRETRAIN

FP8 = [*PRETRAIN, "precision=fp8", "model.moe_ffn_size=128"]


def refusal(command: str, overrides: list[str]) -> str:
    with pytest.raises(UserError) as told:
        compose(command, overrides)
    return str(told.value)


def test_fp8_is_bf16_with_products_in_fp8() -> None:
    precision = compose("pretrain", FP8).precision
    assert (precision.dtype, precision.products, precision.power_of_two_scales) == ("bf16", "fp8", False)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["precision.dtype=fp32"], "precision.dtype: bf16 with precision.products=fp8, whose activations are; got fp32; use precision.dtype=bf16, or precision.products=plain"),
        (["model.moe_ffn_size=64"], "model.moe_ffn_size: a multiple of 128 with precision.products=fp8; got 64; use model.moe_ffn_size=128, or precision.products=plain"),
        (["model.hidden_size=192"], "model.hidden_size: a multiple of 128 with precision.products=fp8; got 192; use model.hidden_size=128 or 256, or precision.products=plain"),
        (["launch.processes=2", "parallel.expert_tensor=2"], "model.moe_ffn_size: a multiple of 128 x parallel.expert_tensor 2 with precision.products=fp8; got 128; use model.moe_ffn_size=256, or precision.products=plain"),
    ],
)  # fmt: skip
def test_what_fp8_cannot_be_is_told_with_the_ways_out(overrides: list[str], line: str) -> None:
    assert refusal("pretrain", [*FP8, *overrides]) == line


def test_commands_that_generate_refuse_it() -> None:
    want = "precision.products: plain but for pretrain and sft: the engine that generates has no FP8 yet; got fp8; use precision.products=plain"
    assert refusal("rl", [*RL, "precision=fp8"]) == want


TE = [*PRETRAIN, "precision=fp8_te", "device=cuda", "data.sequence_length=64"]


def test_fp8_te_is_bf16_with_products_of_transformer_engine() -> None:
    precision = compose("pretrain", TE).precision
    assert (precision.dtype, precision.products) == ("bf16", "te")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["precision.dtype=fp32"], "precision.dtype: bf16 with precision.products=te, whose activations are; got fp32; use precision.dtype=bf16, or precision.products=plain"),
        (["precision.power_of_two_scales=true"], "precision.power_of_two_scales: false with precision.products=te, whose recipe has scales of its own; got true; use precision.power_of_two_scales=false, or precision.products=fp8"),
        (["device=cpu"], "device.kind: cuda with precision.products=te, whose kernels are a GPU's; got cpu; use device.kind=cuda, or precision.products=plain"),
        (["launch.processes=2", "parallel.expert_tensor=2"], "parallel.expert_tensor: 1 with precision.products=te, for which an expert is whole on its rank; got 2; use parallel.expert_tensor=1, or precision.products=plain"),
        (["launch.processes=2", "parallel.pipeline=2", "pipeline=zb1p"], "pipeline: none, 1f1b or interleaved with precision.products=te, whose weight gradients never wait; got zb1p; use pipeline=1f1b, or precision.products=plain"),
        (["optim.moment_dtype=bf16"], "optim.moment_dtype: fp32 with precision.products=te, beside which Megatron-Core takes its package's Adam; got bf16; use optim.moment_dtype=fp32, or precision.products=plain"),
        (["trainer.micro_batch_size=4", "data.sequence_length=30"], "data.sequence_length: trainer.micro_batch_size 4 x it is a multiple of 16 with precision.products=te; got 30; use data.sequence_length=28 or 32, or precision.products=plain"),
        (["model.moe_ffn_size=40", "model.num_shared_experts=2"], "model.moe_ffn_size: a multiple of 16 with precision.products=te; got 40; use model.moe_ffn_size=32 or 48, or precision.products=plain"),
        (["model.qk_rope_head_dim=8"], "model: (kv_lora_rank + qk_rope_head_dim) is a multiple of 16 with precision.products=te; got 72; use precision.products=plain"),
        (["launch.processes=2", "parallel.tensor=2", "data.sequence_length=256", "model.q_lora_rank=128", "model.qk_rope_head_dim=32"], "model.kv_lora_rank: a multiple of 128 with precision.products=te and parallel.tensor above 1; got 64; use model.kv_lora_rank=128, or precision.products=plain"),
        (["launch.processes=2", "parallel.tensor=2", "data.sequence_length=66", "trainer.micro_batch_size=4", "model.q_lora_rank=128", "model.kv_lora_rank=128", "model.qk_rope_head_dim=32"], "data.sequence_length: trainer.micro_batch_size 4 x it is a multiple of 256 with precision.products=te; got 66; use data.sequence_length=64 or 128, or precision.products=plain"),
    ],
)  # fmt: skip
def test_what_transformer_engine_cannot_be_is_told_with_the_ways_out(overrides: list[str], line: str) -> None:
    assert refusal("pretrain", [*TE, *overrides]) == line


def test_commands_that_generate_refuse_it_too() -> None:
    want = "precision.products: plain but for pretrain and sft: the engine that generates has no FP8 yet; got te; use precision.products=plain"
    assert refusal("rl", [*RL, "precision=fp8_te", "device=cuda"]) == want


CUDA = [*PRETRAIN, "device=cuda", "precision=bf16"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["device.attention=cuddn"], "device.attention: one of auto, cudnn, flash, math, flash_attn; got cuddn; use device.attention=auto"),
        (["device=cpu", "device.attention=math"], "device.attention: auto on a CPU, for which torch has one kernel; got math; use device.attention=auto"),
        (["device.attention=flash", "launch.processes=2", "parallel.context=2"], "device.attention: auto with parallel.context above 1, whose blocks have kernels of their own; got flash; use device.attention=auto"),
        (["device.attention=cudnn", "device.deterministic=true"], "device.attention: any but cudnn with device.deterministic, whose gradients are summed in any order; got cudnn; use device.attention=auto, or device.deterministic=false"),
        (["device.attention=flash_attn", "precision=fp32"], "precision.dtype: bf16 with device.attention=flash_attn, whose kernel takes no other; got fp32; use precision.dtype=bf16, or device.attention=auto"),
    ],
)  # fmt: skip
def test_a_kernel_of_attention_that_cannot_be_is_told(overrides: list[str], line: str) -> None:
    assert refusal("pretrain", [*CUDA, *overrides]) == line


@pytest.mark.parametrize("name", ["auto", "cudnn", "flash", "math", "flash_attn"])
def test_every_kernel_can_be_asked_for(name: str) -> None:
    assert compose("pretrain", [*CUDA, f"device.attention={name}"]).device.attention == name


BENCH = ["model=tiny", "device=cuda", "precision=fp8", "model.moe_ffn_size=128"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["peer=true"], "peer: false but for bench=moe and step; got true; use peer=false, or bench=moe or step"),
        (["bench=step", "routed_only=true", "sequence_length=64"], "routed_only: false but for bench=moe; got true; use routed_only=false, or bench=moe"),
        (["bench=moe", "peer=true", "precision=bf16"], "peer: false but for precision=fp8, which the peer's is compared with; got true; use peer=false, or precision=fp8"),
        (["bench=moe", "precision=fp8_te", "device=cpu"], "device.kind: cuda with precision.products=te, whose kernels are a GPU's; got cpu; use device.kind=cuda, or precision.products=plain"),
        (["bench=moe", "peer=true", "tokens=24"], "tokens: a multiple of 16 with precision.products=te; got 24; use tokens=16 or 32, or precision.products=plain"),
        (["bench=step", "precision=fp8_te", "sequence_length=24"], "sequence_length: micro_batch_size 1 x it is a multiple of 16 with precision.products=te; got 24; use sequence_length=16 or 32, or precision.products=plain"),
        (["bench=step", "peer=true", "sequence_length=64", "model.qk_rope_head_dim=8"], "model: (kv_lora_rank + qk_rope_head_dim) is a multiple of 16 with precision.products=te; got 72; use precision.products=plain"),
    ],
)  # fmt: skip
def test_a_bench_that_cannot_be_is_told(overrides: list[str], line: str) -> None:
    assert refusal("bench", [*BENCH, *overrides]) == line


def test_routed_experts_alone_may_have_any_number_of_tokens() -> None:
    assert compose("bench", [*BENCH, "bench=moe", "peer=true", "routed_only=true", "tokens=24"]).peer
