"""The one table of names between Megatron-Core's model and Hugging Face's DeepSeek checkpoints.

Every consumer (export, rollout engine, weight push) walks :func:`to_hf`. Foreign names live here and nowhere else. In: named
tensors of one pipeline stage, whole along the tensor and expert axes; out: the same numbers under the published names, one matrix
an expert. ``N`` below is the number of decoder layers: DeepSeek stores the MTP block as layer N.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig

Named = Iterator[tuple[str, torch.Tensor]]


def _same(suffix: str) -> Callable[[str, torch.Tensor], Named]:
    def one(prefix: str, tensor: torch.Tensor) -> Named:
        yield prefix + suffix, tensor

    return one


def _gate_up(part: str) -> Callable[[str, torch.Tensor], Named]:
    """``[2F, D]`` (gate rows, then up rows) to two matrices."""

    def two(prefix: str, tensor: torch.Tensor) -> Named:
        gate, up = tensor.chunk(2, dim=0)
        yield f"{prefix}{part}.gate_proj.weight", gate
        yield f"{prefix}{part}.up_proj.weight", up

    return two


def _experts(down: bool) -> Callable[[str, torch.Tensor], Named]:
    """A stack over experts to one matrix (down) or two (gate, up) an expert.

    The stack is in logical order: who publishes weights has one rank for the experts, where none ever moves.
    """

    def each(prefix: str, tensor: torch.Tensor) -> Named:
        for expert, weight in enumerate(tensor.unbind(0)):
            if down:
                yield f"{prefix}mlp.experts.{expert}.down_proj.weight", weight
            else:
                yield from _gate_up(f"mlp.experts.{expert}")(prefix, weight)

    return each


LAYER: dict[str, Callable[[str, torch.Tensor], Named]] = {
    "input_layernorm.weight": _same("input_layernorm.weight"),
    "pre_mlp_layernorm.weight": _same("post_attention_layernorm.weight"),
    "self_attention.linear_q_proj.weight": _same("self_attn.q_proj.weight"),
    "self_attention.linear_q_down_proj.weight": _same("self_attn.q_a_proj.weight"),
    "self_attention.q_layernorm.weight": _same("self_attn.q_a_layernorm.weight"),
    "self_attention.linear_q_up_proj.weight": _same("self_attn.q_b_proj.weight"),
    "self_attention.linear_kv_down_proj.weight": _same("self_attn.kv_a_proj_with_mqa.weight"),
    "self_attention.kv_layernorm.weight": _same("self_attn.kv_a_layernorm.weight"),
    "self_attention.linear_kv_up_proj.weight": _same("self_attn.kv_b_proj.weight"),
    "self_attention.linear_proj.weight": _same("self_attn.o_proj.weight"),
    "mlp.linear_fc1.weight": _gate_up("mlp"),
    "mlp.linear_fc2.weight": _same("mlp.down_proj.weight"),
    "mlp.router.weight": _same("mlp.gate.weight"),
    "mlp.router.expert_bias": _same("mlp.gate.e_score_correction_bias"),
    "mlp.experts.weight1": _experts(down=False),
    "mlp.experts.weight2": _experts(down=True),
    "mlp.shared_experts.linear_fc1.weight": _gate_up("mlp.shared_experts"),
    "mlp.shared_experts.linear_fc2.weight": _same("mlp.shared_experts.down_proj.weight"),
}
"""Megatron's name inside a decoder layer to what it becomes below ``model.layers.i.``."""

MTP = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "final_layernorm.weight": "shared_head.norm.weight",
}
"""The MTP block's own parts, below ``model.layers.N.``; its decoder layer follows LAYER."""

TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class _Place:
    layer: int
    rest: str


def _place(name: str, num_layers: int, first_layer: int) -> _Place | None:
    """The published layer of a Megatron name and the rest of the name; None for embedding, final norm and head."""
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
        return _Place(first_layer + int(match[1]), match[2])
    if match := re.fullmatch(r"mtp\.layers\.(\d+)\.(?:(?:transformer_layer|mtp_model_layer)\.)?(.+)", name):
        return _Place(num_layers + int(match[1]), match[2])
    return None


def to_hf(model: ModelConfig, named: Iterable[tuple[str, torch.Tensor]], first_layer: int = 0) -> Named:
    """Yield ``(published name, tensor)`` for Megatron's named parameters and expert biases.

    ``first_layer``: the stage's offset on the pipeline axis. Tensors are views of the given ones, dtypes kept. The MTP block
    repeats embedding and head under its own layer, as published checkpoints do. Raises UserError for a name that is not in the
    table, so that nothing is dropped in silence.
    """
    for name, tensor in named:
        place = _place(name, model.num_layers, first_layer)
        if name in TOP:
            if name == "output_layer.weight" and model.tie_embeddings:
                continue
            yield TOP[name], tensor
            if model.num_mtp_layers and name != "decoder.final_layernorm.weight":
                part = "embed_tokens" if name.startswith("embedding") else "shared_head.head"
                yield f"model.layers.{model.num_layers}.{part}.weight", tensor
        elif place and place.rest in LAYER:
            yield from LAYER[place.rest](f"model.layers.{place.layer}.", tensor)
        elif place and name.startswith("mtp.") and place.rest in MTP:
            yield f"model.layers.{place.layer}.{MTP[place.rest]}", tensor
        else:
            raise UserError(f"model.names: every tensor is in the name table; got {name}; add its row")


def hf_config(model: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None, dtype: str) -> dict[str, Any]:
    """``config.json`` of the published format (``DeepseekV3ForCausalLM``), read by transformers and SGLang alike.

    ``dtype``: "float32" or "bfloat16". Raises UserError where the published semantics differ from the trained model's: a softmax
    gate (that is DeepseekV2) and a group score over another number of experts than two.
    """
    if model.score_function != "sigmoid":
        raise UserError(
            "model.score_function: DeepseekV3ForCausalLM has a sigmoid gate; got softmax; export it as DeepseekV2 (not there yet)"
        )
    if model.num_groups > 1 and model.top_k != 2 * model.topk_groups:
        raise UserError(
            "model.topk_groups: Megatron scores a group by its best top_k / topk_groups experts, the published model by 2; "
            f"got {model.top_k} / {model.topk_groups}; use topk_groups={model.top_k // 2}, or one group"
        )
    if model.top_k > 1 and not model.norm_topk_prob:
        raise UserError("model.norm_topk_prob: Megatron's sigmoid gate normalises for top_k above 1; got false; use true")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "moe_intermediate_size": model.moe_ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_nextn_predict_layers": model.num_mtp_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "n_shared_experts": model.num_shared_experts,
        "n_routed_experts": model.num_experts,
        "routed_scaling_factor": model.routed_scaling_factor,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "v_head_dim": model.v_head_dim,
        "n_group": model.num_groups,
        "topk_group": model.topk_groups,
        "num_experts_per_tok": model.top_k,
        "first_k_dense_replace": model.first_k_dense,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "aux_loss_alpha": model.seq_aux_loss_coef,
        "seq_aux": True,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": model.rope_theta,
        "rope_interleave": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if model.yarn.factor > 1:
        scaling = {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": model.yarn.factor,
            "original_max_position_embeddings": model.yarn.original_max_position_embeddings,
            "beta_fast": model.yarn.beta_fast,
            "beta_slow": model.yarn.beta_slow,
            "mscale": model.yarn.mscale,
            "mscale_all_dim": model.yarn.mscale_all_dim,
        }
        config["rope_scaling"] = scaling
        rope = {**scaling, "rope_theta": model.rope_theta}
    config["rope_parameters"] = rope
    return config
