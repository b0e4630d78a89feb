"""The push to an engine in this process: tensors handed over by name, then every one compared with what the engine holds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch

from r1mega.config.errors import UserError
from r1mega.model.names import LISTED
from r1mega.rl.engine.weights import destinations
from r1mega.rl.push.choices import MemoryPush
from r1mega.rl.push.contract import PushReport, PushRuntime
from r1mega.rl.push.hashing import content_hash
from r1mega.rl.push.plan import nbytes


class ToMemory:
    """See :class:`r1mega.rl.push.contract.Push`. The engine has ``load_weights`` and ``model``, transformers' DeepseekV3."""

    def __init__(self, choice: MemoryPush, runtime: PushRuntime):
        self.choice, self.engine = choice, runtime.engine
        if not hasattr(self.engine, "load_weights"):
            raise UserError(f"push=memory: an engine in this process; got {type(self.engine).__name__}; use push=tensor")

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> PushReport:
        """See :class:`r1mega.rl.push.contract.Push`."""
        began = time.perf_counter()
        self._hashes: dict[str, str] = {}
        self._proof_seconds, self._bytes = 0.0, 0
        self._places = destinations(self.engine.model) if self.choice.proof == "checksum" else {}
        self.engine.version = -1
        self.engine.load_weights(self._seen(tensors), version)
        if self._places:
            self.engine.version = -1
            self._compare(version)
            self.engine.version = version
        return PushReport(
            version=version,
            seconds=time.perf_counter() - began,
            num_bytes=self._bytes,
            buckets=1,
            proof=self.choice.proof,
            proof_seconds=self._proof_seconds,
        )

    def close(self) -> None:
        """Nothing is held."""

    def _seen(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._bytes += nbytes(tensor)
            place = self._places.get(name)
            if place is not None:
                self._hashes[name] = self._hash(tensor.detach().to(place.device, place.dtype))
            yield name, tensor

    def _compare(self, version: int) -> None:
        wrong = [name for name, place in self._places.items() if self._hashes.get(name) != self._hash(place)]
        if wrong:
            more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
            raise UserError(
                f"push.proof: the engine holds the weights of version {version} as given; got wrong {', '.join(wrong[:LISTED])}"
                f"{more}; push again; if it stays, this memory is not to be trusted"
            )

    def _hash(self, tensor: torch.Tensor) -> str:
        began = time.perf_counter()
        made = content_hash(tensor)
        self._proof_seconds += time.perf_counter() - began
        return made
