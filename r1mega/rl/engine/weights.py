"""Hugging Face names to the places of transformers' DeepseekV3 in memory; in: (name, tensor) pairs, out: a model written in full.

Checkpoints have one matrix an expert; transformers 5 keeps all experts of a layer in two tensors, ``gate_up_proj`` [E, 2F, D] (gate
first) and ``down_proj`` [E, D, F]. The table maps each checkpoint name to a view, so that a load is one copy a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from r1mega.config.errors import UserError

LAYER = re.compile(r"model\.layers\.(\d+)\.")
LISTED = 5
WAY_OUT = "load the model that the config describes"


def destinations(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint name to a view of the model's parameter or buffer, for everything that a checkpoint holds.

    ``model``: a ``DeepseekV3ForCausalLM``. The head is left out where it shares the embedding.
    """
    places: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            ffn_size = tensor.shape[1] // 2
            for expert in range(tensor.shape[0]):
                places[f"{prefix}.{expert}.gate_proj.weight"] = tensor[expert, :ffn_size]
                places[f"{prefix}.{expert}.up_proj.weight"] = tensor[expert, ffn_size:]
        elif kind == "down_proj":
            for expert in range(tensor.shape[0]):
                places[f"{prefix}.{expert}.down_proj.weight"] = tensor[expert]
        elif kind != "e_score_correction_bias" or getattr(model.config, "topk_method", None) != "greedy":
            places[name] = tensor  # a model without the bias keeps transformers' zeros
    if model.config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
    return places


def load(model: torch.nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy every tensor to its place; each place is written exactly once.

    MTP layers (``model.layers.N`` from num_hidden_layers on) are passed over: decoding does not use them. So is the head of a
    model that shares it with the embedding. Raises UserError that names what is missing, unknown, given twice or of another
    shape; the model is then partly written, and must not be used.
    """
    places = destinations(model)
    missing = set(places)
    unknown: list[str] = []
    with torch.no_grad():
        for name, tensor in named_tensors:
            layer = LAYER.match(name)
            if layer and int(layer[1]) >= model.config.num_hidden_layers:
                continue
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            place = places.get(name)
            if place is None:
                unknown.append(name)
                continue
            if name not in missing:
                raise UserError(f"engine.load_weights: each tensor comes once; got {name} twice; check the name table")
            if place.shape != tensor.shape:
                raise UserError(f"engine.load_weights: {name} is {list(place.shape)}; got {list(tensor.shape)}; {WAY_OUT}")
            place.copy_(tensor)
            missing.remove(name)
    for what, names in (("unknown", sorted(unknown)), ("missing", sorted(missing))):
        if names:
            listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
            raise UserError(f"engine.load_weights: every tensor of the config and no other; got {what} {listed}; {WAY_OUT}")
