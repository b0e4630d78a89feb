"""FP8 blocks: a payload survives bf16 to the last bit, scales are as DeepSeek's, what is no number is refused."""

from __future__ import annotations

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.train.convert import fp8
from r1mega.train.convert.fp8 import dequantise, quantise, quantise_with

SHAPES = [(256, 384), (130, 257), (576, 896), (1, 1), (127, 128), (129, 1000), (2048, 300)]


def codes(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """All 254 codes that are numbers, with -0 and subnormals, in random places."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 254, shape, dtype=torch.uint8, generator=generator)
    return (drawn + (drawn >= 0x7F)).view(torch.float8_e4m3fn)


def blocks(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // 128), -(-shape[1] // 128)


def scales(shape: tuple[int, int], *, power_of_two: bool = False, low: int = -100, high: int = 100) -> torch.Tensor:
    """Of many magnitudes."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(low, high, blocks(shape), generator=generator)
    mantissas = torch.ones(blocks(shape)) if power_of_two else 1 + torch.rand(blocks(shape), generator=generator)
    return torch.ldexp(mantissas, exponents)


def spread(scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Each number's scale, the slow way."""
    return scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def with_448(payload: torch.Tensor) -> torch.Tensor:
    """One number of each block set to the largest, of alternating sign."""
    raw = payload.view(torch.uint8)
    for place, row in enumerate(range(0, payload.shape[0], 128)):
        raw[row, ::128] = 0x7E if place % 2 else 0xFE
    return payload


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """To the last bit: -0 is not 0."""
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def test_the_codes_of_these_tests_are_all_there_are() -> None:
    assert len(codes((256, 384)).view(torch.uint8).unique()) == 254
    assert bool(torch.isfinite(codes((256, 384)).float()).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantising_is_a_product_rounded_once(shape, dtype) -> None:
    payload, scale = codes(shape), scales(shape)
    expected = (payload.float() * spread(scale, shape)).to(dtype)
    assert same(dequantise(payload, scale, dtype), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_payload_comes_back_from_bf16_under_its_scales(shape, power_of_two) -> None:
    payload, scale = codes(shape), scales(shape, power_of_two=power_of_two, low=-117, high=118)
    weight = dequantise(payload, scale, torch.bfloat16)
    assert same(quantise_with(weight, scale), payload)
    assert same(quantise_with(weight.float(), scale), payload)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_scales_the_payload_is_equal_where_448_is_in_it(shape) -> None:
    payload, scale = with_448(codes(shape)), scales(shape)
    found, made = quantise(dequantise(payload, scale, torch.bfloat16), power_of_two=False)
    assert same(found, payload)
    assert float((made / scale - 1).abs().max()) <= 2**-8


@pytest.mark.parametrize("shape", SHAPES)
def test_without_scales_powers_of_two_are_exact(shape) -> None:
    payload, scale = with_448(codes(shape)), scales(shape, power_of_two=True)
    found, made = quantise(dequantise(payload, scale, torch.bfloat16), power_of_two=True)
    assert same(found, payload) and torch.equal(made, scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantising_random_weights(shape, power_of_two, dtype) -> None:
    torch.manual_seed(3)
    weight = (torch.randn(shape) * 0.02).to(dtype)
    payload, scale = quantise(weight, power_of_two=power_of_two)
    assert payload.shape == weight.shape and scale.shape == blocks(shape) and scale.dtype == torch.float32
    largest = torch.stack(
        [torch.stack([part.abs().amax() for part in rows.split(128, 1)]) for rows in weight.float().split(128, 0)]
    )
    if power_of_two:
        assert (
            bool((torch.frexp(scale)[0] == 0.5).all())
            and bool((scale * 448 >= largest).all())
            and bool((scale * 224 < largest).all())
        )
    else:
        assert torch.equal(scale, largest / 448)
    error = (dequantise(payload, scale, torch.float32) - weight.float()).abs()
    assert bool((error <= torch.maximum(weight.float().abs() * 2**-4, spread(scale, shape) * 2**-10) * 1.0001).all())
    assert same(quantise_with(weight, scale), payload)


def test_a_power_of_two_is_the_next_one_and_not_the_one_after() -> None:
    for largest, expected in [(448.0, 1.0), (449.0, 2.0), (224.0, 0.5), (225.0, 1.0)]:
        assert quantise(torch.full((1, 1), largest), power_of_two=True)[1].item() == expected


def test_zero_blocks_have_scale_one_and_neighbours_are_their_own() -> None:
    weight = torch.zeros(256, 256)
    weight[200, 10], weight[3, 200] = 7.0, -0.5
    payload, scale = quantise(weight, power_of_two=False)
    assert torch.equal(scale, torch.tensor([[1.0, 0.5 / 448], [7 / 448, 1.0]]))
    assert int((payload.view(torch.uint8) != 0).sum()) == 2
    assert torch.equal(dequantise(payload, scale, torch.float32), weight)


def test_the_smallest_numbers() -> None:
    weight = torch.full((1, 2), 1e-44)
    payload, scale = quantise(weight, power_of_two=False)
    assert scale.item() == torch.finfo(torch.float32).tiny and not bool(payload.float().any())


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused(code) -> None:
    payload = codes((300, 200))
    payload.view(torch.uint8)[299, 199] = code
    with pytest.raises(UserError, match=r"^layer\.w: E4M3 numbers; got a NaN code in rows \d+ to 299; fetch"):
        dequantise(payload, scales((300, 200)), torch.bfloat16, "layer.w")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_no_numbers_are_refused(value, dtype) -> None:
    weight = torch.randn(300, 200).to(dtype)
    weight[299, 150] = value
    with pytest.raises(UserError, match="^w: finite numbers; got inf or nan in rows"):
        quantise(weight, power_of_two=False, where="w")
    with pytest.raises(UserError, match="^w: finite numbers; got inf or nan in rows"):
        quantise_with(weight, torch.ones(3, 2), where="w")


def test_scales_are_checked() -> None:
    payload = codes((130, 257))
    for wrong, says in [
        (torch.ones(2, 2), r"scales are fp32 \[2, 3\] for \[130, 257\]; got torch.float32 \[2, 2\]"),
        (torch.ones(2, 3, dtype=torch.bfloat16), "scales are fp32"),
        (-torch.ones(2, 3), "finite and not negative"),
        (torch.full((2, 3), float("nan")), "finite and not negative"),
        (torch.zeros(2, 3), "a block of scale 0 is zero"),
        (torch.full((2, 3), 1e37), r"fits torch\.bfloat16; got a scale of 1e\+37"),
    ]:
        with pytest.raises(UserError, match=f"^w: .*{says}"):
            dequantise(payload, wrong, torch.bfloat16, "w")
    with pytest.raises(UserError, match="^w: numbers within 448 times their scale; got larger ones in rows 0 to 129"):
        quantise_with(torch.full((130, 257), 500.0), torch.ones(2, 3), "w")
    with pytest.raises(UserError, match="an FP8 payload is"):
        dequantise(torch.ones(2, 2), torch.ones(1, 1), torch.bfloat16)
    with pytest.raises(UserError, match=r"of a matrix; got shape \[4\]"):
        quantise(torch.ones(4), power_of_two=False)


def test_a_zero_scale_of_zeros_is_zeros_and_comes_back() -> None:
    payload = torch.tensor([[0, 0x80]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = dequantise(payload, torch.zeros(1, 1), torch.bfloat16)
    assert torch.equal(weight, torch.zeros(1, 2)) and same(quantise_with(weight, torch.zeros(1, 1)), payload)


def test_rows_of_many_bands_and_the_memory_they_take() -> None:
    shape = (fp8.BAND // 128 * 5 + 77, 130)
    assert len(list(fp8._bands(torch.Size(shape)))) > 5
    payload, scale = codes(shape), scales(shape)
    assert same(quantise_with(dequantise(payload, scale, torch.bfloat16), scale), payload)
    assert max(band.numel() for _, _, band in fp8._bands(torch.Size((4096, 7168)))) * 4 <= 4096 * 7168 * 2 / 8
