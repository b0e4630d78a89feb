"""One decoding step of transformers' DeepseekV3 with absorbed latent attention; in: a token of B rows, out: logits [B, V] fp32.

transformers keeps the latents in its cache and expands the whole cache to keys and values at every step, which costs most of a
small model's step. Here the expansion moves to the query and the output (DeepSeek-V2 arXiv 2405.04434 2.1.2): with kv_b_proj =
[W_uk; W_uv] a head's score is (W_uk^T q) . c + q_rope . k_rope and its output W_uv (sum_s p_s c_s), for latents c of rank R. Every
module but the attention's core is transformers' own. Draws nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb, apply_rotary_pos_emb_interleave


class ExpertTap:
    """The experts that a model's routers choose, of one thread's forward passes. ``layers``: of the decoder, dense ones too."""

    def __init__(self, model: torch.nn.Module):
        self.layers, self.top_k = len(model.model.layers), model.config.num_experts_per_tok
        self._heard = threading.local()
        for place, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda gate, inputs, output, place=place: self._hear(place, output[2]))

    def _hear(self, place: int, chosen_TK: torch.Tensor) -> None:
        heard = getattr(self._heard, "by_layer", None)
        if heard is not None:
            heard[place] = chosen_TK

    @contextlib.contextmanager
    def hearing(self) -> Iterator[dict[int, torch.Tensor]]:
        """Inside, what this thread's last forward pass chose, by layer: int64 [tokens, K]."""
        self._heard.by_layer = heard = {}
        try:
            yield heard
        finally:
            self._heard.by_layer = None

    def record(self, heard: dict[int, torch.Tensor], rows: int, tokens: int, device: torch.device) -> torch.Tensor:
        """What was heard of so many rows of so many tokens, as one tensor: int16 [rows, tokens, layers, K], -1 in dense layers."""
        made = torch.full((rows, tokens, self.layers, self.top_k), -1, dtype=torch.int16, device=device)
        for place, chosen_TK in heard.items():
            made[:, :, place] = chosen_TK.view(rows, -1, self.top_k).to(torch.int16)
        return made


class LatentCache:
    """What B rows have read so far: a layer's latents and rotary keys, ``layers[i]`` [B, capacity, R + rope], and ``length_B``.

    A row's tokens stand at places 0 to length - 1; what lies behind is not read. Grows by doubling, up to ``largest``.
    """

    def __init__(self, layers: list[torch.Tensor], length_B: torch.Tensor, largest: int):
        self.layers, self.length_B, self.largest = layers, length_B, largest
        self._measure()

    @staticmethod
    def joined(caches: list[LatentCache]) -> LatentCache:
        """The rows of several caches one after the other, all of the same ``largest``."""
        if len(caches) == 1:
            return caches[0]
        capacity = max(cache.layers[0].shape[1] for cache in caches)
        layers = []
        for parts in zip(*(cache.layers for cache in caches), strict=True):
            layers.append(torch.cat([torch.nn.functional.pad(part, (0, 0, 0, capacity - part.shape[1])) for part in parts]))
        return LatentCache(layers, torch.cat([cache.length_B for cache in caches]), caches[0].largest)

    def _measure(self) -> None:
        self.longest = int(self.length_B.max())
        self.ragged = int(self.length_B.min()) != self.longest

    def make_room(self) -> None:
        """Hold at least one token more a row."""
        capacity = self.layers[0].shape[1]
        if self.longest < capacity:
            return
        wanted = min(max(2 * capacity, self.longest + 64), self.largest)
        for idx, old in enumerate(self.layers):
            self.layers[idx] = old.new_zeros(old.shape[0], wanted, old.shape[2])
            self.layers[idx][:, : self.longest] = old[:, : self.longest]

    def advance(self) -> None:
        """Count the token that a step has written in every row."""
        self.length_B += 1
        self.longest += 1

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (int64, any order, repeats allowed)."""
        self.layers = [layer.index_select(0, rows) for layer in self.layers]
        self.length_B = self.length_B.index_select(0, rows)
        self._measure()


def prefill(model: torch.nn.Module, prompts: list[list[int]], pad_id: int, largest: int) -> tuple[torch.Tensor, LatentCache]:
    """Read prompts; returns the logits of the next token, fp32 [B, V], and the cache.

    Prompts are padded on the right: a causal model's last real token never sees the padding, so that no mask is needed.
    """
    device = model.device
    length_B = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(length_B.max())
    tokens_BS = torch.tensor([prompt + [pad_id] * (longest - len(prompt)) for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
    hidden_BSD = model.model(input_ids=tokens_BS, past_key_values=cache, use_cache=True).last_hidden_state
    length_B = length_B.to(device)
    last_BD = hidden_BSD[torch.arange(len(prompts), device=device), length_B - 1]
    capacity = min(longest + 64, largest)
    layers = []
    for layer in cache.layers:
        latent = torch.cat([layer.keys, layer.values], dim=-1)[:, 0]
        layers.append(latent.new_zeros(len(prompts), capacity, latent.shape[2]))
        layers[-1][:, :longest] = latent
    return model.lm_head(last_BD).float(), LatentCache(layers, length_B, largest)


def step(
    model: torch.nn.Module, cache: LatentCache, tokens_B: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Append one token a row and return the logits of the next, fp32 [B, V]. ``rotary``: cos and sin [largest, rope]."""
    cache.make_room()
    positions_B = cache.length_B
    # [B, 1, rope]: one position a row
    angles = tuple(table[positions_B][:, None] for table in rotary)
    rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
    hidden_mask_B1S = None
    if cache.ragged:
        hidden_mask_B1S = (torch.arange(cache.longest + 1, device=tokens_B.device) > positions_B[:, None])[:, None]
    hidden_B1D = model.model.embed_tokens(tokens_B)[:, None]
    for layer, latent_BSC in zip(model.model.layers, cache.layers, strict=True):
        normed = layer.input_layernorm(hidden_B1D)
        hidden_B1D = hidden_B1D + _attend(
            layer.self_attn, normed, latent_BSC, (rows_B, positions_B), cache.longest + 1, angles, hidden_mask_B1S
        )
        hidden_B1D = hidden_B1D + layer.mlp(layer.post_attention_layernorm(hidden_B1D))
    cache.advance()
    return model.lm_head(model.model.norm(hidden_B1D))[:, 0].float()


def _attend(attention, hidden_B1D, latent_BSC, place, span: int, angles, hidden_mask_B1S) -> torch.Tensor:
    """Absorbed attention of one layer over the first ``span`` places; writes this token's latent at ``place`` first."""
    num_rows = hidden_B1D.shape[0]
    rank, nope, rope = attention.kv_lora_rank, attention.qk_nope_head_dim, attention.qk_rope_head_dim
    if attention.q_lora_rank is None:
        query = attention.q_proj(hidden_B1D)
    else:
        query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_B1D)))
    query_BHC = query.view(num_rows, -1, nope + rope)
    latent, key_rope = attention.kv_a_proj_with_mqa(hidden_B1D).split([rank, rope], dim=-1)
    rotate = apply_rotary_pos_emb_interleave if attention.config.rope_interleave else apply_rotary_pos_emb
    query_rope, key_rope = rotate(query_BHC[..., nope:].unsqueeze(2), key_rope.unsqueeze(1), *angles)
    latent_BSC[place] = torch.cat([attention.kv_a_layernorm(latent)[:, 0], key_rope[:, 0, 0]], dim=-1)

    # [H, nope + v, R]: W_uk above W_uv, head by head
    expand_HXR = attention.kv_b_proj.weight.view(query_BHC.shape[1], -1, rank)
    absorbed = torch.bmm(query_BHC[..., :nope].transpose(0, 1), expand_HXR[:, :nope]).transpose(0, 1)
    past_BSC = latent_BSC[:, :span]
    scores_BHS = torch.bmm(torch.cat([absorbed, query_rope[:, :, 0]], dim=-1), past_BSC.transpose(1, 2)).mul_(attention.scaling)
    if hidden_mask_B1S is not None:
        scores_BHS.masked_fill_(hidden_mask_B1S, float("-inf"))
    probs_BHS = torch.softmax(scores_BHS, dim=-1, dtype=torch.float32).to(query.dtype)
    context_HBR = torch.bmm(probs_BHS, past_BSC[..., :rank]).transpose(0, 1)
    values_BHV = torch.bmm(context_HBR, expand_HXR[:, nope:].transpose(1, 2)).transpose(0, 1)
    return attention.o_proj(values_BHV.reshape(num_rows, 1, -1))
