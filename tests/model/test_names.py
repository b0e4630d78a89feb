"""The name table against an unpatched transformers: the same logits from an exported folder; what cannot be exported is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.model.names import hf_config, to_hf
from r1mega.train.policy import Policy
from tests.model.test_build import preset
from tests.train.cases import one_rank

BASE = ModelConfig(
    vocab_size=96,
    max_position_embeddings=256,
    hidden_size=48,
    num_layers=3,
    num_heads=3,
    q_lora_rank=None,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    first_k_dense=1,
    ffn_size=72,
    moe_ffn_size=24,
    num_experts=8,
    num_shared_experts=1,
    top_k=4,
    num_groups=4,
    topk_groups=2,
    init_std=0.1,
)
CASES = {
    "plain": {},
    "query_latent_and_mtp": {"q_lora_rank": 20, "num_mtp_layers": 1},
    "yarn": {"yarn": YarnConfig(factor=4.0, original_max_position_embeddings=64), "num_mtp_layers": 1},
    "yarn_mscale": {
        "yarn": YarnConfig(factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.5),
        "q_lora_rank": 30,
    },
    "one_group_eps": {"num_groups": 1, "topk_groups": 1, "top_k": 3, "rms_norm_eps": 1e-5, "routed_scaling_factor": 1.0},
    "all_moe_two_shared": {"first_k_dense": 0, "num_shared_experts": 2, "v_head_dim": 16},
    "two_dense_eight_groups": {
        "first_k_dense": 2,
        "num_experts": 16,
        "num_groups": 8,
        "topk_groups": 3,
        "top_k": 6,
        "num_mtp_layers": 1,
    },
    "tied_two_groups": {"tie_embeddings": True, "num_groups": 2, "topk_groups": 1, "top_k": 2, "rope_theta": 50000.0},
}


def randomise(policy: Policy) -> None:
    """Expert biases and norm weights that are not what a fresh model has."""
    draw = torch.Generator().manual_seed(3)
    for name, tensor in policy.trainee.named_tensors():
        if name.endswith("expert_bias"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draw))
        elif "norm" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))


def folder_of(policy: Policy, folder: Path) -> Path:
    described = policy.published_config(bos_id=0, eos_id=1, pad_id=2)
    (folder / "config.json").write_text(json.dumps(described))
    tensors = {name: tensor.clone().contiguous() for name, tensor in policy.published_tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_logits(policy: Policy, folder: Path, length: int = 40) -> None:
    from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

    published = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(published) is DeepseekV3ForCausalLM
    vocab = policy.model_config.vocab_size
    tokens = torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = published(tokens).logits
    got = policy.score([SimpleNamespace(tokens_BS=tokens)], lambda logits, batch: logits)[0]
    assert want.std() > 0.05, "the logits say something"
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    policy = Policy(replace(BASE, **CASES[case]), None, one_rank(), "fp32")
    randomise(policy)
    assert_same_logits(policy, folder_of(policy, tmp_path))


def test_tiny_logits_are_those_of_transformers(tmp_path: Path) -> None:
    policy = Policy(preset("tiny"), None, one_rank(), "fp32")
    randomise(policy)
    assert_same_logits(policy, folder_of(policy, tmp_path))


def published(**changes) -> dict:
    return hf_config(replace(BASE, **changes), bos_id=0, eos_id=1, pad_id=2, dtype="float32")


def test_what_the_published_format_cannot_say_is_refused() -> None:
    with pytest.raises(UserError, match="model.score_function: .* got softmax"):
        published(score_function="softmax")
    with pytest.raises(UserError, match="model.topk_groups: .* got 4 / 4; use topk_groups=2"):
        published(topk_groups=4)
    with pytest.raises(UserError, match="model.norm_topk_prob"):
        published(norm_topk_prob=False)


def test_every_tensor_needs_a_row() -> None:
    for name in ("decoder.layers.0.self_attention.linear_qkv.weight", "extra.weight", "decoder.layers.0.enorm.weight"):
        with pytest.raises(UserError, match=f"got {name}; add its row"):
            list(to_hf(BASE, [(name, torch.zeros(1))]))


def test_names_by_hand() -> None:
    model = replace(BASE, num_mtp_layers=1)
    stack = torch.arange(2 * 4 * 3.0).view(2, 4, 3)  # two experts, gate and up of width 2
    named = {
        "embedding.word_embeddings.weight": torch.zeros(2),
        "decoder.layers.1.mlp.experts.weight1": stack,
        "mtp.layers.0.transformer_layer.input_layernorm.weight": torch.ones(2),
        "mtp.layers.0.eh_proj.weight": torch.ones(3),
    }
    got = dict(to_hf(model, named.items(), first_layer=4))
    assert list(got) == [
        "model.embed_tokens.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.5.mlp.experts.0.gate_proj.weight",
        "model.layers.5.mlp.experts.0.up_proj.weight",
        "model.layers.5.mlp.experts.1.gate_proj.weight",
        "model.layers.5.mlp.experts.1.up_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.eh_proj.weight",
    ]
    assert torch.equal(got["model.layers.5.mlp.experts.1.up_proj.weight"], stack[1, 2:])
    tied = dict(to_hf(replace(BASE, tie_embeddings=True), [("output_layer.weight", torch.zeros(1))]))
    assert tied == {}


def test_yarn_is_written_in_both_forms_and_left_out_without_it() -> None:
    config = published(yarn=YarnConfig(factor=4.0, original_max_position_embeddings=64))
    assert (
        config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "yarn" and config["rope_scaling"]["factor"] == 4.0
    )
    assert config["rope_parameters"] == {**config["rope_scaling"], "rope_theta": 10000.0}
    assert "rope_scaling" not in published() and published()["rope_parameters"]["rope_type"] == "default"
