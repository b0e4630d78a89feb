"""SGLang's loader for DeepSeek in a few lines of plain torch, behind the face of a server: any tensor and expert parallel size, FP8,
a draft model. Written from the loader's behaviour, not from r1mega.rl.push.layout, so that one checks the other."""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
import re
from typing import Any

import torch

from r1mega.config.model import ModelConfig
from r1mega.rl.engine.sglang.features import Features
from r1mega.rl.push.wire import BUCKET_MODULE, FlattenedTensorMetadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return FlattenedTensorMetadata if module == BUCKET_MODULE else super().find_class(module, name)


def decode(entry: str) -> list[tuple[str, torch.Tensor]]:
    held = _Unpickler(io.BytesIO(base64.b64decode(entry))).load()
    assert set(held) == {"flattened_tensor", "metadata"}
    return [
        (meta.name, held["flattened_tensor"][meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape))
        for meta in held["metadata"]
    ]


class Rank:
    """The parameters of one rank of one model; ``params``: name to tensor, as loaded so far."""

    def __init__(self, model: ModelConfig, tp: int, ep: int, rank: int, draft: bool):
        self.model, self.tp, self.ep, self.rank, self.draft = model, tp, ep, rank, draft
        self.moe_tp = tp // ep
        self.params: dict[str, torch.Tensor] = {}
        self.experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        waiting: dict[str, torch.Tensor] = {}
        for name, weight in weights:
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
            if self.draft:
                prefix = f"model.layers.{self.model.num_layers}"
                if not name.startswith(prefix) or "shared_head.head" in name or "embed_tokens" in name:
                    continue
                own = any(word in name for word in ("shared_head.norm", "eh_proj", "enorm", "hnorm"))
                name = name.replace(prefix, "model" if own else "model.decoder")
            elif layer >= self.model.num_layers:
                continue
            self._load_one(name, weight, waiting)

    def _load_one(self, name: str, weight: torch.Tensor, waiting: dict[str, torch.Tensor]) -> None:
        rows, columns = (
            (lambda size: weight.chunk(size, 0)[self.rank % size]),
            (lambda size: weight.chunk(size, 1)[self.rank % size]),
        )
        if found := re.match(r"(.*mlp\.)experts\.(\d+)\.(\w+)_proj\.(.*)", name):
            each = self.model.num_experts // self.ep
            expert = int(found[2]) - self.rank // self.moe_tp * each
            if 0 <= expert < each:
                share = weight.chunk(self.moe_tp, 1 if found[3] == "down" else 0)[self.rank % self.moe_tp]
                slot = self.experts.setdefault(f"{found[1]}experts.{'w2' if found[3] == 'down' else 'w13'}_{found[4]}", {})
                slot.setdefault(expert, {})[found[3]] = share.clone()
        elif found := re.match(r"(.*)\.(gate|up)_proj\.(.*)", name):
            target = f"{found[1]}.gate_up_proj.{found[3]}"
            share = rows(self.tp)
            held = self.params.setdefault(target, torch.zeros(2, *share.shape, dtype=share.dtype))
            held[int(found[2] == "up")] = share
        elif "q_a_proj" in name or "kv_a_proj_with_mqa" in name:
            waiting[name] = weight
            first, second = name.replace("kv_a_proj_with_mqa", "q_a_proj"), name.replace("q_a_proj", "kv_a_proj_with_mqa")
            if first in waiting and second in waiting:
                target = first.replace("q_a_proj", "fused_qkv_a_proj_with_mqa")
                self.params[target] = torch.cat([waiting.pop(first), waiting.pop(second)])
        elif "embed_tokens" in name or "lm_head" in name:
            size = -(-weight.shape[0] // 64) * 64
            filled = torch.zeros(size, weight.shape[1], dtype=weight.dtype)
            filled[: weight.shape[0]] = weight
            self.params[name] = filled.chunk(self.tp)[self.rank].clone()
        elif re.search(r"self_attn\.(q_b_proj|q_proj|kv_b_proj)\.", name):
            self.params[name] = rows(self.tp).clone()
        elif re.search(r"(o_proj|down_proj)\.", name):
            self.params[name] = columns(self.tp).clone()
        else:
            self.params[name] = weight.clone()

    def held(self) -> dict[str, torch.Tensor]:
        """What /weights_checker hashes."""
        made = {name: held.flatten(0, 1) if ".gate_up_proj." in name else held for name, held in self.params.items()}
        for name, experts in self.experts.items():
            kinds = ("down",) if ".w2_" in name else ("gate", "up")
            made[name] = torch.stack([torch.cat([experts[at][kind] for kind in kinds]) for at in sorted(experts)])
        for name in [name for name in made if name.endswith("_scale_inv")]:
            scales, weight = made.pop(name), name.removesuffix("_scale_inv")
            payload = made[weight]
            spread = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : payload.shape[-2], : payload.shape[-1]]
            made[weight] = (payload.float() * spread).bfloat16()
        return made


class StandIn:
    """A server that has only the requests of a push by tensor."""

    def __init__(self, model: ModelConfig, *, tp: int = 1, ep: int = 1, draft: bool = False, dtype: str = "float32", **info: Any):
        self.url = "http://stand-in:1"
        self.info = {"version": "0.5.16", "tp_size": tp, "ep_size": ep, "dtype": dtype, "device": "cpu"} | info
        self.info |= {"speculative_algorithm": "EAGLE"} if draft else {}
        self.features = Features.of(self.info, "stand-in")
        self.tp_size, self.dp_size, self.pp_size = tp, 1, 1
        self.targets = [Rank(model, tp, ep, rank, False) for rank in range(tp)]
        self.drafts = [Rank(model, tp, ep, rank, True) for rank in range(tp)] if draft else []
        self.label, self.paths = "default", []
        self.before_load = lambda weights: weights
        self.stale_draft = False

    def drain(self, timeout_seconds: float) -> None:
        self.paths.append("drain")

    def get(self, path: str, timeout_seconds: float = 0) -> Any:
        return {"weight_version": self.label}

    def post(self, path: str, body: dict | None = None, timeout_seconds: float = 0) -> Any:
        self.paths.append(path)
        if path == "/update_weight_version":
            self.label = body["new_version"]
        elif path == "/update_weights_from_tensor":
            assert len(body["serialized_named_tensors"]) == self.tp_size and body["flush_cache"] is False
            for rank, entry in enumerate(body["serialized_named_tensors"]):
                weights = self.before_load(decode(entry))
                for model in [self.targets[rank], *(self.drafts[rank : rank + 1] if not self.stale_draft else [])]:
                    model.load(weights)
        elif path == "/weights_checker":
            return {"success": True, "ranks": [self._sums(rank) for rank in range(self.tp_size)]}
        return {"success": True}

    def _sums(self, rank: int) -> dict[str, Any]:
        held = self.targets[rank].held()
        if self.drafts:
            held |= {f"draft.{name}": tensor for name, tensor in self.drafts[rank].held().items()}
            shared = {"model.embed_tokens.weight", "lm_head.weight"} & set(held)
            held |= {f"draft.{name}": held[name] for name in shared}
        sums = {
            name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
            for name, tensor in held.items()
        }
        return {"checksums": sums, "per_gpu_checksum": "", "parallelism_info": {"tp_rank": rank, "tp_size": self.tp_size}}
