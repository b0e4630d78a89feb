"""What a push is built from, and what it answers. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from r1mega.rl.engine.sglang.client import Server

INCOMPLETE = "r1mega:incomplete:"
"""Start of the weight version that a server reports from the first byte of a push until its weights are proven."""

Score = Callable[[list[list[int]]], list[list[float]]]


@dataclass
class PushRuntime:
    """What a push is built from.

    ``engine``: has ``version``, which a push sets to -1 while it is under way and after a failure; for ``push=memory`` also
    ``load_weights``. ``hf_config``: content of the model's config.json. ``servers``: as they are now, asked at each push.
    ``device``: where the trainer's tensors are ("cpu", "cuda:0"). ``score``: prompts of token ids to the trainer's own
    log-probabilities of their tokens but the first, at temperature 1, for the probe; None: there is no probe. ``folder``: where
    ``push=disk`` writes; the servers see it under the same path.
    """

    engine: Any
    hf_config: dict[str, Any]
    servers: Callable[[], list[Server]] = list
    device: str = "cpu"
    score: Score | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class PushReport:
    """What one push cost. ``num_bytes``: of tensors as sent, to one server; ``seconds``: of all of it, ``proof_seconds`` of these
    for hashing and comparing; ``server_seconds``: URL to the time that its answers took; ``proof``: how it was proven.
    """

    version: int
    seconds: float
    num_bytes: int
    buckets: int
    proof: str
    proof_seconds: float
    server_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float:
        """Of 1e9 bytes, the proof's time not counted."""
        return self.num_bytes / max(self.seconds - self.proof_seconds, 1e-9) / 1e9

    def line(self) -> dict[str, float | int | str]:
        """For the metric line."""
        return {
            "push_seconds": self.seconds,
            "push_bytes": self.num_bytes,
            "push_buckets": self.buckets,
            "push_gbps": self.gigabytes_per_second,
            "push_proof": self.proof,
            "push_proof_seconds": self.proof_seconds,
        }


class Push(Protocol):
    """What a choice of kind ``push`` builds: ``build(runtime: PushRuntime) -> Push``."""

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> PushReport:
        """Bring all weights to the engine and prove that it holds them.

        ``tensors``: every published tensor once, whole, in the order of the name table; where it can be walked twice (a list), an
        error can name the tensor inside a stack of experts. The engine is paused and stays so. Raises UserError, naming server and
        tensor, with the engine's version at -1, where the weights did not arrive or are not those that were sent.
        """

    def close(self) -> None:
        """Give back what is held between pushes."""
