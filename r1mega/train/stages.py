"""This rank's stages of the model as one module: one DDP, one optimizer, one set of names whatever the pipeline.

Megatron's GPTModel counts its layers from 0 in every stage; here, and in checkpoints, a layer has its number in the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


class Stages(torch.nn.Module):
    """The stages in the order of the rank's chunks. Callable where there is one."""

    def __init__(self, stages: Sequence[torch.nn.Module]):
        super().__init__()
        self.stages = torch.nn.ModuleList(stages)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The only stage's output; a pipeline's stages are called by its executor."""
        (stage,) = self.stages
        return stage(*args, **kwargs)

    def _renamed(self, stage: torch.nn.Module, name: str) -> str:
        match = _LAYER.match(name)
        if not match:
            return name
        return f"decoder.layers.{stage.decoder.layers[int(match[1])].layer_number - 1}.{name[match.end() :]}"

    def named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Every parameter of this rank once, by its name in the whole model."""
        seen: set[int] = set()
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield self._renamed(stage, name), parameter

    def named_expert_biases(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every router's expert bias, by its name in the whole model."""
        for stage in self.stages:
            for name, buffer in stage.named_buffers():
                if name.endswith("expert_bias") and buffer is not None:
                    yield self._renamed(stage, name), buffer

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Chunk to Megatron's sharded state; a weight that two chunks share stands under the first."""
        state: dict[str, Any] = {}
        seen: set[int] = set()
        for number, stage in enumerate(self.stages):
            shared = {name for name, parameter in stage.named_parameters() if id(parameter) in seen}
            seen |= {id(parameter) for parameter in stage.parameters()}
            part = stage.sharded_state_dict(metadata=metadata)
            state[f"stage{number}"] = {name: value for name, value in part.items() if name not in shared}
        return state

    def load_sharded(self, loaded: dict[str, Any]) -> str:
        """Take what a checkpoint gave for :meth:`sharded_state_dict`. Returns names that are missing or too many, in words."""
        seen: set[int] = set()
        faults = []
        for number, stage in enumerate(self.stages):
            shared = {name for name, parameter in stage.named_parameters() if id(parameter) in seen}
            seen |= {id(parameter) for parameter in stage.parameters()}
            result = stage.load_state_dict(loaded[f"stage{number}"], strict=False)
            missing = set(result.missing_keys) - shared
            if missing or result.unexpected_keys:
                faults.append(f"stage {number}: missing {sorted(missing)}, unexpected {sorted(result.unexpected_keys)}")
        return "; ".join(faults)
