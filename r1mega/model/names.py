"""The one table of names between Megatron-Core's model and Hugging Face's DeepSeek checkpoints: every published tensor is a region.

Converter, export, rollout engine and weight push walk :func:`parts`; foreign names live here and nowhere else. A native tensor is
whole along the tensor and expert axes and stands under its name in the whole model, as checkpoints and ``Stages.named_weights``
have it. Its numbers lie in the published order already: gate rows before up rows in a fused FFN, experts stacked on axis 0, rotary
columns in interleaved pairs, in ``eh_proj`` the embedding's half (enorm) before the hidden state's (hnorm). So a region needs a
start and an extent, and nothing is permuted. ``N`` below is the number of decoder layers: DeepSeek stores the MTP block as layer N.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig

SCALE = "_scale_inv"
"""Suffix of the scales of a tensor that is stored in FP8: fp32, one a block of 128 x 128."""
DERIVED = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq$")
"""Tensors that some checkpoints store (Moonlight's) though the config says them: nothing of ours reads them."""
LISTED = 5
"""Names that an error spells out."""

EMBEDDING, HEAD, LM_HEAD = "embedding.word_embeddings.weight", "output_layer.weight", "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """One published tensor, and the region of a native tensor that holds its numbers.

    ``name``: published; ``key``: native; ``start``, ``extent``: of the region, a number an axis of the native tensor; ``shape``:
    of the published tensor, which is the extent without the unit axes of stacks. ``role``: "linear" is what FP8 checkpoints store
    in FP8 with scales, "bias" an expert bias (fp32 in native tensors whatever the file has), "plain" the rest. ``copy``: the
    published tensor repeats numbers that another part owns.
    """

    name: str
    key: str
    start: tuple[int, ...]
    extent: tuple[int, ...]
    shape: tuple[int, ...]
    role: str
    copy: bool = False

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index of the native tensor, all axes kept."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.extent, strict=True))

    def of(self, native: torch.Tensor) -> torch.Tensor:
        """The published tensor as a view of the whole native one."""
        return native[self.slices].view(self.shape)


SAME = {
    "input_layernorm.weight": ("input_layernorm.weight", "plain"),
    "self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight", "linear"),
    "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight", "linear"),
    "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight", "plain"),
    "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight", "linear"),
    "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight", "linear"),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight", "plain"),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight", "linear"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", "linear"),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", "plain"),
    "mlp.router.weight": ("mlp.gate.weight", "plain"),
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias", "bias"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", "linear"),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_experts.down_proj.weight", "linear"),
}
"""Native name inside a decoder layer, to (published name below ``model.layers.i.``, role), where one tensor is one tensor."""
FUSED = {"mlp.linear_fc1.weight": "mlp", "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts"}
"""``[2F, D]``: gate rows, then up rows; to the published FFN."""
GATE_UP, DOWN = "mlp.experts.weight1", "mlp.experts.weight2"
"""Stacks ``[E, 2F, D]`` and ``[E, D, F]``, experts in logical order: who publishes or saves weights has put them back."""
MTP = {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight"}
"""The MTP block's own tensors before its decoder layer. ``eh_proj`` is in BF16 in FP8 checkpoints too."""


def native_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every native tensor, weights and expert biases, with its whole shape."""
    hidden, mixture = model.hidden_size, _layer_shapes(model, moe=True)
    dense = _layer_shapes(model, moe=False)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        held = mixture if layer >= model.first_k_dense else dense
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in held.items()}
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not model.tie_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    for depth in range(model.num_mtp_layers):
        own = {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}
        # the block is a layer like the last one
        inner = mixture if model.num_layers > model.first_k_dense else dense
        own |= {f"transformer_layer.{name}": shape for name, shape in inner.items()}
        own["final_layernorm.weight"] = (hidden,)
        shapes |= {f"mtp.layers.{depth}.{name}": shape for name, shape in own.items()}
    return shapes


def _layer_shapes(m: ModelConfig, *, moe: bool) -> dict[str, tuple[int, ...]]:
    """One decoder layer's native tensors."""
    hidden, queries = m.hidden_size, m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    if m.q_lora_rank is None:
        shapes["self_attention.linear_q_proj.weight"] = (queries, hidden)
    else:
        shapes["self_attention.linear_q_down_proj.weight"] = (m.q_lora_rank, hidden)
        shapes["self_attention.q_layernorm.weight"] = (m.q_lora_rank,)
        shapes["self_attention.linear_q_up_proj.weight"] = (queries, m.q_lora_rank)
    shapes |= {
        "self_attention.linear_kv_down_proj.weight": (m.kv_lora_rank + m.qk_rope_head_dim, hidden),
        "self_attention.kv_layernorm.weight": (m.kv_lora_rank,),
        "self_attention.linear_kv_up_proj.weight": (m.num_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank),
        "self_attention.linear_proj.weight": (hidden, m.num_heads * m.v_head_dim),
        "pre_mlp_layernorm.weight": (hidden,),
    }
    if not moe:
        return shapes | {"mlp.linear_fc1.weight": (2 * m.ffn_size, hidden), "mlp.linear_fc2.weight": (hidden, m.ffn_size)}
    shapes["mlp.router.weight"] = (m.num_experts, hidden)
    if m.use_expert_bias:
        shapes["mlp.router.expert_bias"] = (m.num_experts,)
    shapes |= {GATE_UP: (m.num_experts, 2 * m.moe_ffn_size, hidden), DOWN: (m.num_experts, hidden, m.moe_ffn_size)}
    if shared := m.num_shared_experts * m.moe_ffn_size:
        shapes["mlp.shared_experts.linear_fc1.weight"] = (2 * shared, hidden)
        shapes["mlp.shared_experts.linear_fc2.weight"] = (hidden, shared)
    return shapes


def parts(model: ModelConfig, *, tied_head: bool = False) -> list[Part]:
    """Every published tensor of the model: embedding, layers, norm, head, MTP; an expert's three matrices side by side.

    ``tied_head``: also the head of a model that shares it with the embedding, for the files that repeat it. Published tensors are
    without the rows of ``vocab_padding``, the last of the native ones.
    """
    hidden, tokens, head = model.hidden_size, model.vocab_size - model.vocab_padding, EMBEDDING if model.tie_embeddings else HEAD

    def rows(name: str, key: str, copy: bool = False) -> Part:
        return Part(name, key, (0, 0), (tokens, hidden), (tokens, hidden), "plain", copy)

    shapes = native_shapes(model)
    found = [rows("model.embed_tokens.weight", EMBEDDING)]
    for layer in range(model.num_layers):
        found += _layer_parts(f"model.layers.{layer}.", f"decoder.layers.{layer}.", shapes)
    found.append(_whole("model.norm.weight", "decoder.final_layernorm.weight", (hidden,)))
    if tied_head or not model.tie_embeddings:
        found.append(rows(LM_HEAD, head, copy=model.tie_embeddings))
    for depth in range(model.num_mtp_layers):
        prefix, key = f"model.layers.{model.num_layers + depth}.", f"mtp.layers.{depth}."
        found.append(rows(prefix + "embed_tokens.weight", EMBEDDING, copy=True))
        found += [_whole(prefix + name, key + native, shapes[key + native]) for native, name in MTP.items()]
        found += _layer_parts(prefix, key + "transformer_layer.", shapes)
        found.append(_whole(prefix + "shared_head.norm.weight", key + "final_layernorm.weight", (hidden,)))
        found.append(rows(prefix + "shared_head.head.weight", head, copy=True))
    return found


def _whole(name: str, key: str, shape: tuple[int, ...], role: str = "plain") -> Part:
    return Part(name, key, (0,) * len(shape), shape, shape, role)


def _layer_parts(prefix: str, native: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[Part]:
    """The published tensors below ``prefix``, of the native ones below ``native``."""
    for suffix, (name, role) in SAME.items():
        if (key := native + suffix) in shapes:
            yield _whole(prefix + name, key, shapes[key], role)
    for suffix, name in FUSED.items():
        if (key := native + suffix) in shapes:
            both, hidden = shapes[key]
            for half, kind in enumerate(("gate_proj", "up_proj")):
                shape = (both // 2, hidden)
                yield Part(f"{prefix}{name}.{kind}.weight", key, (half * shape[0], 0), shape, shape, "linear")
    if native + GATE_UP not in shapes:
        return
    num_experts, hidden, ffn = shapes[native + DOWN]
    for expert in range(num_experts):
        name = f"{prefix}mlp.experts.{expert}"
        for half, kind in enumerate(("gate_proj", "up_proj")):
            start, extent = (expert, half * ffn, 0), (1, ffn, hidden)
            yield Part(f"{name}.{kind}.weight", native + GATE_UP, start, extent, (ffn, hidden), "linear")
        yield Part(f"{name}.down_proj.weight", native + DOWN, (expert, 0, 0), (1, hidden, ffn), (hidden, ffn), "linear")


def to_hf(model: ModelConfig, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(published name, tensor)`` for native named weights and expert biases, in their order.

    Tensors are views of the given ones, dtypes kept. MTP repeats embedding and head under its own layer, as published checkpoints
    do; the head of a tied model is left out. Raises UserError for a name that is not in the table or another shape, so that
    nothing is dropped in silence.
    """
    shapes, held = native_shapes(model), {}
    for part in parts(model):
        held.setdefault(part.key, []).append(part)
    for name, tensor in named:
        if name == HEAD and model.tie_embeddings:
            continue
        if name not in shapes:
            raise UserError(f"model.names: every tensor is in the name table; got {name}; add its row")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"model.names: {name} is {list(shapes[name])}; got {list(tensor.shape)}; give whole tensors")
        for part in held[name]:
            yield part.name, part.of(tensor)


def from_hf(model: ModelConfig, published: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole native tensors, in memory, of a published checkpoint's tensors in any order.

    dtypes are kept, but expert biases become fp32; padding rows are zero. Copies may be missing; those that are there must repeat
    their owner's numbers to the bit. Raises UserError for what is missing, unknown, given twice, of another shape, or of another
    dtype than the rest of its native tensor.
    """
    shapes, table = native_shapes(model), {part.name: part for part in parts(model, tied_head=True)}
    native: dict[str, torch.Tensor] = {}
    copies: list[tuple[Part, torch.Tensor]] = []
    seen, unknown = set(), []
    for name, tensor in published:
        part = table.get(name)
        if part is None:
            unknown += [] if DERIVED.match(name) else [name]
            continue
        if name in seen:
            raise UserError(f"model.names: each published tensor comes once; got {name} twice; remove one")
        if tuple(tensor.shape) != part.shape:
            raise UserError(
                f"model.names: {name} is {list(part.shape)} by the config; got {list(tensor.shape)}; give these weights' config"
            )
        seen.add(name)
        if part.copy:
            copies.append((part, tensor))
            continue
        if part.role == "bias":
            tensor = tensor.float()
        whole = native.setdefault(part.key, torch.zeros(0, dtype=tensor.dtype))
        if whole.dtype != tensor.dtype:
            raise UserError(f"model.names: {part.key} has one dtype, {whole.dtype}; got {tensor.dtype} of {name}; store them alike")
        if not whole.numel():
            # zeros, not empty: rows of vocab_padding are written by nobody
            native[part.key] = whole = torch.zeros(shapes[part.key], dtype=tensor.dtype, device=tensor.device)
        part.of(whole).copy_(tensor)
    _complete([name for name, part in table.items() if not part.copy and name not in seen], unknown, model)
    for part, tensor in copies:
        if not _same_bits(part.of(native[part.key]), tensor):
            raise UserError(f"model.names: {part.name} repeats {part.key}; got other numbers; remove it, or mend the checkpoint")
    return native


def _complete(missing: list[str], unknown: list[str], model: ModelConfig) -> None:
    """Raise UserError that names what is missing or unknown."""
    for what, found in (("unknown", unknown), ("missing", missing)):
        if not found:
            continue
        listed = ", ".join(found[:LISTED]) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")
        way = "use the config of these weights"
        depth = 0 if what == "missing" else 1
        if model.num_mtp_layers != depth and all(name.startswith(f"model.layers.{model.num_layers}.") for name in found):
            way = f"set num_nextn_predict_layers to {depth} in config.json, as these weights are"
        elif any(name.endswith(SCALE) for name in found):
            way = "take the scales into the weights first"
        raise UserError(f"model.names: every tensor of the config and no other; got {what} {listed}; {way}")


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the last bit; NaNs too."""
    if left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
