"""Where published tensors end up inside an SGLang server: names, fusions and shards of its parameters. Pure; no tensor is touched.

In: the name table's parts and what a server says of itself. Out: :class:`Held` objects, one a parameter and tensor parallel rank,
each made of pieces of published tensors. This is SGLang's loader for DeepSeek (``deepseek_weight_loader.py``) read backwards:

- ``q_a_proj`` over ``kv_a_proj_with_mqa`` is ``fused_qkv_a_proj_with_mqa``, whole on every rank;
- gate over up is ``gate_up_proj``, each rank's share of both; the experts' are stacked as ``w13_weight`` and ``w2_weight``;
- ``q_b``, ``q``, ``kv_b`` are split by rows, ``o`` and ``down`` by columns, over the ranks that share attention or the FFN;
- embedding and head are split by rows after filling up to a multiple of 64 with zeros;
- a fused shared expert is one more expert in the stacks;
- a draft model has the MTP layer as ``model.decoder`` and shares the embedding and the head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig
from r1mega.model.names import Part

ROWS_OF_VOCABULARY = 64
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
FFN = re.compile(r"mlp\.(shared_experts\.)?(gate|up|down)_proj\.weight")
BY_ROWS = ("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight")
OWN_OF_DRAFT = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
SHARED_WITH_DRAFT = ("embed_tokens.weight", "shared_head.head.weight")


@dataclass(frozen=True)
class Layout:
    """How a server cuts a model. ``tp``: ranks; ``ep``: of them, groups of experts; ``attention``, ``dense``, ``shared``,
    ``vocabulary``, ``head``: ranks that share attention, dense FFN, shared expert, embedding and head;
    ``fused_shared``: the shared expert is in the stacks; ``draft``: there is a draft model whose parameters are reported.
    """

    tp: int = 1
    ep: int = 1
    attention: int = 1
    dense: int = 1
    shared: int = 1
    vocabulary: int = 1
    head: int = 1
    fused_shared: bool = False
    draft: bool = False

    @classmethod
    def of(cls, info: dict[str, Any], names: Iterable[str]) -> Layout:
        """From /server_info and the parameters' names. Raises UserError for what cannot be told from them."""
        tp, dp = int(info.get("tp_size") or 1), int(info.get("dp_size") or 1)
        for key, what in (("enable_eplb", "experts that move"), ("ep_num_redundant_experts", "redundant experts")):
            if info.get(key):
                raise UserError(f"push.proof: checksum knows no {what}; got {key}={info[key]}; use push.proof=probe")
        if int(info.get("pp_size") or 1) > 1:
            raise UserError(f"push.proof: checksum of one pipeline stage; got pp_size={info['pp_size']}; use push.proof=probe")
        names = list(names)
        with_dp = bool(info.get("enable_dp_attention"))
        alone = info.get("moe_a2a_backend") not in (None, "none")
        return cls(
            tp=tp,
            ep=int(info.get("ep_size") or 1),
            attention=tp // dp if with_dp else tp,
            dense=int(info.get("moe_dense_tp_size") or tp),
            shared=1 if alone else tp,
            vocabulary=1 if with_dp else tp,
            head=tp // dp if with_dp and info.get("enable_dp_lm_head") else tp,
            fused_shared=any(".mlp.experts." in name for name in names) and not any(".shared_experts." in name for name in names),
            draft=any(name.startswith("draft.") for name in names),
        )


@dataclass(frozen=True)
class Piece:
    """``published[slices]`` in order, from element ``start`` of the parameter on."""

    name: str
    slices: tuple[slice, ...]
    start: int
    numel: int


@dataclass
class Held:
    """One parameter of one rank. ``role``: as of :class:`r1mega.model.names.Part`; ``zeros``: (start, number) of elements."""

    name: str
    rank: int
    role: str
    pieces: list[Piece] = field(default_factory=list)
    zeros: list[tuple[int, int]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements."""
        return sum(piece.numel for piece in self.pieces) + sum(number for _, number in self.zeros)

    @property
    def sources(self) -> list[str]:
        """The published tensors that it is made of, in order."""
        return list(dict.fromkeys(piece.name for piece in self.pieces))


def held_tensors(model: ModelConfig, table: Iterable[Part], layout: Layout) -> list[Held]:
    """Every parameter of every rank that published tensors make."""
    return [held for rank in range(layout.tp) for held in _Rank(model, layout, rank).walk(table)]


class _Rank:
    """One rank's parameters while the table is walked."""

    def __init__(self, model: ModelConfig, layout: Layout, rank: int):
        self.model, self.layout, self.rank = model, layout, rank
        self.moe_tp = layout.tp // layout.ep
        self.found: dict[str, Held] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def walk(self, table: Iterable[Part]) -> Iterator[Held]:
        table = list(table)
        self.shapes = {part.name: part.shape for part in table}
        for part in table:
            match = LAYER.fullmatch(part.name)
            if match is None:
                if part.name.startswith(("model.embed_tokens.", "lm_head.")):
                    size = self.layout.vocabulary if part.name.startswith("model.") else self.layout.head
                    self._vocabulary(part, part.name, size)
                else:
                    self._put(part, part.name, (slice(None),), 0)
                continue
            layer, rest = int(match[1]), match[2]
            if layer < self.model.num_layers:
                self._layer(part, f"model.layers.{layer}.", rest)
            elif self.layout.draft:
                self._draft(part, rest)
        yield from self.found.values()

    def _draft(self, part: Part, rest: str) -> None:
        if rest in SHARED_WITH_DRAFT:
            name = "draft.model.embed_tokens.weight" if rest.startswith("embed") else "draft.lm_head.weight"
            self._vocabulary(part, name, self.layout.vocabulary if rest.startswith("embed") else self.layout.head)
        elif rest in OWN_OF_DRAFT:
            self._put(part, f"draft.model.{rest}", (slice(None),), 0)
        else:
            self._layer(part, "draft.model.decoder.", rest)

    def _layer(self, part: Part, prefix: str, rest: str) -> None:
        block, _, name = rest.partition(".")
        if expert := EXPERT.fullmatch(rest):
            self._expert(part, prefix, int(expert[1]), expert[2])
        elif ffn := FFN.fullmatch(rest):
            self._ffn(part, prefix, bool(ffn[1]), ffn[2])
        elif block != "self_attn":
            self._put(part, prefix + rest, (slice(None),), 0)
        elif name in ("q_a_proj.weight", "kv_a_proj_with_mqa.weight") and self.model.q_lora_rank is not None:
            start = 0 if name.startswith("q_a") else self.model.q_lora_rank * part.shape[1]
            self._put(part, f"{prefix}self_attn.fused_qkv_a_proj_with_mqa.weight", (slice(None),), start)
        elif name in BY_ROWS:
            self._put(part, prefix + rest, (_share(part.shape[0], self.layout.attention, self.rank),), 0)
        elif name == "o_proj.weight":
            self._put(part, prefix + rest, (slice(None), _share(part.shape[1], self.layout.attention, self.rank)), 0)
        else:
            self._put(part, prefix + rest, (slice(None),), 0)

    def _ffn(self, part: Part, prefix: str, shared: bool, kind: str) -> None:
        if shared and self.layout.fused_shared:
            self._expert(part, prefix, self.model.num_experts, kind)
            return
        size = self.layout.shared if shared else self.layout.dense
        where = f"{prefix}mlp.{'shared_experts.' if shared else ''}"
        if kind == "down":
            self._put(part, f"{where}down_proj.weight", (slice(None), _share(part.shape[1], size, self.rank)), 0)
            return
        rows = part.shape[0] // size
        start = rows * part.shape[1] if kind == "up" else 0
        self._put(part, f"{where}gate_up_proj.weight", (_share(part.shape[0], size, self.rank),), start)

    def _expert(self, part: Part, prefix: str, expert: int, kind: str) -> None:
        """Expert ``num_experts`` is the fused shared one, behind the rank's own."""
        mine = self.model.num_experts // self.layout.ep
        at = expert - self.rank // self.moe_tp * mine if expert < self.model.num_experts else mine
        if not 0 <= at <= mine or (at == mine and expert < self.model.num_experts):
            return
        rank = self.rank % self.moe_tp
        if kind == "down":
            columns = part.shape[1] // self.moe_tp
            slices = (slice(None), _share(part.shape[1], self.moe_tp, rank))
            self._put(part, f"{prefix}mlp.experts.w2_weight", slices, at * part.shape[0] * columns)
            return
        numel = part.shape[0] // self.moe_tp * part.shape[1]
        start = (2 * at + (kind == "up")) * numel
        self._put(part, f"{prefix}mlp.experts.w13_weight", (_share(part.shape[0], self.moe_tp, rank),), start)

    def _vocabulary(self, part: Part, name: str, size: int) -> None:
        tokens, hidden = part.shape
        each = -(-tokens // ROWS_OF_VOCABULARY) * ROWS_OF_VOCABULARY // size
        first = min(self.rank % size * each, tokens)
        last = min(first + each, tokens)
        held = self._put(part, name, (slice(first, last),), 0)
        if last - first < each:
            held.zeros.append(((last - first) * hidden, (each - last + first) * hidden))

    def _put(self, part: Part, name: str, slices: tuple[slice, ...], start: int) -> Held:
        held = self.found.setdefault(name, Held(name, self.rank, part.role))
        sizes = [len(range(*cut.indices(size))) for cut, size in zip(slices, part.shape, strict=False)]
        numel = math.prod(sizes) * math.prod(part.shape[len(slices) :])
        held.pieces.append(Piece(part.name, slices, start, numel))
        return held


def _share(size: int, ranks: int, rank: int) -> slice:
    each = size // ranks
    return slice(rank % ranks * each, (rank % ranks + 1) * each)
