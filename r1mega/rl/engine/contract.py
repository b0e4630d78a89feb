"""What every engine is told, and what it must answer. No model, no torch at import."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from r1mega.config.run import SamplingConfig
from r1mega.rl.types import Completion

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EngineRuntime:
    """What an engine is built from.

    ``hf_config``: the content of the model's ``config.json`` (``DeepseekV3ForCausalLM``); ``device``: a torch device ("cpu",
    "cuda:0"); ``dtype``: "float32" or "bfloat16", the parameters'; ``eos_id`` ends a response; ``pad_id`` fills up prompts;
    ``folder``: of the run, for an engine's logs; "": a temporary one.
    """

    hf_config: dict[str, Any]
    device: str = "cpu"
    dtype: str = "float32"
    eos_id: int = 1
    pad_id: int = 0
    folder: str = ""


@dataclass(frozen=True)
class Request:
    """One response to one prompt of token ids. ``seed``: engines that can give the same tokens for the same one."""

    prompt: list[int]
    sampling: SamplingConfig
    seed: int


class Engine(Protocol):
    """What a choice of kind ``engine`` builds: ``build(runtime: EngineRuntime) -> Engine``."""

    version: int
    """Of the weights that are loaded; -1 before the first complete load and after one that failed."""

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over all weights by their Hugging Face names, each exactly once; see the choice for what it refuses."""

    def generate(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[Completion]:
        """One response to each prompt of token ids, in order; repeat a prompt for more. The same seed gives the same tokens."""
