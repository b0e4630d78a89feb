"""``config.json`` of DeepSeek's published formats in both directions: to a ModelConfig, and from one. No tensor, no torch.

A sigmoid gate is ``DeepseekV3ForCausalLM`` (V3, R1, Moonlight), a softmax gate ``DeepseekV2ForCausalLM`` (V2-Lite). A key that
changes the computation is mapped or refused by name; a key that is unknown is refused too. Where implementations differ, DeepSeek's
own code decides:

- V2, norm_topk_prob true: the chosen weights then sum to 1 and routed_scaling_factor is unused, so it must be 1. transformers 5.23
  never normalises in V2 (its logits are other ones); SGLang and vLLM normalise, and apply the factor.
- A gate of top-1 is never normalised, so norm_topk_prob is written false; transformers' V3 would normalise where it is true.
- V2, greedy with n_group above 1: groups are unused there, but not in SGLang and vLLM. Refused.
- Group score: V3's is the sum of a group's 2 best experts, V2's its best; Megatron sums num_experts_per_tok / topk_group. Mapped
  where these are one number, or where all groups are kept (which is one group); else refused.
- YaRN: mscale or mscale_all_dim of 0 is a temperature of 1, alone; transformers takes 0.1 ln(factor) + 1 for cos and sin as soon
  as one of them is 0. These are one number where mscale_all_dim is 0 and mscale is 1, which is what missing keys mean.
- Latent norms: eps 1e-6, whatever rms_norm_eps is (Moonlight: 1e-5).
- V3 with another topk_method than noaux_tc has no e_score_correction_bias, and DeepSeek's code refuses it. With one group it says
  what a model without the bias computes, so it is read and written as greedy; transformers and engines agree.

Fields that no published config holds come back with their defaults: ``name``, ``vocab_padding`` (the file's vocab_size is without
padding), ``expert_bias_update_rate`` (0 without the bias), ``mtp_loss_coef``, and ``yarn`` where its factor is 1. ``init_std`` and
``seq_aux_loss_coef`` are the file's initializer_range and aux_loss_alpha, or defaults; DeepSeek's own V3 file says 0.02 and 1e-3
there, which are not the report's 0.006 and 1e-4.
"""

from __future__ import annotations

from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.config.model_rules import check_model
from r1mega.config.rules import field_violations
from r1mega.model.published_keys import FIXED, IGNORED, KeyReader

V3, V2 = "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"
TYPES = {"deepseek_v3": V3, "deepseek_v2": V2}
GATES = {V3: "sigmoid", V2: "softmax"}
BLOCK = 128
"""Rows and columns of a block with one FP8 scale."""

SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "first_k_dense": "first_k_dense_replace",
    "ffn_size": "intermediate_size",
    "moe_ffn_size": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
}
"""Our field to the published key: whole numbers that every config must hold."""

MAPPED = frozenset(
    (*SIZES.values(), *FIXED, "num_key_value_heads", "q_lora_rank", "n_shared_experts", "n_group", "topk_group", "topk_method")
    + ("scoring_func", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim")
    + ("rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "quantization_config")
    + ("initializer_range", "aux_loss_alpha")
)
REQUIRED = (*SIZES.values(), "q_lora_rank", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps")
ROPE_KEYS = frozenset(
    "type rope_type rope_theta factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split()
)


def published_config(
    model: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None, dtype: str
) -> dict[str, Any]:
    """``config.json`` of ``model``, read by transformers, SGLang and vLLM alike. ``dtype``: "float32" or "bfloat16".

    Raises UserError where the published semantics differ from the trained model's.
    """
    check_model(model)
    sigmoid = model.score_function == "sigmoid"
    _refuse_unspoken(model)
    name = V3 if sigmoid else V2
    method = "noaux_tc" if model.use_expert_bias else "greedy" if model.num_groups == 1 else "group_limited_greedy"
    yarn = model.yarn
    rope: dict[str, Any] = {"rope_type": "default"}
    if yarn.factor > 1:
        rope = {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return {
        "architectures": [name],
        "model_type": next(kind for kind, architecture in TYPES.items() if architecture == name),
        **{key: getattr(model, field) for field, key in SIZES.items()},
        "vocab_size": model.vocab_size - model.vocab_padding,
        "num_key_value_heads": model.num_heads,
        "q_lora_rank": model.q_lora_rank,
        "num_nextn_predict_layers": model.num_mtp_layers,
        "n_shared_experts": model.num_shared_experts,
        "routed_scaling_factor": model.routed_scaling_factor,
        "n_group": model.num_groups,
        "topk_group": model.topk_groups,
        "moe_layer_freq": 1,
        "norm_topk_prob": model.norm_topk_prob and model.top_k > 1,
        "scoring_func": model.score_function,
        "topk_method": method,
        "aux_loss_alpha": model.seq_aux_loss_coef,
        "seq_aux": True,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": model.rope_theta,
        "rope_interleave": True,
        # both spellings: transformers 5 reads rope_parameters, older code and engines rope_theta and rope_scaling
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        **({"rope_scaling": dict(rope)} if yarn.factor > 1 else {}),
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


def _refuse_unspoken(model: ModelConfig) -> None:
    """Raise UserError for what a model here computes and no published config can say."""
    if model.score_function == "sigmoid" and not model.use_expert_bias and model.num_groups > 1:
        raise UserError(
            f"model.use_expert_bias: {V3} chooses by groups with e_score_correction_bias alone; got false; "
            "train with model.use_expert_bias=true model.expert_bias_update_rate=0, or with one group"
        )
    if model.score_function == "softmax" and model.norm_topk_prob and model.top_k > 1 and model.routed_scaling_factor != 1:
        raise UserError(
            f"model.routed_scaling_factor: {V2} does not scale weights that it normalises; got {model.routed_scaling_factor}; "
            "use model.routed_scaling_factor=1.0 or model.norm_topk_prob=false"
        )
    if model.num_mtp_layers and model.first_k_dense == model.num_layers:
        raise UserError(
            f"model.first_k_dense: the published MTP layer has experts; got {model.first_k_dense} of {model.num_layers} layers "
            "dense; use model.num_mtp_layers=0"
        )


def model_of(config: dict[str, Any], where: str) -> ModelConfig:
    """The architecture that a published ``config.json`` describes. ``where``: the file, for errors.

    Raises UserError for each key that is missing, unknown, or has a value that is not computed here.
    """
    read = KeyReader(config, where)
    name = _architecture(read)
    read.known(MAPPED | IGNORED)
    read.all_there(REQUIRED)
    read.fixed()
    block_scales(config, where)
    values: dict[str, Any] = {field: read.whole(key) for field, key in SIZES.items()}
    heads = read.optional("num_key_value_heads", values["num_heads"])
    if heads != values["num_heads"]:
        read.refuse("num_key_value_heads", f"num_attention_heads {values['num_heads']}, as latent attention has", heads)
    width = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    if read.optional("qk_head_dim", width) != width:
        read.refuse("qk_head_dim", f"qk_nope_head_dim + qk_rope_head_dim = {width}", config["qk_head_dim"])
    values |= _gate(read, name, values["top_k"])
    values |= _rope(read)
    values["q_lora_rank"] = None if config["q_lora_rank"] is None else read.whole("q_lora_rank")
    values["num_shared_experts"] = 0 if config["n_shared_experts"] is None else read.whole("n_shared_experts")
    values["num_mtp_layers"] = _mtp(read)
    if values["num_mtp_layers"] and values["first_k_dense"] >= values["num_layers"]:
        read.refuse("first_k_dense_replace", "below num_hidden_layers where there is an MTP layer", values["first_k_dense"])
    values["rms_norm_eps"] = read.number("rms_norm_eps")
    values["tie_embeddings"] = read.flag("tie_word_embeddings", False)
    for field, key in (("init_std", "initializer_range"), ("seq_aux_loss_coef", "aux_loss_alpha")):
        if config.get(key) is not None:
            values[field] = read.number(key)
    model = ModelConfig(**values)
    faults = "; ".join(f"{fault.where} {fault.rule}, got {fault.got}" for fault in field_violations(model))
    if faults:
        raise UserError(f"{where}: an architecture that can be built; got {faults}; correct config.json")
    try:
        check_model(model)
    except UserError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error
    return model


def block_scales(config: dict[str, Any], where: str) -> str | None:
    """How a checkpoint's linears are stored: None in plain dtypes, "float32" or "ue8m0" in FP8 with such scales a block.

    Raises UserError for any other quantisation.
    """
    held = config.get("quantization_config")
    if held is None:
        return None
    read = KeyReader(held if isinstance(held, dict) else {}, f"{where}: quantization_config")
    read.known({"quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt"})
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    for key, value in wanted.items():
        # fmt and activation_scheme have these values where transformers leaves them out
        got = read.config.get(key, value if key in ("fmt", "activation_scheme") else None)
        if got != value:
            read.refuse(key, f"{value}: FP8 e4m3 in blocks of {BLOCK} x {BLOCK} is read", got, "give a BF16 checkpoint")
    scales = read.config.get("scale_fmt")
    if scales not in (None, "ue8m0"):
        read.refuse("scale_fmt", "ue8m0, or none for fp32 scales", scales, "give a BF16 checkpoint")
    return scales or "float32"


def _architecture(read: KeyReader) -> str:
    named = read.config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        read.refuse("architectures", "a list of names", named, "give a checkpoint's own config.json")
    # the type decides where there is no architecture: a config that transformers saved without a model
    name = named[0] if named else TYPES.get(read.config.get("model_type", ""))
    if name not in GATES:
        got = name or f"model_type {read.config.get('model_type')}"
        read.refuse("architectures", f"{V3} or {V2}", got, "give a checkpoint of one of them")
    return name


def _gate(read: KeyReader, name: str, top_k: int) -> dict[str, Any]:
    """The fields of the gate."""
    score = read.optional("scoring_func", GATES[name])
    if score != GATES[name]:
        other = next(architecture for architecture, gate in GATES.items() if architecture != name)
        way = f"{GATES[other]} is {other}'s: correct architectures or scoring_func"
        read.refuse("scoring_func", f"{GATES[name]} with {name}", score, way)
    method = read.optional("topk_method", "noaux_tc" if name == V3 else "greedy")
    if method not in (("noaux_tc", "greedy") if name == V3 else ("greedy", "group_limited_greedy")):
        usual = "noaux_tc" if name == V3 else "greedy or group_limited_greedy"
        read.refuse("topk_method", f"{usual} with {name}", method)
    if name == V2 and method == "greedy":
        groups, kept = read.optional("n_group", 1), read.optional("topk_group", 1)
    else:
        groups, kept = read.whole("n_group"), read.whole("topk_group")
    if method == "greedy" and groups != 1:
        way = "set n_group and topk_group to 1 if groups are unused"
        read.refuse("topk_method", "with greedy one group: DeepSeek's code uses no more, engines do", f"n_group {groups}", way)
    best = 2 if name == V3 else 1
    if groups > 1 and kept == groups and top_k != best * kept:
        groups = kept = 1  # all are kept: no limit
    if groups > 1 and top_k != best * kept:
        rule = f"num_experts_per_tok / {best}: {name} scores a group by its best {best}, Megatron by that ratio"
        way = "use a model with one group, or with this ratio"
        read.refuse("topk_group", rule, f"{kept} with num_experts_per_tok {top_k}", way)
    return {
        "score_function": score,
        "use_expert_bias": method == "noaux_tc",
        **({} if method == "noaux_tc" else {"expert_bias_update_rate": 0.0}),
        "num_groups": groups,
        "topk_groups": kept,
        **_weights(read, name, top_k),
    }


def _weights(read: KeyReader, name: str, top_k: int) -> dict[str, Any]:
    """What becomes of the chosen experts' scores."""
    normalised, factor = read.flag("norm_topk_prob"), read.number("routed_scaling_factor")
    if top_k == 1:
        normalised = False  # DeepSeek's code normalises more than one weight only
    elif name == V3 and not normalised:
        read.refuse("norm_topk_prob", "true, since Megatron normalises a sigmoid gate with num_experts_per_tok above 1", normalised)
    elif name == V2 and normalised and factor != 1:
        rule = f"1 where norm_topk_prob is true: {V2} then leaves it out, and engines do not"
        read.refuse("routed_scaling_factor", rule, factor, "set it to 1.0 if the model was trained with DeepSeek's code")
    return {"norm_topk_prob": normalised, "routed_scaling_factor": factor}


def _mtp(read: KeyReader) -> int:
    """MTP layers; a config without the key has none (from_hf names the tensors of one that is there all the same)."""
    said = {key: read.whole(key) for key in ("num_nextn_predict_layers", "num_mtp_layers") if read.config.get(key) is not None}
    if len(set(said.values())) > 1:
        read.refuse("num_mtp_layers", f"num_nextn_predict_layers {said['num_nextn_predict_layers']}", said["num_mtp_layers"])
    depth = next(iter(said.values()), 0)
    if depth not in (0, 1):
        read.refuse(next(iter(said)), "0 or 1", depth)
    return depth


def _rope(read: KeyReader) -> dict[str, Any]:
    """Rotary base and YaRN, of either spelling; two that are there must agree."""
    found = {key: read.config[key] for key in ("rope_scaling", "rope_parameters") if read.config.get(key) is not None}
    for key, values in found.items():
        if not isinstance(values, dict):
            read.refuse(key, "keys with values", values)
    said = [_rope_of(read, key, {"rope_theta": read.config.get("rope_theta"), **values}) for key, values in found.items()]
    if not said:
        said.append(_rope_of(read, "rope_theta", {"rope_theta": read.present("rope_theta")}))
    if read.config.get("rope_theta") is not None and read.number("rope_theta") != said[-1]["rope_theta"]:
        read.refuse("rope_parameters", f"rope_theta {read.config['rope_theta']} as at the top", said[-1]["rope_theta"])
    if said[0] != said[-1]:
        read.refuse("rope_parameters", "the same as rope_scaling", found["rope_parameters"])
    return said[0]


def _rope_of(read: KeyReader, key: str, values: dict[str, Any]) -> dict[str, Any]:
    inner = KeyReader({name: value for name, value in values.items() if value is not None}, f"{read.where}: {key}")
    inner.fixed()
    kind = inner.optional("rope_type", inner.optional("type", "default"))
    if kind not in ("default", "yarn"):
        inner.refuse("rope_type", "default or yarn", kind)
    inner.known(ROPE_KEYS | {"partial_rotary_factor"} | ({"truncate"} if inner.config.get("truncate") is True else set()))
    fields: dict[str, Any] = {"rope_theta": inner.number("rope_theta")}
    if kind == "yarn":
        usual = YarnConfig()
        fields["yarn"] = YarnConfig(
            factor=inner.number("factor"),
            original_max_position_embeddings=inner.whole("original_max_position_embeddings"),
            beta_fast=inner.number("beta_fast", usual.beta_fast),
            beta_slow=inner.number("beta_slow", usual.beta_slow),
            # the defaults of DeepSeek's code, not ours
            mscale=inner.number("mscale", 1.0),
            mscale_all_dim=inner.number("mscale_all_dim", 0.0),
        )
    return fields
