"""``r1mega pretrain``: next-token training (and MTP) from token files, from fresh weights or from a checkpoint."""

from __future__ import annotations

from typing import Any

from r1mega.config.train import PretrainConfig
from r1mega.data.loader import DocumentLoader, IsolatedLoader, PretrainLoader
from r1mega.mesh import Mesh
from r1mega.train import checkpoint
from r1mega.train.fit import Source, fit


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train ``config.model``; returns checkpoint, steps, tokens, seconds and validation loss."""

    def source(mesh: Mesh) -> Source:
        kinds = {kind.packing: kind for kind in (PretrainLoader, DocumentLoader, IsolatedLoader)}
        loader = kinds[config.data.packing](
            config.data.train,
            config.data.sequence_length,
            config.trainer.global_batch_size,
            config.seed,
            mesh.data_rank,
            mesh.data_size,
        )
        init = checkpoint.resolve(config.init) if config.init else None
        return Source(loader, init, config.tokenizer)

    return fit(config, config.model, source)
