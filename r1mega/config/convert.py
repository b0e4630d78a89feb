"""Knobs of ``convert`` and of its preset ``export``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.knob import REQUIRED, at_least, knob, one_of
from r1mega.config.run import RunConfig

DTYPES = ("as_is", "bf16", "fp32", "fp8")


@dataclass
class ConversionConfig:
    """How a conversion works; nothing here changes a number of the result, but ``scale_format``."""

    verify: bool = knob(
        False, "after writing, read source and result again, compare every tensor, and probe logits with transformers", "bool"
    )
    workers: int = knob(0, "files converted at the same time; 0: one a core, 4 at most", "threads", **at_least(0))
    probe_bytes: int = knob(8 << 30, "memory for probe logits, which hold the model twice in fp32; 0: none", "bytes", **at_least(0))
    vocab_multiple: int = knob(
        1, "native: zero rows at the end of embedding and head up to a multiple, for parallel.tensor", "tokens", **at_least(1)
    )
    scale_format: str = knob(
        "as_is",
        "FP8 scales: fp32 (V3), ue8m0 (powers of two, V3.1), or as_is: the source's, else fp32",
        "name",
        **one_of("as_is", "fp32", "ue8m0"),
    )
    allow_mixed: bool = knob(False, "take tensors of another dtype than config.json names, as they are", "bool")
    allow_equal: bool = knob(False, "take experts that are copies of each other, as in a model grown from a dense one", "bool")


@dataclass
class ConvertConfig(RunConfig):
    """``r1mega convert``: a checkpoint between Hugging Face's format and Megatron's, on the CPU, with a ledger of every tensor."""

    source: str = knob(REQUIRED, "checkpoint to convert; its format is recognised", "path")
    target: str = knob(REQUIRED, "folder to write; the same command goes on where it was cut off", "path")
    format: str = knob(
        "other",
        "native (Megatron's) or hf (Hugging Face's); other: the one that the source has not",
        "name",
        **one_of("other", "native", "hf"),
    )
    dtype: str = knob(
        "as_is", "of the weights: bf16, fp32, fp8 (hf alone), or as_is, where FP8 becomes bf16 in native", "name", **one_of(*DTYPES)
    )
    shard_bytes: int = knob(5 << 30, "largest file written", "bytes", **at_least(1 << 10))
    convert: ConversionConfig = knob(ConversionConfig, "how it works", "section")
