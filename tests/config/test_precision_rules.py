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
