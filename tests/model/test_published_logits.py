"""Stock models' files, read by ``model_of`` and ``from_hf``: transformers' logits here, and the same files back to the bit."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from r1mega.model.names import from_hf, to_hf
from r1mega.model.published import model_of
from r1mega.train.policy import Policy
from tests.train.cases import one_rank

SMALL: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "intermediate_size": 72,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    "initializer_range": 0.12,
    "hidden_act": "silu",
}
"""V3's gate; SOFT over it is V2's."""
SOFT: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "norm_topk_prob": False,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
SHORT = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
STOCK: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3_query_latent": {"q_lora_rank": 20},
    "v3_yarn": {"q_lora_rank": 20, "rope_scaling": SHORT | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "v3_yarn_mscales_differ": {"rope_scaling": SHORT | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 16.0}},
    "v3_yarn_without_mscales": {"rope_scaling": SHORT},
    "v3_one_group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "v3_two_groups": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_hidden_layers": 5},
    "v3_eight_groups": {"n_group": 8, "n_routed_experts": 24, "topk_group": 3, "num_experts_per_tok": 6, "hidden_size": 64},
    "v3_all_groups_kept": {"topk_group": 4, "num_experts_per_tok": 3},
    "v3_all_moe": {"first_k_dense_replace": 0, "num_hidden_layers": 2, "hidden_size": 32},
    "v3_three_dense": {"first_k_dense_replace": 3, "num_hidden_layers": 5, "q_lora_rank": 16},
    "v3_two_shared": {"n_shared_experts": 2, "v_head_dim": 16, "qk_rope_head_dim": 16},
    "v3_tied": {"tie_word_embeddings": True},
    "v3_moonlight": {
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "num_experts_per_tok": 6,
        "n_routed_experts": 16,
    },
    "v3_top_one": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "v2": SOFT,
    "v2_query_latent_factor": SOFT | {"q_lora_rank": 20, "routed_scaling_factor": 3.0},
    "v2_yarn": SOFT | {"rope_scaling": SHORT | {"mscale": 0.707, "mscale_all_dim": 0.707}, "n_shared_experts": 2},
    "v2_yarn_mscales_differ": SOFT | {"rope_scaling": SHORT | {"mscale": 1.0, "mscale_all_dim": 0.3}},
    "v2_groups": SOFT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3, "num_experts_per_tok": 3},
    "v2_tied_dense": SOFT | {"tie_word_embeddings": True, "first_k_dense_replace": 3, "num_hidden_layers": 4},
    "v2_all_moe_eps": SOFT | {"first_k_dense_replace": 0, "rms_norm_eps": 1e-5, "hidden_size": 64, "num_experts_per_tok": 1},
    "v2_normalised_all_chosen": SOFT | {"norm_topk_prob": True, "num_experts_per_tok": 8},
}


def stock(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' model with random weights, norms and expert biases. ``config`` is copied: transformers writes into it."""
    from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

    soft = config["architectures"] == ["DeepseekV2ForCausalLM"]
    torch.manual_seed(len(str(config)))
    made = (
        AutoModelForCausalLM.from_config((DeepseekV2Config if soft else DeepseekV3Config)(**copy.deepcopy(config))).float().eval()
    )
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.2)
            elif "norm" in name:
                tensor.uniform_(0.4, 1.6)
    return made


def native_policy(config: dict[str, Any], files: dict[str, torch.Tensor]) -> Policy:
    """Our model of a published config with a published checkpoint's weights."""
    model = model_of(config, "config.json")
    policy, native = Policy(model, None, one_rank(), "fp32"), from_hf(model, files.items())
    named = dict(policy.trainee.named_tensors())
    assert named.keys() == native.keys()
    for key, tensor in named.items():
        tensor.copy_(native[key])
    return policy


def difference(policy: Policy, made: torch.nn.Module, length: int = 40) -> float:
    """Largest difference of the logits."""
    tokens = torch.randint(0, made.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = made(tokens).logits
    assert want.std() > 0.05, "the logits say something"
    (got,) = policy.score([SimpleNamespace(tokens_BS=tokens)], lambda logits, batch: logits)
    return float((got - want).abs().max())


def saved(made: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The files that transformers writes: an expert a matrix, not its fused tensors in memory."""
    made.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", STOCK)
def test_a_stock_models_files_give_its_logits_here_and_come_back_to_the_bit(case: str, tmp_path: Path) -> None:
    config = {**SMALL, **STOCK[case]}
    made = stock(config)
    files = saved(made, tmp_path)
    policy = native_policy(config, files)
    assert difference(policy, made) < 1e-4
    back = dict(to_hf(policy.model_config, policy.trainee.named_tensors()))
    assert back.keys() == files.keys() and all(torch.equal(back[name], files[name]) for name in files)
    described = json.loads((tmp_path / "config.json").read_text())  # as transformers 5 spells it
    assert "rope_parameters" in described and model_of(described, "config.json") == policy.model_config


def drawn(seed: int) -> dict[str, Any]:
    """A config at random; even seeds have V3's gate, odd ones V2's."""
    rng = random.Random(seed)
    soft, heads, layers = seed % 2 == 1, rng.choice([2, 4]), rng.randint(2, 5)
    groups, size = rng.choice([1, 2, 4, 8]), rng.choice([2, 3, 4])
    kept = rng.randint(1, groups)
    top_k = rng.randint(1, min(6, groups * size)) if groups == 1 else kept * (1 if soft else 2)
    yarn = SHORT | {"factor": rng.choice([2.0, 4.0, 8.0]), "mscale": rng.uniform(0.2, 1.5), "mscale_all_dim": rng.uniform(0.2, 1.5)}
    return {
        **SMALL,
        **(SOFT if soft else {}),
        "vocab_size": rng.randint(90, 110),
        "hidden_size": rng.choice([32, 40, 64]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice([None, 12, 24]),
        "kv_lora_rank": rng.choice([16, 24]),
        "qk_nope_head_dim": rng.choice([8, 14]),
        "qk_rope_head_dim": rng.choice([4, 8, 12]),
        "v_head_dim": rng.choice([8, 12]),
        "first_k_dense_replace": rng.choice([0, min(3, layers - 1)]),
        "n_routed_experts": groups * size,
        "n_shared_experts": rng.choice([1, 2]),
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": top_k,
        "topk_method": "noaux_tc" if not soft else "greedy" if groups == 1 else "group_limited_greedy",
        "norm_topk_prob": not soft and top_k > 1,
        "routed_scaling_factor": rng.uniform(0.5, 3.0),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "tie_word_embeddings": rng.random() < 0.3,
        "rope_theta": rng.choice([10000.0, 50000.0]),
        "rope_scaling": rng.choice([None, yarn]),
        "max_position_embeddings": 128,
    }


@pytest.mark.parametrize("seed", range(16))
def test_random_configs_too(seed: int, tmp_path: Path) -> None:
    config = drawn(seed)
    made = stock(config)
    files = saved(made, tmp_path)
    policy = native_policy(config, files)
    assert difference(policy, made) < 1e-4
    back = dict(to_hf(policy.model_config, policy.trainee.named_tensors()))
    assert back.keys() == files.keys() and all(torch.equal(back[name], files[name]) for name in files)


@pytest.mark.parametrize("fault", ["gate and up", "factor", "bias", "latent eps", "rope order", "two experts"])
def test_a_fault_shows_in_the_logits(fault: str, tmp_path: Path) -> None:
    """What the comparison above is worth: each single fault is far beyond its tolerance."""
    config = {**SMALL, "q_lora_rank": 20, "n_shared_experts": 2}
    made = stock(config)
    files = saved(made, tmp_path)
    expert = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    if fault == "gate and up":
        for number in range(8):
            gate, up = expert.format(number, "gate"), expert.format(number, "up")
            files[gate], files[up] = files[up], files[gate]
    if fault == "two experts":
        first, second = expert.format(0, "down"), expert.format(1, "down")
        files[first], files[second] = files[second], files[first]
    if fault == "bias":
        files["model.layers.1.mlp.gate.e_score_correction_bias"].zero_()
    if fault == "factor":
        config["routed_scaling_factor"] = 1.0
    if fault == "rope order":
        rows = files["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
        rows[24:] = rows[24:].view(4, 2, -1).transpose(0, 1).reshape(8, -1).clone()
    policy = native_policy(config, files)
    if fault == "latent eps":
        for layer in policy.trainee.module.decoder.layers:
            layer.self_attention.kv_layernorm.eps = 1e-3
    assert difference(policy, made) > 1e-3


def test_latent_norms_keep_their_epsilon_whatever_the_models_is() -> None:
    policy = Policy(model_of({**SMALL, **STOCK["v3_moonlight"], "q_lora_rank": 20}, "c"), None, one_rank(), "fp32")
    stage = policy.trainee.module
    layer = stage.decoder.layers[1]
    assert layer.self_attention.q_layernorm.eps == layer.self_attention.kv_layernorm.eps == 1e-6
    assert layer.input_layernorm.eps == layer.pre_mlp_layernorm.eps == stage.decoder.final_layernorm.eps == 1e-5


def test_v2_normalises_as_deepseeks_code_does_and_transformers_does_not(tmp_path: Path) -> None:
    """With the chosen weights divided by their sum in transformers' router, as DeepSeek's own V2 code does, logits are ours."""
    config = {**SMALL, **SOFT, "norm_topk_prob": True, "num_experts_per_tok": 3}
    made = stock(config)
    policy = native_policy(config, saved(made, tmp_path))
    assert difference(policy, made) > 1e-3, "transformers normalises V2's weights now: take the note out of published.py"

    def normalise(router, inputs, outputs):
        logits, weights, chosen = outputs
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    for layer in made.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(normalise)
    assert difference(policy, made) < 1e-4


def test_v3s_only_expert_is_not_normalised_as_in_deepseeks_code(tmp_path: Path) -> None:
    config = {**SMALL, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    made = stock(config)
    policy = native_policy(config, saved(made, tmp_path))
    assert difference(policy, made) > 1e-3, "transformers leaves a single weight as it is: take the note out of published.py"
    for layer in made.model.layers[1:]:
        layer.mlp.gate.norm_topk_prob = False
    assert difference(policy, made) < 1e-4


def test_an_mscale_of_zero_is_a_temperature_of_one(tmp_path: Path) -> None:
    """transformers takes both coefficients for missing when one is 0; given the number, its logits are ours."""
    config = {**SMALL, "rope_scaling": SHORT | {"mscale": 0.5, "mscale_all_dim": 0.0}}
    made = stock(config)
    policy = native_policy(config, saved(made, tmp_path))
    assert difference(policy, made) > 1e-3, "transformers knows an mscale_all_dim of 0: take the note out of published.py"
    made.model.rotary_emb.attention_scaling = 0.1 * 0.5 * torch.log(torch.tensor(4.0)).item() + 1
    assert difference(policy, made) < 1e-4
