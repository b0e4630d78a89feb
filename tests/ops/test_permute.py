"""Rows by expert: their order, padding, sums, special values, what is refused, and Megatron-Core's function beside ours."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from r1mega.ops import library
from r1mega.ops.permute import permute, permute_rows, unpermute
from r1mega.ops.permute_quantize import permute_quantize, permute_quantize_both, permute_quantize_columns
from r1mega.ops.quantize import quantize_columns
from r1mega.ops.row_map import map_rows

BUILT = library.load()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHOSEN = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]).bool()


def routed(num_tokens=50, num_experts=9, top_k=3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    chosen.scatter_(1, torch.rand(num_tokens, num_experts, generator=draw).topk(top_k, dim=1).indices, True)
    return torch.randn(num_tokens, 16, generator=draw), torch.rand(num_tokens, num_experts, generator=draw), chosen


@pytest.mark.parametrize("top_k", [None, 2])
def test_rows_are_sorted_by_expert_then_token_and_come_back_as_sums(top_k) -> None:
    tokens = torch.arange(1.0, 5.0).unsqueeze(1).repeat(1, 3)
    got = permute(tokens, torch.arange(12.0).view(4, 3), CHOSEN, top_k)
    assert got.rows_RD[:, 0].tolist() == [1, 3, 4, 2, 4, 1, 2, 3]
    assert got.probs_R.tolist() == [0, 6, 9, 4, 10, 2, 5, 8]
    assert got.counts_E.tolist() == [3, 2, 3] and got.counts_E.dtype == torch.int64
    torch.testing.assert_close(unpermute(got.rows_RD, got.row_map), 2 * tokens, rtol=0, atol=0)


def test_each_experts_rows_are_filled_up_to_a_multiple() -> None:
    tokens = torch.arange(1.0, 5.0).unsqueeze(1)
    counted = permute(tokens, torch.arange(12.0).view(4, 3), CHOSEN, multiple=4)
    assert counted.rows_RD[:, 0].tolist() == [1, 3, 4, 0, 2, 4, 0, 0, 1, 2, 3, 0]
    assert counted.probs_R.tolist() == [0, 6, 9, 0, 4, 10, 0, 0, 2, 5, 8, 0]
    assert counted.counts_E.tolist() == [3, 2, 3]
    assert counted.row_map.ends_E.tolist() == [4, 8, 12] and counted.row_map.ends_E.dtype == torch.int32
    assert counted.row_map.row_experts_R.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    promised = permute(tokens, torch.zeros(4, 3), CHOSEN, top_k=2, multiple=4).row_map  # 8 + 3 * 3 rows may be needed: 16
    assert promised.row_experts_R.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 4
    assert promised.row_tokens_R.tolist() == [0, 2, 3, -1, 1, 3, -1, -1, 0, 1, 2, -1, -1, -1, -1, -1]


def test_an_expert_without_rows_has_no_padding() -> None:
    chosen = torch.tensor([[False, True, False]] * 2)
    row_map = map_rows(chosen, top_k=1, multiple=8)  # two rows may be of two experts: 2 + 2 * 7 of them
    assert row_map.ends_E.tolist() == [0, 8, 8] and row_map.row_experts_R.tolist() == [1] * 8 + [-1] * 8


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_loss_and_its_gradients_are_those_of_a_sum_over_experts(multiple) -> None:
    tokens, probs, chosen = routed()
    weight = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    ours, plain = ([t.double().requires_grad_() for t in (tokens, probs)] for _ in range(2))
    got = permute(*ours, chosen, 3, multiple)
    # what lies in padding rows, NaN here, reaches nothing
    padding = got.row_map.row_tokens_R < 0
    factor = weight.double()[got.row_map.row_experts_R.clamp(min=0)].masked_fill(padding.unsqueeze(1), torch.nan)
    sums = unpermute(got.rows_RD * factor, got.row_map, got.probs_R)
    sums.square().sum().backward()
    expected = torch.einsum("td,te,ed->td", plain[0], plain[1] * chosen, weight.double())
    expected.square().sum().backward()
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(ours[1].grad, plain[1].grad)
    if multiple == 1:  # NaN times a gradient of 0 is NaN: the product above is the test's own
        torch.testing.assert_close(ours[0].grad, plain[0].grad)


def test_sums_are_in_fp32_and_rounded_once() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bf16
    row_map = map_rows(torch.ones(1, 5, dtype=torch.bool))
    assert unpermute(rows, row_map).item() == 260
    # a product of 1.00390625 and 0.998046875 is no bf16 number either
    probs = torch.tensor([1.0, 0.998046875, 0.998046875, 0.998046875, 0.998046875])
    assert unpermute(rows * torch.tensor([[1.0]] + [[1.0078125]] * 4).bfloat16(), row_map, probs).item() == 260


def test_quantised_rows_read_back_as_the_rows() -> None:
    tokens, _, chosen = routed()
    tokens = (torch.cat([tokens] * 20, dim=1) * 3)[:, :300].bfloat16()  # blocks of 128, 128 and 44
    tokens[3, 130], tokens[4, 7] = torch.nan, -torch.inf
    row_map = map_rows(chosen, 3, multiple=16)
    rows = permute_rows(tokens, row_map).float()
    for power_of_two in (False, True):
        payload, scales = permute_quantize(tokens, row_map, power_of_two)
        assert payload.dtype == torch.float8_e4m3fn and scales.stride() == (1, -(-len(rows) // 4) * 4)
        back = payload.float() * scales.repeat_interleave(128, dim=1)[:, :300]
        spoilt = torch.zeros_like(back, dtype=torch.bool)
        for token, start in ((3, 128), (4, 0)):  # the blocks with NaN and infinity, and nothing else
            spoilt[row_map.token_rows_TK[token].unsqueeze(1), torch.arange(start, start + 128)] = True
        assert torch.equal(back.isnan(), spoilt)
        keep = ~spoilt
        torch.testing.assert_close(back[keep], rows[keep], rtol=2**-4, atol=0.05)
        assert not payload.float()[row_map.row_tokens_R < 0].any()
        if power_of_two:
            assert (torch.frexp(scales[scales.isfinite()]).mantissa == 0.5).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("D", [272, 1024])
def test_columns_are_those_of_the_rows_that_are_never_written(D, device) -> None:
    tokens, _, chosen = routed(600, 5, 2)
    tokens = torch.cat([tokens] * 64, dim=1)[:, :D].to(device, torch.bfloat16)
    row_map = map_rows(chosen.to(device), 2, multiple=128)
    columns = permute_quantize_columns(tokens, row_map)
    both = permute_quantize_both(tokens, row_map)
    expected = (*permute_quantize(tokens, row_map), *quantize_columns(permute_rows(tokens, row_map)))
    for got, wanted in zip((*both, *columns), (*expected, *expected[2:]), strict=True):
        assert got.stride() == wanted.stride()
        assert torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    ends = row_map.ends_E.tolist()  # an expert's blocks alone hold its tokens: each column sums to what the tokens do
    back = columns.payload.float() * columns.scales.repeat_interleave(128, dim=1)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        true = tokens[chosen[:, expert].to(device)].float()
        torch.testing.assert_close(back[:, start:end].sum(1), true.sum(0), rtol=0, atol=0.02 * true.abs().sum(0).max().item())


def test_rows_are_those_of_megatron_core() -> None:
    tokens, probs, chosen = routed()
    rows, row_probs, _ = moe_utils.permute(tokens, chosen, probs=probs, num_out_tokens=150)
    got = permute(tokens, probs, chosen, 3)
    assert torch.equal(got.rows_RD, rows) and torch.equal(got.probs_R, row_probs)


def test_a_promise_of_top_k_that_is_not_kept_is_refused() -> None:
    chosen = torch.tensor([[True, True, False], [True, False, False]])
    with pytest.raises(ValueError, match="expected as many rows as routing_map chooses, 3, got 4"):
        permute(torch.zeros(2, 4), torch.zeros(2, 3), chosen, top_k=2)
    even = torch.tensor([[True, True, True], [True, False, False]])  # as many rows, not as many a token
    with pytest.raises(ValueError, match="expected a width of at least a token's rows, 3, got 2"):
        permute(torch.zeros(2, 4), torch.zeros(2, 3), even, top_k=2)
    with pytest.raises(ValueError, match="expected at least 12 rows for multiples of 4, got 8"):
        torch.ops.r1mega.row_map(even, 8, 3, 4)


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_the_kernels_checks_say_what_was_expected_and_what_came() -> None:
    ops, map_TE = torch.ops.r1mega, torch.ones(2, 3, dtype=torch.bool)
    row_map = map_rows(map_TE, 3)
    row_tokens, token_rows, row_experts = row_map[:3]
    tokens, rows = torch.zeros(2, 4), torch.zeros(6, 4)
    for call, error, text in (
        (lambda: ops.row_map(map_TE.int(), 6, 3, 1), ValueError, "row_map: expected routing_map of bool, got Int"),
        (lambda: ops.row_map(map_TE[0], 6, 3, 1), ValueError, r"expected routing_map \[T, E\], got 1 dim"),
        (lambda: ops.row_map(map_TE, 6, 3, 0), ValueError, "expected a multiple of at least 1, got 0"),
        (lambda: ops.permute(tokens[0], row_tokens, token_rows), ValueError, r"permute: expected tokens \[T, D\], got 1 dim"),
        (lambda: ops.permute(torch.zeros(4, 4), row_tokens, token_rows), ValueError, "expected a row of token_rows a token, 4, got 2"),
        (lambda: ops.permute(tokens, row_tokens + 1, token_rows), IndexError, "permute: expected tokens from -1 to 1, got 2"),
        (lambda: ops.permute(tokens, row_tokens.int(), token_rows), ValueError, r"expected row_tokens \[R\] of int64, got \[6\] of Int"),
        (lambda: ops.permute_probs(tokens, row_tokens, row_tokens), ValueError, r"row_experts \[R\] of int32, got .* of Long"),
        (lambda: ops.permute_probs(tokens[:, :2], row_tokens, row_experts), IndexError, "expected experts from 0 to 1, got 2"),
        (lambda: ops.unpermute(rows, token_rows + 1, row_tokens), IndexError, "unpermute: expected rows from -1 to 5, got 6"),
        (lambda: ops.unpermute(rows, token_rows, row_tokens, torch.ones(5)), ValueError, r"expected row_probs of \[6\] and a floating"),
        (lambda: ops.unpermute(rows.int(), token_rows, row_tokens), ValueError, "expected rows of a floating type, got Int"),
        (
            lambda: ops.permute_quantize(tokens.half(), row_tokens, token_rows, False),
            ValueError,
            "permute_quantize: expected tokens of bfloat16 or float32, got Half",
        ),
        (
            lambda: ops.permute_quantize_columns(tokens, row_tokens + 1, token_rows, False),
            IndexError,
            "permute_quantize_columns: expected tokens from -1 to 1, got 2",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            call()
