"""``r1mega export``: a checkpoint as a Hugging Face folder that stock code loads; ``r1mega convert`` with the format given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from r1mega.config.convert import ConversionConfig, ConvertConfig
from r1mega.config.errors import UserError
from r1mega.config.rl import ExportConfig
from r1mega.config.run import ParallelConfig
from r1mega.train.convert.run import convert


def export(config: ExportConfig) -> dict[str, Any]:
    """Write ``config.target``; returns target, number of tensors and parameters. The folder appears whole or not at all."""
    if replace(config.parallel, recompute=[], fused_loss=False) != ParallelConfig():
        raise UserError("parallel: export reads files, whatever layout wrote them; got other degrees than 1; use 1")
    asked = ConvertConfig(source=config.checkpoint, target=config.target, format="hf", dtype=config.dtype, convert=config.convert)
    return convert(replace(asked, shard_bytes=config.shard_bytes))


def export_checkpoint(path: Path, target: Path, dtype: str) -> dict[str, Any]:
    """A run's checkpoint as one of its intermediate models; see :func:`export`."""
    own = ConversionConfig(allow_equal=True)  # a model of ours is what it is
    return convert(ConvertConfig(source=str(path), target=str(target), format="hf", dtype=dtype, convert=own), quiet=True)
