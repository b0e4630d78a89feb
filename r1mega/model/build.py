"""Typed config to Megatron-Core's ``GPTModel`` through layer specs. Owns every Megatron option that the architecture decides.

In: ``ModelConfig``, a mesh's degrees, which rank holds which stages. Out: the Megatron config and this rank's stages, ``GPTModel``
each: the first takes ``[B, S]`` tokens, the last gives logits or per-token losses, between them go ``[S, B, D]`` activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from r1mega.compat.megatron_meta import on_meta
from r1mega.config.model import ModelConfig
from r1mega.config.run import ParallelConfig
from r1mega.config.stages import StagePlan, plan
from r1mega.model.attention import EXCHANGES, CoreAttention, LatentAttention
from r1mega.model.experts import GroupedExperts
from r1mega.model.fp8 import te
from r1mega.model.head import Head, LanguageModel
from r1mega.model.layers import LatentRMSNorm, RMSNorm
from r1mega.model.linear import split_weight_gradients
from r1mega.model.mlp import SharedMLP, dense_spec
from r1mega.model.moe import mixture_spec


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, *, meta: bool = False, products: str = "plain"
):
    """Megatron's config of ``model``. ``meta``: weights have shapes and no storage. ``products``: see ``precision.products``; "te"
    makes Transformer Engine's layers of it, and raises UserError where that is missing.
    """
    if products == "te":
        te.require()
    yarn = model.yarn.factor > 1
    has_groups = model.num_groups > 1
    std = model.init_std

    def init(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(weight, mean=0.0, std=std)

    return MLATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.ffn_size,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        qk_layernorm=True,
        rope_type="yarn" if yarn else "rope",
        rotary_base=model.rope_theta,
        rotary_scaling_factor=model.yarn.factor if yarn else 1.0,
        original_max_position_embeddings=model.yarn.original_max_position_embeddings,
        beta_fast=model.yarn.beta_fast,
        beta_slow=model.yarn.beta_slow,
        mscale=model.yarn.mscale,
        mscale_all_dim=model.yarn.mscale_all_dim if yarn else 0.0,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method=init,
        output_layer_init_method=init,
        embedding_init_method=init,
        num_moe_experts=model.num_experts,
        moe_layer_freq=[0] * model.first_k_dense + [1] * (model.num_layers - model.first_k_dense),
        moe_ffn_hidden_size=model.moe_ffn_size,
        moe_shared_expert_intermediate_size=model.num_shared_experts * model.moe_ffn_size or None,
        moe_router_topk=model.top_k,
        moe_router_num_groups=model.num_groups if has_groups else None,
        moe_router_group_topk=model.topk_groups if has_groups else None,
        moe_router_score_function=model.score_function,
        moe_router_pre_softmax=model.score_function == "softmax" and not model.norm_topk_prob,
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=model.use_expert_bias,
        moe_router_bias_update_rate=model.expert_bias_update_rate,
        moe_router_load_balancing_type="seq_aux_loss" if model.seq_aux_loss_coef else "none",
        moe_aux_loss_coeff=model.seq_aux_loss_coef,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        mtp_num_layers=model.num_mtp_layers or None,
        mtp_loss_scaling_factor=model.mtp_loss_coef,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        cp_comm_type=EXCHANGES[parallel.context_exchange],
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        use_cpu_initialization=False,
        init_model_with_meta_device=meta,
        deterministic_mode=False,
        variable_seq_lengths=True,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        **(te.OPTIONS if products == "te" else {}),
    )


def _layer(config: MLATransformerConfig, groups: ProcessGroupCollection, dispatcher: Any, *, moe: bool) -> ModuleSpec:
    """One decoder layer: MLA, then a dense FFN or DeepSeek's MoE."""
    column, row, experts = ColumnParallelLinear, RowParallelLinear, GroupedExperts
    if config.fp8:
        from r1mega.model.fp8.te_layers import TEColumnParallelLinear, TeExperts, TERowParallelLinear

        column, row, experts = TEColumnParallelLinear, TERowParallelLinear, TeExperts
    dense = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    shared = ModuleSpec(module=SharedMLP, submodules=dense) if config.moe_shared_expert_intermediate_size else None
    parts = MoESubmodules(experts=ModuleSpec(module=experts), shared_experts=shared)
    mixture = mixture_spec(parts, groups, dispatcher)
    attention = MLASelfAttentionSubmodules(
        linear_q_proj=column,
        linear_q_down_proj=column,
        linear_q_up_proj=column,
        linear_kv_down_proj=column,
        linear_kv_up_proj=column,
        core_attention=CoreAttention,
        linear_proj=row,
        q_layernorm=LatentRMSNorm,
        kv_layernorm=LatentRMSNorm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=LatentAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mixture if moe else dense_spec(dense, groups, config.ffn_hidden_size),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class _OurNorms(LocalSpecProvider):
    """Megatron's plain modules with our norm, for the MTP block's own slots."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm


class _Layout:
    """Where layers lie, as Megatron-Core asks for it: its own class cannot put the last stage on the first rank (a V)."""

    def __init__(self, plans: tuple[StagePlan, ...], placement: tuple[tuple[int, ...], ...], rank: int):
        self._stages, self._plans, self._rank = placement, plans, rank
        self.layout = [[self._held(plans[stage]) for stage in stages] for stages in placement]

    @staticmethod
    def _held(stage: StagePlan) -> list[LayerType]:
        parts = {LayerType.embedding: stage.embedding, LayerType.decoder: stage.num_layers, LayerType.mtp: stage.mtp}
        return [kind for kind, count in (parts | {LayerType.loss: stage.head}).items() for _ in range(count)]

    def get_num_layers_to_build(self, layer_type=LayerType.decoder, vp_stage=None, pp_rank=None) -> int:
        """Layers of a kind in one chunk."""
        return self.layout[self._rank if pp_rank is None else pp_rank][vp_stage or 0].count(layer_type)

    def get_layer_offset(self, layer_type=LayerType.decoder, vp_stage=None, pp_rank=None) -> int:
        """Layers of a kind before one chunk."""
        stage = self._stages[self._rank if pp_rank is None else pp_rank][vp_stage or 0]
        return sum(self._held(earlier).count(layer_type) for earlier in self._plans[:stage])


def build_stages(
    model: ModelConfig,
    config: MLATransformerConfig,
    groups: ProcessGroupCollection,
    placement: tuple[tuple[int, ...], ...] = ((0,),),
    stages: str | None = None,
    dispatcher: Any = None,
) -> list[LanguageModel]:
    """This rank's stages, in the order of ``placement``'s entry for its place on the pipeline axis.

    ``stages``: see ``parallel.stages``; ``dispatcher``: a choice, None for all-to-all. A stage that needs the embedding's weight
    without the embedding has a copy, marked ``shared``, which :class:`r1mega.train.gradients.EmbeddingCopy` keeps equal; on the
    embedding's own rank it is the same tensor.
    """
    num_stages = sum(map(len, placement))
    plans, rank = plan(model, num_stages, stages), groups.pp.rank()
    if num_stages > 1:
        config.pipeline_model_parallel_layout = _Layout(plans, placement, rank)
        config.pipeline_model_parallel_size = num_stages  # Megatron only asks whether there is more than one
        config.virtual_pipeline_model_parallel_size = len(placement[0])
    built = [
        _build_stage(model, config, groups, dispatcher, plans[stage], chunk if len(placement[0]) > 1 else None)
        for chunk, stage in enumerate(placement[rank])
    ]
    first = next((part for part in built if part.pre_process), None)
    for part in built:
        if first is not None and part is not first:
            _take_embedding(part, first)
        for parameter in part.parameters():
            # would give it a bucket of its own, and Megatron's checkpoint misplaces moments behind a padded bucket (its issue 504)
            parameter.__dict__.pop("shared_embedding", None)
    return built


def _build_stage(model: ModelConfig, config, groups, dispatcher, stage: StagePlan, chunk: int | None) -> LanguageModel:
    first, end = stage.first_layer, stage.first_layer + stage.num_layers
    layers = [_layer(config, groups, dispatcher, moe=index >= model.first_k_dense) for index in range(first, end)]
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    mtp = None
    if stage.mtp:
        # the MTP block is a MoE layer like the last one, wherever the first-k dense layers lie
        spec = _layer(config, groups, dispatcher, moe=model.num_layers > model.first_k_dense)
        mtp = get_gpt_mtp_block_spec_for_backend(config, spec, _OurNorms(), vp_stage=chunk, pp_rank=groups.pp.rank())
    with on_meta() if config.init_model_with_meta_device else contextlib.nullcontext():
        built = LanguageModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=stage.embedding,
            post_process=stage.head,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",
            mtp_block_spec=mtp,
            pg_collection=groups,
            vp_stage=chunk,
        )
    split_weight_gradients(built)
    if stage.head:
        built.output_layer.__class__ = Head
    if config.fp8:
        from r1mega.model.fp8.te_layers import sum_in_place

        sum_in_place(built)
    if stage.head and model.tie_embeddings and stage.mtp and not stage.embedding:
        built.output_layer.weight = None  # the copy of the embedding serves head and MTP alike; Megatron makes one more
    built.vocab_padding = model.vocab_padding  # columns that r1mega.model.forward.logits drops
    return built


def _take_embedding(part: LanguageModel, first: LanguageModel) -> None:
    """Let ``part`` use the weight of the embedding that lies on the same rank."""
    if part.mtp_process:
        part.embedding = first.embedding
    elif part.post_process and part.share_embeddings_and_output_weights:
        part.output_layer.weight = first.embedding.word_embeddings.weight


@contextlib.contextmanager
def without_mtp(model: LanguageModel) -> Iterator[None]:
    """Inside, the model computes the main head alone; Megatron's MTP wants labels, which scoring and RL do not have."""
    held = model.config.mtp_num_layers, getattr(model, "mtp_process", False)
    model.config.mtp_num_layers, model.mtp_process = None, False
    try:
        yield
    finally:
        model.config.mtp_num_layers, model.mtp_process = held


def count_parameters(model: torch.nn.Module, *, mtp: bool = False) -> int:
    """Parameters plus expert biases (which are buffers); the MTP block's own only when asked for."""
    named = list(model.named_parameters()) + [
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith("expert_bias")
    ]
    return sum(tensor.numel() for name, tensor in named if mtp or not name.startswith("mtp."))
