"""``config.json`` both ways: what real files say, the inverse, a refusal for each meaning that is not computed here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.model.published import block_scales, model_of, published_config
from tests.model.test_build import preset

YARN = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096, "type": "yarn"}
COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
}
V3: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "deepseek_v3",
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
SIXTEEN: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "topk_group": 1,
}
V2_LITE = COMMON | {
    **SIXTEEN,
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "intermediate_size": 10944,
    "max_position_embeddings": 163840,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "vocab_size": 102400,
}
MOONLIGHT = COMMON | {
    **SIXTEEN,
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "model_type": "deepseek_v3",
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 163840,
}
UNHELD = ("name", "vocab_padding", "expert_bias_update_rate", "mtp_loss_coef")
"""Fields that no published config holds."""


def held(model: ModelConfig) -> ModelConfig:
    """``model`` with defaults where a published config holds nothing."""
    usual = {field: getattr(ModelConfig(), field) for field in UNHELD}
    if not model.use_expert_bias:
        usual["expert_bias_update_rate"] = 0.0
    yarn = model.yarn if model.yarn.factor > 1 else YarnConfig()
    return replace(model, **usual, yarn=yarn, vocab_size=model.vocab_size - model.vocab_padding)


@pytest.mark.parametrize("name, config", [("deepseek_v3", V3), ("deepseek_v2_lite", V2_LITE), ("moonlight_16b", MOONLIGHT)])
def test_the_files_of_published_models_are_our_presets(name: str, config: dict[str, Any]) -> None:
    training = {"init_std": 0.02, "seq_aux_loss_coef": 0.001}  # as the files have them
    assert model_of(config, "config.json") == replace(held(preset(name)), **training)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_lite", "moonlight_16b", "small", "tiny"])
def test_published_config_and_model_of_are_inverse(name: str) -> None:
    model = preset(name)
    config = published_config(model, bos_id=0, eos_id=1, pad_id=2, dtype="bfloat16")
    assert model_of(config, "config.json") == held(model)
    again = published_config(model_of(config, "config.json"), bos_id=0, eos_id=1, pad_id=2, dtype="bfloat16")
    assert again == config


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_padding": 7, "tie_embeddings": True, "num_shared_experts": 0},
        {"use_expert_bias": False, "num_groups": 1, "topk_groups": 1, "top_k": 3},
        {"top_k": 1, "num_groups": 1, "topk_groups": 1, "norm_topk_prob": False},
        {"score_function": "softmax", "use_expert_bias": False, "topk_groups": 2, "top_k": 2, "norm_topk_prob": False},
        {"score_function": "softmax", "use_expert_bias": False, "topk_groups": 4, "routed_scaling_factor": 1.0},
        {"yarn": YarnConfig(factor=3.0, mscale=0.0, mscale_all_dim=0.0, beta_fast=16.0, beta_slow=2.0), "first_k_dense": 12},
    ],
)
def test_other_models_are_inverse_too(changes: dict[str, Any]) -> None:
    model = replace(ModelConfig(), **changes)
    config = published_config(model, bos_id=None, eos_id=None, pad_id=None, dtype="float32")
    assert model_of(config, "config.json") == held(model)


def test_what_transformers_saves_is_read() -> None:
    """A config of transformers 5: rope_parameters alone, no scoring_func or topk_method, its own bookkeeping."""
    from transformers import DeepseekV2Config, DeepseekV3Config

    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    config = DeepseekV3Config(rope_parameters=rope, max_position_embeddings=256, num_mtp_layers=0)
    model = model_of(config.to_dict(), "config.json")
    assert model.rope_theta == 5000.0 and model.score_function == "sigmoid" and model.use_expert_bias
    assert model.yarn == YarnConfig(factor=4.0, original_max_position_embeddings=64, mscale_all_dim=0.0)
    assert model.num_mtp_layers == 0 and model.num_groups == 8
    model = model_of(DeepseekV2Config(num_experts_per_tok=2).to_dict(), "config.json")
    assert model.score_function == "softmax" and (model.num_groups, model.topk_groups) == (1, 1) and model.yarn.factor == 1


def test_both_spellings_of_rope_and_of_mtp_mean_the_same() -> None:
    new = {key: value for key, value in V3.items() if key not in ("rope_scaling", "rope_theta", "num_nextn_predict_layers")}
    new |= {"rope_parameters": {**V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}, "num_mtp_layers": 1}
    assert model_of(new, "config.json") == model_of(V3, "config.json")


def test_groups_that_are_all_kept_limit_nothing() -> None:
    model = model_of({**V3, "topk_group": 8}, "config.json")
    assert (model.num_groups, model.topk_groups) == (1, 1)
    model = model_of({**V3, "topk_group": 8, "num_experts_per_tok": 16}, "config.json")
    assert (model.num_groups, model.topk_groups) == (8, 8), "as the file has it where Megatron computes it"


def test_fp8_is_recognised_with_both_kinds_of_scales() -> None:
    assert block_scales(V2_LITE, "c") is None and block_scales(V3, "c") == "float32"
    assert block_scales({"quantization_config": {**V3["quantization_config"], "scale_fmt": "ue8m0"}}, "c") == "ue8m0"


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (V3, {"attention_bias": True}, "attention_bias: false, which is all that is computed here; got true; "),
    (V3, {"attention_dropout": 0.1}, "attention_dropout: 0, which is .*; got 0.1"),
    (V3, {"hidden_act": "gelu"}, "hidden_act: silu, which is .*; got gelu"),
    (V3, {"mlp_bias": True}, "mlp_bias: false, .*; got true"),
    (V3, {"moe_layer_freq": 2}, "moe_layer_freq: 1, .*; got 2"),
    (V3, {"rope_interleave": False}, "rope_interleave: true, .*; got false"),
    (V3, {"sliding_window": 4096}, "sliding_window: null, .*; got 4096"),
    (V3, {"index_topk": 2048}, "index_topk: a key whose effect is known; got 2048; remove it from config.json if"),
    (V3, {"num_key_value_heads": 8}, "num_key_value_heads: num_attention_heads 128, .*; got 8"),
    (V3, {"qk_head_dim": 128}, r"qk_head_dim: qk_nope_head_dim \+ qk_rope_head_dim = 192; got 128"),
    (V3, {"architectures": ["LlamaForCausalLM"]}, "architectures: DeepseekV3ForCausalLM or .*V2.*; got LlamaForCausalLM"),
    (V3, {"architectures": None, "model_type": "kimi_k2"}, "architectures: .*; got model_type kimi_k2"),
    (V3, {"scoring_func": "softmax"}, "scoring_func: sigmoid with DeepseekV3ForCausalLM; got softmax; softmax is DeepseekV2For"),
    (V2_LITE, {"scoring_func": "sigmoid"}, "scoring_func: softmax with DeepseekV2ForCausalLM; got sigmoid"),
    (V3, {"topk_method": "group_limited_greedy"}, "topk_method: noaux_tc with .*V3.*; got group_limited_greedy"),
    (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method: greedy or group_limited_greedy with .*V2.*; got noaux_tc"),
    (V2_LITE, {"n_group": 8, "topk_group": 3}, "topk_method: with greedy one group: .*; got n_group 8; set n_group and topk_group"),
    (V3, {"topk_method": "greedy"}, "topk_method: with greedy one group.*; got n_group 8"),
    (
        V3,
        {"topk_group": 2},
        "topk_group: num_experts_per_tok / 2: .*V3.* its best 2, Megatron .*; got 2 with num_experts_per_tok 8",
    ),
    (
        V2_LITE,
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
        "topk_group: num_experts_per_tok / 1: .*V2.* its best 1, Megatron .*; got 3 with num_experts_per_tok 6",
    ),
    (V3, {"norm_topk_prob": False}, "norm_topk_prob: true, since Megatron normalises a sigmoid gate .*; got false"),
    (V2_LITE, {"norm_topk_prob": True, "routed_scaling_factor": 16.0}, "routed_scaling_factor: 1 where norm_topk_prob .*got 16.0"),
    (V3, {"num_nextn_predict_layers": 3}, "num_nextn_predict_layers: 0 or 1; got 3"),
    (V3, {"num_mtp_layers": 0}, "num_mtp_layers: num_nextn_predict_layers 1; got 0"),
    (V3, {"first_k_dense_replace": 61}, "first_k_dense_replace: below num_hidden_layers where there is an MTP layer; got 61"),
    (V3, {"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling: rope_type: default or yarn; got linear"),
    (V3, {"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope_scaling: rope_type: default or yarn; got dynamic"),
    (V3, {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor: every published config says it; got no such key"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "attention_factor": 1.0}}, "rope_scaling: attention_factor: .*; got 1.0"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "truncate": False}}, "rope_scaling: truncate: .*; got false"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 1, .*; got 0.5"),
    (V3, {"rope_scaling": "yarn"}, "rope_scaling: keys with values; got yarn"),
    (V3, {"rope_parameters": {"rope_theta": 10000.0}}, "rope_parameters: the same as rope_scaling; got"),
    (MOONLIGHT, {"rope_parameters": {"rope_theta": 10000.0}}, "rope_parameters: rope_theta 50000.0 as at the top; got 10000.0"),
    (V3, {"max_position_embeddings": 163841}, "model.max_position_embeddings: at most yarn.factor x"),
    (V3, {"hidden_size": "7168"}, "hidden_size: a whole number; got 7168"),
    (V3, {"rms_norm_eps": True}, "rms_norm_eps: a number; got true"),
    (V3, {"tie_word_embeddings": 1}, "tie_word_embeddings: true or false; got 1"),
    (V3, {"n_routed_experts": None}, "n_routed_experts: a whole number; got null"),
    (V3, {"kv_lora_rank": 0}, "an architecture that can be built; got kv_lora_rank at least 1, got 0"),
]


@pytest.mark.parametrize(
    "base, changes, said", REFUSED, ids=[f"{number}-{next(iter(c))}" for number, (_, c, _) in enumerate(REFUSED)]
)
def test_what_is_computed_otherwise_is_refused_by_name(base: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    model_of(base, "x/config.json")  # the change alone is at fault
    with pytest.raises(UserError, match=f"^x/config.json: .*{said}") as caught:
        model_of({**base, **changes}, "x/config.json")
    where, *rest = str(caught.value).split("; ")
    assert rest[0].startswith("got ") and len(rest) >= 2, "where: rule; got value; way out"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"quant_method": "gptq"}, "quant_method: fp8: .*; got gptq; give a BF16 checkpoint"),
        ({"fmt": "e5m2"}, "fmt: e4m3: .*; got e5m2"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size: .*; got \[64, 128\]"),
        ({"weight_block_size": None}, "weight_block_size: .*; got null"),
        ({"activation_scheme": "static"}, "activation_scheme: dynamic: .*; got static"),
        ({"scale_fmt": "e4m3"}, "scale_fmt: ue8m0, or none for fp32 scales; got e4m3"),
        ({"bits": 4}, "bits: a key whose effect is known; got 4"),
    ],
)
def test_other_quantisation_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^c: quantization_config: {said}"):
        model_of({**V3, "quantization_config": {**V3["quantization_config"], **changes}}, "c")


def test_missing_keys_are_all_named() -> None:
    without = {key: value for key, value in V3.items() if key not in ("kv_lora_rank", "norm_topk_prob", "q_lora_rank")}
    with pytest.raises(UserError, match="^c: kv_lora_rank, q_lora_rank, norm_topk_prob: each .*; got no such key; add it to"):
        model_of(without, "c")
    with pytest.raises(UserError, match="^c: rope_theta: every published config says it"):
        model_of({key: value for key, value in MOONLIGHT.items() if key != "rope_theta"}, "c")


def published(**changes: Any) -> dict[str, Any]:
    return published_config(replace(ModelConfig(), **changes), bos_id=0, eos_id=1, pad_id=2, dtype="float32")


def test_what_the_published_format_cannot_say_is_refused() -> None:
    with pytest.raises(UserError, match="model.top_k: 2 x model.topk_groups 4, .*; got 4"):
        published(topk_groups=4)
    with pytest.raises(UserError, match="model.norm_topk_prob"):
        published(norm_topk_prob=False)
    with pytest.raises(UserError, match="model.use_expert_bias: .*; got false; train with model.use_expert_bias=true"):
        published(use_expert_bias=False)
    softmax = {"score_function": "softmax", "use_expert_bias": False, "num_groups": 1, "topk_groups": 1}
    with pytest.raises(UserError, match="model.routed_scaling_factor: .*; got 2.5; use model.routed_scaling_factor=1.0"):
        published(**softmax)
    with pytest.raises(UserError, match="model.first_k_dense: .*; got 12 of 12 layers dense; use model.num_mtp_layers=0"):
        published(first_k_dense=12, num_mtp_layers=1)


def test_yarn_is_written_in_both_forms_and_left_out_without_it() -> None:
    config = published(yarn=YarnConfig(factor=4.0, original_max_position_embeddings=1024))
    scaling = config["rope_scaling"]
    assert scaling["type"] == scaling["rope_type"] == "yarn" and scaling["factor"] == 4.0
    assert config["rope_parameters"] == {**scaling, "rope_theta": 10000.0}
    assert "rope_scaling" not in published() and published()["rope_parameters"]["rope_type"] == "default"
