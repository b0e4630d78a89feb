"""``r1mega sft``: a checkpoint taught by conversations; only the answers are learnt, packed samples do not see each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError, nearest
from r1mega.config.model import ModelConfig
from r1mega.config.train import TUNABLE_MODEL_FIELDS, SftConfig
from r1mega.data.loader import SftLoader
from r1mega.mesh import Mesh
from r1mega.train import checkpoint
from r1mega.train.fit import Source, fit


def sft(config: SftConfig) -> dict[str, Any]:
    """Fine-tune ``config.init``; returns checkpoint, steps, tokens, seconds and validation loss."""
    init = checkpoint.resolve(config.init)

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


def tuned_model(init: Path, changes: dict[str, Any]) -> ModelConfig:
    """A checkpoint's architecture with other training fields. Raises UserError for a field that may not change."""
    for name in changes:
        if name not in TUNABLE_MODEL_FIELDS:
            raise UserError(
                f"model.{name}: a run from a checkpoint changes training fields alone; got model.{name}={changes[name]}; "
                f"{nearest(name, TUNABLE_MODEL_FIELDS)}use {', '.join(TUNABLE_MODEL_FIELDS)}"
            )
    return replace(checkpoint.read_model(init), **changes)


def tokenizer_of(init: Path) -> str:
    """The tokenizer folder inside a checkpoint. Raises UserError when it holds none."""
    folder = init / "tokenizer"
    if not folder.is_dir():
        raise UserError(f"checkpoint {init}: it holds the tokenizer it was trained with; got none; pretrain with tokenizer=DIR")
    return str(folder)
