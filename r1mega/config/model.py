"""The architecture: DeepSeek's MLA + MoE transformer with MTP and YaRN. Field names are ours; Hugging Face's are in the docs."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.knob import above, at_least, between, knob, one_of


@dataclass
class YarnConfig:
    """YaRN context extension of the rotary embedding (arXiv 2309.00071); off when ``factor`` is 1."""

    factor: float = knob(1.0, "context extension factor s; 1 switches YaRN off", "1", **at_least(1.0))
    original_max_position_embeddings: int = knob(4096, "context length before extension", "tokens", **at_least(1))
    beta_fast: float = knob(32.0, "rotations above which a frequency is left alone", "rotations", **above(0))
    beta_slow: float = knob(1.0, "rotations below which a frequency is fully interpolated", "rotations", **above(0))
    mscale: float = knob(1.0, "attention temperature coefficient of the rotary part", "1", **at_least(0))
    mscale_all_dim: float = knob(1.0, "attention temperature coefficient of the softmax scale", "1", **at_least(0))


@dataclass
class ModelConfig:
    """A DeepSeek-V2/V3-shaped decoder."""

    name: str = knob("custom", "preset's name, for logs and the model card", "name")
    vocab_size: int = knob(32768, "rows of embedding and head", "tokens", **at_least(2))
    vocab_padding: int = knob(0, "rows of vocab_size, the last ones, that are no tokens: not published", "tokens", **at_least(0))
    max_position_embeddings: int = knob(4096, "longest context", "tokens", **at_least(1))
    hidden_size: int = knob(1024, "residual width D", "1", **at_least(1))
    num_layers: int = knob(12, "decoder layers, MTP not counted", "layers", **at_least(1))
    num_heads: int = knob(16, "attention heads H", "heads", **at_least(1))
    q_lora_rank: int | None = knob(None, "query latent width; null: plain query projection", "1", **at_least(1))
    kv_lora_rank: int = knob(512, "key/value latent width", "1", **at_least(1))
    qk_nope_head_dim: int = knob(128, "query/key width a head without position", "1", **at_least(1))
    qk_rope_head_dim: int = knob(64, "query/key width a head with rotary position; even", "1", **at_least(2))
    v_head_dim: int = knob(128, "value width a head", "1", **at_least(1))
    rope_theta: float = knob(10000.0, "rotary base", "1", **above(0))
    yarn: YarnConfig = knob(YarnConfig, "YaRN context extension", "section")
    first_k_dense: int = knob(1, "leading layers with a dense FFN (first_k_dense_replace)", "layers", **at_least(0))
    ffn_size: int = knob(2816, "dense FFN width (intermediate_size)", "1", **at_least(1))
    moe_ffn_size: int = knob(512, "width F of one routed expert (moe_intermediate_size)", "1", **at_least(1))
    num_experts: int = knob(32, "routed experts E a layer (n_routed_experts)", "experts", **at_least(1))
    num_shared_experts: int = knob(1, "shared experts, fused into one FFN (n_shared_experts)", "experts", **at_least(0))
    top_k: int = knob(4, "routed experts a token (num_experts_per_tok)", "experts", **at_least(1))
    num_groups: int = knob(4, "expert groups (n_group)", "groups", **at_least(1))
    topk_groups: int = knob(2, "groups kept a token (topk_group)", "groups", **at_least(1))
    score_function: str = knob("sigmoid", "gate: sigmoid (V3) or softmax (V2)", "name", **one_of("sigmoid", "softmax"))
    norm_topk_prob: bool = knob(True, "normalise the chosen experts' weights to sum 1", "bool")
    routed_scaling_factor: float = knob(2.5, "factor on the routed experts' weights", "1", **above(0))
    use_expert_bias: bool = knob(True, "aux-loss-free balance: a bias in the choice of experts (V3 2.1.2)", "bool")
    expert_bias_update_rate: float = knob(1e-3, "bias step gamma after each update; 0 freezes", "1", **at_least(0))
    seq_aux_loss_coef: float = knob(1e-4, "sequence-wise balance loss alpha", "1", **at_least(0))
    num_mtp_layers: int = knob(0, "multi-token-prediction depth (num_nextn_predict_layers)", "layers", **between(0, 1))
    mtp_loss_coef: float = knob(0.3, "MTP loss weight lambda (V3: 0.3, late 0.1)", "1", **at_least(0))
    rms_norm_eps: float = knob(1e-6, "epsilon of the RMSNorms (latent norms always 1e-6)", "1", **above(0))
    init_std: float = knob(0.006, "standard deviation of initial weights (V3 4.2: 0.006)", "1", **above(0))
    tie_embeddings: bool = knob(False, "share embedding and head", "bool")
