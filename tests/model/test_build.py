"""The model from its config: the presets' sizes on the meta device, MTP switched off, the bias that balances experts."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from r1mega.config.compose import compose
from r1mega.config.model import ModelConfig
from r1mega.config.run import ParallelConfig
from tests.train.cases import MODEL, OPTIM, one_rank


def preset(name: str) -> ModelConfig:
    return compose("pretrain", [f"model={name}", "data.train={x:1}", "trainer.steps=2000", "data.sequence_length=1024"]).model


def layer_sizes(m: ModelConfig) -> tuple[int, int, int]:
    """Weights of attention with both norms, of a dense FFN, of a MoE layer's FFN with its gate and bias: on paper."""
    head = m.qk_nope_head_dim + m.qk_rope_head_dim
    query = m.hidden_size * m.num_heads * head
    if m.q_lora_rank:
        query = m.hidden_size * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * m.num_heads * head
    latent = m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
    values = m.kv_lora_rank * m.num_heads * (m.qk_nope_head_dim + m.v_head_dim) + m.num_heads * m.v_head_dim * m.hidden_size
    expert = 3 * m.hidden_size * m.moe_ffn_size
    gate = m.num_experts * (m.hidden_size + m.use_expert_bias)
    return (
        query + latent + values + 2 * m.hidden_size,
        3 * m.hidden_size * m.ffn_size,
        (m.num_experts + m.num_shared_experts) * expert + gate,
    )


def on_paper(m: ModelConfig) -> int:
    attention, dense, mixture = layer_sizes(m)
    ends = (1 if m.tie_embeddings else 2) * m.vocab_size * m.hidden_size + m.hidden_size
    return ends + m.num_layers * attention + m.first_k_dense * dense + (m.num_layers - m.first_k_dense) * mixture


def meta_model(model: ModelConfig):
    mesh = one_rank()
    from r1mega.model.build import build_stages, transformer_config

    (built,) = build_stages(model, transformer_config(model, ParallelConfig(), torch.bfloat16, meta=True), mesh.megatron_groups())
    return built


@pytest.mark.parametrize(
    "name, total",
    [
        ("deepseek_v3", 671_026_419_200),
        ("moonlight_16b", 15_960_110_208),
        ("deepseek_v2_lite", 15_706_484_224),
        ("small", 722_603_872),
        ("tiny", 1_793_712),
    ],
)
def test_presets_have_their_published_sizes(name: str, total: int) -> None:
    from r1mega.model.build import count_parameters

    began, model = time.monotonic(), preset(name)
    built = meta_model(model)
    assert all(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    assert count_parameters(built) == on_paper(model) == total
    extra = count_parameters(built, mtp=True) - total
    attention, _, mixture = layer_sizes(model)
    # the MTP block: a MoE layer, the projection of the two halves, norms of each half and of the end
    assert extra == model.num_mtp_layers * (attention + mixture + 2 * model.hidden_size**2 + 3 * model.hidden_size)
    assert time.monotonic() - began < 60


def test_small_has_about_a_fifth_of_a_billion_active() -> None:
    model = preset("small")
    resting = (
        (model.num_layers - model.first_k_dense) * (model.num_experts - model.top_k) * 3 * model.hidden_size * model.moe_ffn_size
    )
    assert 0.15e9 < on_paper(model) - resting < 0.25e9


@pytest.fixture(scope="module")
def trainee():
    from r1mega.train.trainee import Trainee

    return Trainee(replace(MODEL, expert_bias_update_rate=0.01), OPTIM, one_rank(), "fp32")


def test_without_mtp_the_main_head_is_unchanged_and_the_switch_comes_back(trainee) -> None:
    from r1mega.model.build import without_mtp
    from r1mega.model.forward import TokenTensors, logits, token_losses

    tokens = torch.randint(0, MODEL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    labels, model = tokens.roll(-1, 1), trainee.model.eval()
    batch = TokenTensors(tokens, labels, torch.ones(2, 12))
    with torch.no_grad():
        with_mtp = token_losses(model, batch)
        free = torch.nn.functional.cross_entropy(logits(model, tokens).flatten(0, 1), labels.flatten(), reduction="none").view(
            2, 12
        )
        with pytest.raises(ZeroDivisionError), without_mtp(trainee.module):
            assert trainee.module.config.mtp_num_layers is None and not trainee.module.mtp_process
            raise ZeroDivisionError
    assert trainee.module.config.mtp_num_layers == 1 and trainee.module.mtp_process
    torch.testing.assert_close(with_mtp, free, atol=1e-5, rtol=1e-5)


def test_the_bias_of_a_busy_expert_goes_down_by_the_rate_and_of_an_idle_one_up(trainee) -> None:
    from r1mega.model.forward import TokenTensors, token_losses
    from r1mega.train.fit import masked_sum

    router = trainee.routers()[0]
    router.expert_bias.zero_()
    router.expert_bias[2] = 5.0  # all tokens take it
    tokens = torch.randint(0, MODEL.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))
    before = router.expert_bias.clone()
    result = trainee.step(
        [TokenTensors(tokens, tokens.roll(-1, 1), torch.ones(4, 12))], token_losses, masked_sum, 1e-3, lambda loss, norm: ""
    )
    load = torch.tensor(result.expert_load[0])
    assert load[2] == pytest.approx(1 / MODEL.top_k) and load.sum() == pytest.approx(1)
    torch.testing.assert_close(router.expert_bias - before, 0.01 * torch.sign(1 / MODEL.num_experts - load), atol=1e-6, rtol=0)
    assert router.expert_bias[2] < before[2] and (router.expert_bias > before).any()


def test_the_bias_decides_who_is_chosen_and_not_with_which_weight(trainee) -> None:
    router = trainee.routers()[0]
    hidden = torch.randn(10, 1, MODEL.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        trainee.model.eval()
        scores = torch.sigmoid(hidden.view(10, -1) @ router.weight.T)
        router.expert_bias.zero_()
        plain, plain_map = router(hidden)
        router.expert_bias[6:] = 5.0  # the two experts of the last group
        probs, chosen = router(hidden)
    assert chosen[:, 6:].all() and not plain_map[:, 6:].all()
    for gates, taken in ((plain, plain_map), (probs, chosen)):
        assert (taken.sum(1) == MODEL.top_k).all()
        wanted = torch.where(taken, scores, 0.0)
        wanted = MODEL.routed_scaling_factor * wanted / wanted.sum(1, keepdim=True)
        torch.testing.assert_close(gates, wanted, atol=1e-6, rtol=1e-5)


def test_chosen_experts_lie_in_the_kept_groups(trainee) -> None:
    router = trainee.routers()[0]
    router.expert_bias.zero_()
    hidden = torch.randn(50, 1, MODEL.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, chosen = router(hidden)
        scores = torch.sigmoid(hidden.view(50, -1) @ router.weight.T).view(50, MODEL.num_groups, -1)
    kept = scores.topk(2, dim=-1).values.sum(-1).topk(MODEL.topk_groups, dim=-1).indices
    used = chosen.view(50, MODEL.num_groups, -1).any(-1)
    assert torch.equal(used.nonzero()[:, 1].view(50, -1), kept.sort(1).values)
