"""What is learnt from a rollout: rows are scored, cut into minibatches, and each is one optimizer step. In: rows; out: step
results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from r1mega.config.rl import RlConfig
from r1mega.model.outputs import Hidden
from r1mega.rl.batch import Record, RolloutBatch, RolloutRow, microbatches
from r1mega.rl.logprobs import token_logprobs
from r1mega.rl.loss.stats import MAXIMA
from r1mega.rl.routing import Scoring, Updating
from r1mega.rl.types import Completion
from r1mega.train.health import Health
from r1mega.train.policy import Policy
from r1mega.train.schedule import learning_rate
from r1mega.train.trainee import StepResult


class Learner:
    """``update_count``: updates made so far; whoever goes back sets it. ``agreement``: of the last rollout that was scored, where
    the engine tells its experts, see :meth:`r1mega.rl.routing.Scoring.agreement`."""

    def __init__(self, config: RlConfig, policy: Policy, loss: Callable[..., Any], pad_id: int):
        self.config, self.sizes, self.policy, self.mesh = config, config.rl, policy, policy.mesh
        self.loss, self._pad_id = loss, pad_id
        self.health, self.update_count = Health(), 0
        self.replays = self.sizes.routing_replay
        self.hears_engine = getattr(config.engine, "routed_experts", False)
        self.agreement: list[float] = []
        self.has_reference = getattr(config.policy_loss, "kl_coef", 0) > 0
        if self.has_reference:
            policy.copy_to_reference()

    @property
    def temperature(self) -> float:
        """That log-probabilities are of; greedy responses are scored at 1."""
        return self.sizes.sampling.temperature or 1.0

    @property
    def rate(self) -> float:
        """Learning rate of the last update."""
        return self._rate(max(self.update_count - 1, 0))

    def _rate(self, update: int) -> float:
        return learning_rate(self.config.optim, update, self.sizes.rollouts * self.sizes.updates_per_rollout)

    def score(self, rows: Sequence[RolloutRow]) -> None:
        """The trainer's own log-probabilities of the rollout (pi_old), the reference's and a teacher's where they are wanted."""
        batches = self.batches(rows, (lambda row: row.completion.routed_experts) if self.hears_engine else None)
        device = self.mesh.device.torch_device
        routes = (
            Scoring(self.replays, self.policy.model_config.num_layers, device)
            if self.hears_engine or self.replays == "r2"
            else None
        )
        self._keep("old", batches, routes)
        self.agreement = routes.agreement(self.mesh) if self.hears_engine else []
        if self.has_reference:
            with self.policy.as_reference():
                self._keep("ref", batches)
        if self.config.teacher is not None:
            with self.policy.as_teacher():
                self._keep("teacher", batches)

    def _keep(self, name: str, batches: list[RolloutBatch], routes: Scoring | None = None) -> None:
        for batch, values_BS in zip(batches, self.policy.score(batches, self.logprobs, routes), strict=True):
            for row, values in zip(batch.rows, batch.split(values_BS), strict=True):
                setattr(row, name, values)

    def logprobs(self, output: torch.Tensor | Hidden, batch: RolloutBatch) -> torch.Tensor:
        """Log-probabilities of the rows' own tokens at the sampling temperature, fp32 ``[B, S]``."""
        return token_logprobs(output, batch.targets_BS, self.temperature, support_BSK=batch.support_BSK)[0]

    def score_prompts(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """The log-probabilities of each prompt's tokens but the first, at temperature 1; for a push's probe."""
        rows = [RolloutRow(prompt[:1], Completion(prompt[1:], [0.0] * (len(prompt) - 1), "length")) for prompt in prompts]
        batches = self.batches(rows)

        def read(output: torch.Tensor | Hidden, batch: RolloutBatch) -> torch.Tensor:
            return token_logprobs(output, batch.targets_BS, 1.0)[0]

        for batch, values_BS in zip(batches, self.policy.score(batches, read), strict=True):
            for row, values in zip(batch.rows, batch.split(values_BS), strict=True):
                row.old = values
        return [row.old.tolist() for row in rows]

    def batches(self, rows: Sequence[RolloutRow], record: Record | None = None) -> list[RolloutBatch]:
        """Microbatches of rows on the device, with their ``record`` of experts."""
        size, device = self.sizes.micro_batch_size, self.mesh.device.torch_device
        return microbatches(rows, size, self._pad_id, device, self.policy.part, self.policy.row_multiple, record)

    def train(self, rows: Sequence[RolloutRow], rollout: int) -> list[StepResult]:
        """The rollout in ``updates_per_rollout`` random minibatches, one optimizer step each."""
        return [self.update([rows[idx] for idx in part]) for part in self._minibatches(len(rows), rollout)]

    def updates_of(self, count: int, rollout: int) -> list[int]:
        """Which update each of the ``count`` rows of the rollout that was trained on last had its part in; the first ever is 1."""
        found, first = [0] * count, self.update_count - self.sizes.updates_per_rollout + 1
        for place, part in enumerate(self._minibatches(count, rollout)):
            for idx in part:
                found[idx] = first + place
        return found

    def _minibatches(self, count: int, rollout: int) -> list[list[int]]:
        order, parts = list(range(count)), self.sizes.updates_per_rollout
        random.Random(f"{self.config.seed}:{rollout}:minibatches").shuffle(order)
        return [order[part::parts] for part in range(parts)]

    def _replayed(self, row: RolloutRow) -> torch.Tensor | None:
        return row.completion.routed_experts if self.replays == "r3" else row.replay

    def skip(self) -> list[StepResult]:
        """A rollout is not trained on: its updates count, as those that are not applied do, so that steps stay multiples."""
        self.update_count += self.sizes.updates_per_rollout
        return []

    def update(self, rows: Sequence[RolloutRow]) -> StepResult:
        """One optimizer step on one minibatch."""
        counted = [row.num_trained for row in rows if row.counts]
        sequences, tokens = (sum(column) for column in zip(*self.mesh.gather_objects((len(counted), sum(counted))), strict=True))
        peaks = torch.zeros(len(MAXIMA), dtype=torch.float64, device=self.mesh.device.torch_device)

        def objective(output: torch.Tensor | Hidden, batch: RolloutBatch):
            logprobs_BS, entropy_BS = token_logprobs(output, batch.targets_BS, self.temperature, support_BSK=batch.support_BSK)
            loss, stats = self.loss(batch.loss_input(logprobs_BS, sequences, tokens, self.sizes.sampling.max_new_tokens))
            peaks.copy_(torch.maximum(peaks, stats.maxima()))
            return loss, {**stats.sums(), "entropy_sum": (entropy_BS * batch.mask_BS).sum()}

        record, routes = None, None
        if self.replays != "none":
            record, routes = self._replayed, Updating(self.mesh.device.torch_device)
        batches = self.batches(rows, record)
        result = self.policy.update(batches, objective, self._rate(self.update_count), self.health.judge, routes)
        result.stats |= zip(MAXIMA, self.mesh.max(peaks, "data", "context", "pipeline").tolist(), strict=True)
        self.update_count += 1
        if not result.trouble:
            self.health.sound(result.loss)
        refresh = self.sizes.ref_refresh_updates
        if self.has_reference and refresh and self.update_count % refresh == 0:
            self.policy.copy_to_reference()
        return result
