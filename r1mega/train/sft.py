"""``r1mega sft``: a checkpoint taught by conversations; only the answers are learnt, packed samples do not see each other."""

from __future__ import annotations

from typing import Any

from r1mega.config.train import SftConfig
from r1mega.data.loader import SftLoader
from r1mega.mesh import Mesh
from r1mega.train.fit import Source, fit
from r1mega.train.manifest import resolve, tokenizer_of, tuned_model


def sft(config: SftConfig) -> dict[str, Any]:
    """Fine-tune ``config.init``; returns checkpoint, steps, tokens, seconds and validation loss."""
    init = resolve(config.init)

    def source(mesh: Mesh) -> Source:
        loader = SftLoader(
            config.data.train,
            config.data.sequence_length,
            config.trainer.global_batch_size,
            config.seed,
            mesh.data_rank,
            mesh.data_size,
        )
        return Source(loader, init, tokenizer_of(init))

    return fit(config, tuned_model(init, config.model), source)
