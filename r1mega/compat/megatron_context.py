"""Megatron-Core 0.16.1's context parallelism without Transformer Engine, on any device. Owns the bends of its rotary tables.

| bend | symptom without it | remove when |
|---|---|---|
| ``get_pos_emb_on_this_cp_rank`` cuts with views where the table lies | "Torch not compiled with CUDA enabled" on a CPU: it sends its index there with ``.cuda()``; on a GPU it pins memory for it each time | it makes its index on the table's own device |
| the same, for a table whose length 2C does not divide: the largest length below that it does | ``RuntimeError: shape '[6, -1, ...]' is invalid`` while a model with YaRN is built for 3 context ranks: a table of the original context length, which only the fused kernels read, is cut too | YaRN's table is made when it is read |

Looked at and found right in this version: the order of the two parts; ``get_rotary_seq_len`` with sequence parallelism; MTP's rolled
tokens, labels and loss masks across the ranks' borders (what it counts is a rank's own: :mod:`r1mega.compat.megatron_mtp`).

Versions: megatron-core 0.16.1.
"""

from __future__ import annotations

import importlib

MODULES = ("rope_utils", "rotary_pos_embedding", "yarn_rotary_pos_embedding")
"""Each has its own name for the function."""


def apply() -> None:
    """Bend the function wherever it is named; safe to call again."""
    import torch

    modules = [importlib.import_module(f"megatron.core.models.common.embeddings.{name}") for name in MODULES]
    if hasattr(modules[0].get_pos_emb_on_this_cp_rank, "upstream"):
        return

    def own_parts(pos_emb, seq_dim, cp_group):
        rank, size = cp_group.rank(), cp_group.size()
        rows = pos_emb.shape[seq_dim] // (2 * size)
        return torch.cat([pos_emb.narrow(seq_dim, part * rows, rows) for part in (rank, 2 * size - 1 - rank)], dim=seq_dim)

    own_parts.upstream = modules[0].get_pos_emb_on_this_cp_rank
    for module in modules:
        module.get_pos_emb_on_this_cp_rank = own_parts
