"""The engine in this process: transformers' DeepseekV3, weights handed over in memory. The choice; ``inprocess`` has the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.config.knob import at_least, knob, one_of
from r1mega.registry import register

if TYPE_CHECKING:
    from r1mega.rl.engine.contract import EngineRuntime
    from r1mega.rl.engine.inprocess import InProcessEngine


@register("engine", "local")
@dataclass(frozen=True)
class LocalEngine:
    """Generates in the training process, on its device, one batch after the other."""

    max_batch: int = knob(1024, "responses decoded together; what is drawn does not depend on it", "responses", **at_least(1))
    prefill_tokens: int = knob(8192, "prompt tokens of one forward pass, padding included", "tokens", **at_least(1))
    routed_experts: bool = knob(False, "tell the experts that each token went through (routing replay)", "bool")
    dtype: str = knob("as_is", "format of the weights; as_is: the trainer's", "name", **one_of("as_is", "float32", "bfloat16"))

    def build(self, runtime: EngineRuntime) -> InProcessEngine:
        """An engine without weights: ``load_weights`` comes first."""
        from r1mega.rl.engine.inprocess import InProcessEngine

        return InProcessEngine(self, runtime)
