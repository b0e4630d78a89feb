"""The policy that RL sees: score tokens, update on an objective, name its weights, stand in for its reference. No Megatron in here.

In and out are tensors ``[B, S]`` on the policy's device; the objective is the caller's function of logits or, with
``parallel.fused_loss`` or ``precision.fp32_head``, of what they are made of. Where several context ranks share a sequence, a rank
sees its own parts of it (:attr:`Policy.part`) and its objective is the share of those tokens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from r1mega.config.model import ModelConfig
from r1mega.config.run import PrecisionConfig
from r1mega.config.train import OptimConfig
from r1mega.mesh import Mesh
from r1mega.model import names, published
from r1mega.model.context import ContextPart
from r1mega.model.forward import hidden, whole_logits
from r1mega.model.outputs import Hidden
from r1mega.model.replay import Replay
from r1mega.train import checkpoint
from r1mega.train.checkpoint import TrainState
from r1mega.train.gathering import whole_tensors
from r1mega.train.saving import Saver
from r1mega.train.trainee import Judge, StepResult, Trainee


class HasTokens(Protocol):
    """A microbatch: anything with int64 ``tokens_BS``, padded on the right; of several context ranks the own parts of the rows."""

    tokens_BS: torch.Tensor


class Routes(Protocol):
    """What routers are told of microbatches, and who hears what they tell; on every rank of a pipeline, for its stage."""

    def begin(self, batch: Any) -> Replay:
        """Before the forward pass of a microbatch."""

    def end(self, batch: Any, replay: Replay) -> None:
        """After it. Called by all tensor and context ranks."""


class Policy:
    """One model under reinforcement, or, without ``optim``, a model to be asked."""

    def __init__(self, model: ModelConfig, optim: OptimConfig | None, mesh: Mesh, precision: PrecisionConfig | str):
        self.model_config, self.mesh = model, mesh
        self.part = ContextPart.of(mesh.axes["context"])
        self.gives_hidden = mesh.parallel.fused_loss or getattr(precision, "fp32_head", False)
        self.trainee = Trainee(model, optim, mesh, precision)
        self._reference: dict[str, torch.Tensor] | None = None
        self._teacher: dict[str, torch.Tensor] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.trainee.dtype

    def peak_gib(self) -> dict[str, float]:
        """Peak memory, of the updates by phase, for a metric line; see :class:`r1mega.train.peaks.Peaks`."""
        return self.trainee.peaks.gib()

    @property
    def row_multiple(self) -> int:
        """What divides the width of a microbatch's whole rows: the layout cuts them into so many equal pieces."""
        return self.part.multiple * self.mesh.axes["tensor"].size

    def _outputs(self, routes: Routes | None) -> Callable[[torch.nn.Module, HasTokens], torch.Tensor | Hidden]:
        made = hidden if self.gives_hidden else whole_logits

        def output(model: torch.nn.Module, batch: HasTokens) -> torch.Tensor | Hidden:
            if routes is None:
                return made(model, batch.tokens_BS, self.part)
            replay = routes.begin(batch)
            found = made(model, batch.tokens_BS, self.part, replay)
            routes.end(batch, replay)
            return found

        return output

    def score(self, batches: Sequence[HasTokens], read: Callable[[Any, Any], Any], routes: Routes | None = None) -> list[Any]:
        """``read(output, batch)`` for every microbatch, without gradients. ``routes`` None: routers choose for themselves.

        ``output``: logits ``[B, S, V]``, or, where ``gives_hidden``, :class:`r1mega.model.outputs.Hidden`.
        """
        return self.trainee.read(batches, self._outputs(routes), read)

    def update(
        self,
        batches: Sequence[HasTokens],
        objective: Callable[[Any, Any], tuple[torch.Tensor, dict[str, float]]],
        lr: float,
        judge: Judge,
        routes: Routes | None = None,
    ) -> StepResult:
        """One optimizer step on the sum of ``objective(output, batch)`` over all microbatches of all ranks.

        ``output``, ``routes``: see :meth:`score`. The objective returns its share of the loss, already normalised for the whole
        minibatch, and statistics to be added up. A step that ``judge`` finds wrong is not applied.
        """
        # The trainee divides by the number of items: one a microbatch, which one of its context ranks counts.
        parts, items = len(batches) * self.mesh.data_size, int(self.part.rank == 0)

        def loss(output: torch.Tensor | Hidden, batch: HasTokens):
            value, stats = objective(output, batch)
            return value * parts, items, {**stats, "objective": float(value.detach())}

        result = self.trainee.step(list(batches), self._outputs(routes), loss, lr, judge)
        result.loss = result.stats.pop("objective")
        return result

    def published_tensors(self, everywhere: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights under their Hugging Face names, as views of the live ones. Called, and walked to its end, by all ranks.

        Where ranks hold parts, whole tensors are gathered as they are walked: on every rank, or, without ``everywhere``, on the
        first alone, and the others yield nothing.
        """
        return names.to_hf(self.model_config, whole_tensors(self.trainee, everywhere=everywhere))

    def published_config(self, *, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> dict[str, Any]:
        """``config.json`` of the published format."""
        dtype = str(self.torch_dtype).removeprefix("torch.")
        return published.published_config(self.model_config, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, dtype=dtype)

    def copy_to_reference(self) -> None:
        """Make the policy as it is now the reference."""
        if self._reference is None:
            self._reference = self._copy()
            return
        for name, tensor in self.trainee.named_tensors():
            self._reference[name].copy_(tensor)

    def hold_teacher(self, path: str | Path) -> None:
        """Keep a checkpoint's weights for :meth:`as_teacher`. The policy has them too, until its own are loaded: do that next.

        Raises UserError as :meth:`load`.
        """
        checkpoint.load(self.trainee, path, weights_only=True)
        self._teacher = self._copy()

    def as_reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the reference's weights stand in the policy's place, the policy's are put by; to score, save and load them."""
        return self._as(self._reference)

    def as_teacher(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the teacher's weights stand in the policy's place; for scoring alone."""
        return self._as(self._teacher)

    @contextlib.contextmanager
    def _as(self, values: dict[str, torch.Tensor]) -> Iterator[None]:
        self._exchange(values)
        try:
            yield
        finally:
            self._exchange(values)

    def _exchange(self, values: dict[str, torch.Tensor]) -> None:
        """The policy's weights and ``values`` change places, with room for one tensor more."""
        for name, tensor in self.trainee.named_tensors():
            held = tensor.clone()
            tensor.copy_(values[name])
            values[name].copy_(held)

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.trainee.named_tensors()}

    def load(self, path: str | Path, *, weights_only: bool, verified: bool = False) -> TrainState:
        """Load a checkpoint; see :func:`r1mega.train.checkpoint.load`.

        A policy that has a reference gets the checkpoint's with a full load; where that has none, it keeps its own and says so.
        """
        state = checkpoint.load(self.trainee, path, weights_only=weights_only, verified=verified)
        if not weights_only and self._reference is not None:
            with self.as_reference():
                is_there = checkpoint.load_reference(self.trainee, path)
            if not is_there and self.mesh.is_first:
                print(f"checkpoint {path}: without a reference; the KL is to the policy that the run began with", file=sys.stderr)
        return state

    def save(self, saver: Saver, state: TrainState) -> Path:
        """Begin a checkpoint with the reference beside the weights; see :meth:`r1mega.train.saving.Saver.begin`."""
        if self.trainee.optimizer is not None:
            self.trainee.allocate_moments()  # where no update has been made so far
        return saver.begin(self.trainee, state, None if self._reference is None else self.as_reference)
