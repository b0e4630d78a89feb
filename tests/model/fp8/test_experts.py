"""Experts with FP8 products: near the experts in bf16, rows that are sorted as good as tokens, whole models that learn alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig
from r1mega.config.run import PrecisionConfig
from r1mega.model.fp8.weights import Recipe
from r1mega.model.gradients import WeightGradients
from r1mega.train.trainee import Trainee
from tests.model.fp8.test_linear import FP8_ERROR, error
from tests.train.cases import MODEL, OPTIM, one_rank

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCKY = replace(MODEL, hidden_size=128, moe_ffn_size=128, ffn_size=256)
FP8 = PrecisionConfig(dtype="bf16", products="fp8")
FP8_RECIPE, BF16_GRADIENTS = Recipe(), Recipe(expert_weight_gradients="bf16")


def grouped(device: str, main_grad: bool = False, recipe: Recipe = FP8_RECIPE):
    """Four experts of widths 128 and 256 and their plain twin, in bf16."""
    from r1mega.config.run import ParallelConfig
    from r1mega.model.build import transformer_config
    from r1mega.model.experts import GroupedExperts

    mesh = one_rank()  # the experts' own work needs no messages: they are moved to the device
    model = replace(BLOCKY, hidden_size=256, num_experts=4, num_groups=1, topk_groups=1, top_k=2)
    config = transformer_config(model, ParallelConfig(), torch.bfloat16)
    groups = mesh.megatron_groups()
    made = [GroupedExperts(4, config, pg_collection=groups).to(device) for _ in range(2)]
    draw = torch.Generator().manual_seed(3)
    for name in ("weight1", "weight2"):
        values = 0.1 * torch.randn(getattr(made[0], name).shape, generator=draw)
        for one in made:
            getattr(one, name).data.copy_(values)
            if main_grad:
                getattr(one, name).main_grad = torch.zeros_like(getattr(one, name), dtype=torch.float32)
    made[0].fp8 = recipe
    return made


def chosen(num_tokens: int, device: str, seed: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, probabilities and map of two experts each; expert 3 has none."""
    draw = torch.Generator().manual_seed(seed)
    map_TE = torch.zeros(num_tokens, 4, dtype=torch.bool)
    map_TE.scatter_(1, torch.rand(num_tokens, 3, generator=draw).topk(2, dim=1).indices, True)
    probs = torch.rand(num_tokens, 4, generator=draw)
    tokens = torch.randn(num_tokens, 256, generator=draw).bfloat16()
    return tokens.to(device), probs.to(device), map_TE.to(device)


def plain(experts, tokens_TD, probs_TE, map_TE):
    from r1mega.ops.permute import permute, unpermute

    got = permute(tokens_TD, probs_TE, map_TE, 2)
    return unpermute(experts(got.rows_RD, got.counts_E, got.probs_R)[0], got.row_map)


def by_rows(experts, tokens_TD, probs_TE, map_TE):
    """What a dispatcher does that has brought the rows here."""
    return plain(experts, tokens_TD, probs_TE, map_TE)


def by_tokens(experts, tokens_TD, probs_TE, map_TE):
    return experts.on_tokens(tokens_TD, probs_TE, map_TE, 2)


def run(call, experts, tokens_TD, probs_TE, map_TE) -> list[torch.Tensor]:
    tokens, probs = tokens_TD.detach().requires_grad_(), probs_TE.detach().requires_grad_()
    out = call(experts, tokens, probs, map_TE)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    out.backward(weights)
    own = [experts.weight1, experts.weight2]
    grads = [weight.main_grad if hasattr(weight, "main_grad") else weight.grad for weight in own]
    return [out.detach(), tokens.grad, probs.grad, *grads]


@pytest.mark.parametrize("recipe", [FP8_RECIPE, BF16_GRADIENTS])
@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("num_tokens", [300, 1])
@pytest.mark.parametrize("call", [by_tokens, by_rows])
@pytest.mark.parametrize("device", DEVICES)
def test_answers_and_gradients_are_near_those_of_the_plain_experts(device, call, num_tokens, main_grad, recipe) -> None:
    ours, theirs = grouped(device, main_grad, recipe)
    given = chosen(num_tokens, device)
    found, want = run(call, ours, *given), run(plain, theirs, *given)
    for one, true in zip(found, want, strict=True):
        assert one.dtype == true.dtype and one.shape == true.shape
        assert error(one, true) < 2 * FP8_ERROR  # of up to three products behind each other
    assert not found[-1][3].any() and not found[2][~given[2]].any()  # nothing for an expert without tokens, or not chosen


@pytest.mark.parametrize("recipe", [FP8_RECIPE, BF16_GRADIENTS])
@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_are_no_trouble(device, recipe) -> None:
    ours, _ = grouped(device, main_grad=True, recipe=recipe)
    found = run(by_tokens, ours, *chosen(0, device))
    assert found[0].shape == (0, 256) and not found[3].any() and not found[4].any()


@pytest.mark.parametrize("recipe", [FP8_RECIPE, BF16_GRADIENTS])
def test_weight_gradients_can_come_later(recipe) -> None:
    ours, theirs = grouped("cpu", main_grad=True, recipe=recipe)
    theirs.fp8 = recipe
    given, store = chosen(40, "cpu"), WeightGradients()
    run(by_tokens, ours, *given)
    with store.collect("here"):
        late = run(by_tokens, theirs, *given)
    assert not late[3].any() and not late[4].any()
    store.run("here")
    assert torch.equal(ours.weight1.main_grad, theirs.weight1.main_grad)
    assert torch.equal(ours.weight2.main_grad, theirs.weight2.main_grad)


def batches(steps: int):
    """Sequences that count up by one of three strides, so that there is something to learn."""
    from r1mega.model.forward import TokenTensors

    draw = torch.Generator().manual_seed(11)
    for _ in range(steps):
        start, stride = torch.randint(0, 64, (8, 1), generator=draw), torch.randint(1, 4, (8, 1), generator=draw)
        whole = (start + stride * torch.arange(33)) % 64
        yield TokenTensors(whole[:, :-1], whole[:, 1:], torch.ones(8, 32))


def losses(precision: PrecisionConfig, steps: int = 16) -> list[float]:
    from r1mega.model.forward import token_losses
    from r1mega.train.fit import masked_sum

    torch.manual_seed(5)
    trainee = Trainee(BLOCKY, OPTIM, one_rank(), precision)
    return [trainee.step([batch], token_losses, masked_sum, 3e-3, lambda loss, norm: "").loss for batch in batches(steps)]


def test_a_model_learns_as_in_bf16() -> None:
    fp8, bf16 = losses(FP8), losses(PrecisionConfig(dtype="bf16"))
    assert fp8 != bf16 and bf16[-1] < 0.8 * bf16[0]
    assert abs(fp8[-1] - bf16[-1]) < 0.05 * bf16[0]


def test_the_layers_of_whole_blocks_are_in_fp8_and_head_router_and_norms_are_not() -> None:
    trainee = Trainee(BLOCKY, None, one_rank(), FP8)
    kinds = {name: getattr(module, "fp8", None) for name, module in trainee.module.named_modules() if hasattr(module, "fp8")}
    on = {name for name, recipe in kinds.items() if recipe}
    assert any(name.endswith("mlp.experts") for name in on) and any(name.endswith("shared_experts.linear_fc1") for name in on)
    assert "output_layer" in kinds and "output_layer" not in on and not any("router" in name or "norm" in name for name in on)


def test_experts_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="model.moe_ffn_size: a multiple of 128 with precision.products=fp8; got 64"):
        Trainee(replace(BLOCKY, moe_ffn_size=64), None, one_rank(), FP8)


def test_the_model_config_of_these_tests_has_every_part() -> None:
    assert isinstance(BLOCKY, ModelConfig) and BLOCKY.num_layers > BLOCKY.first_k_dense > 0 and BLOCKY.num_shared_experts
