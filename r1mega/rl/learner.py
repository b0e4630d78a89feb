"""What is learnt from a rollout: rows are scored, cut into minibatches, and each is one optimizer step. In: rows; out: step results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from r1mega.config.rl import RlConfig
from r1mega.model.outputs import Hidden
from r1mega.rl.batch import RolloutBatch, RolloutRow, microbatches
from r1mega.rl.logprobs import token_logprobs
from r1mega.rl.loss.stats import MAXIMA
from r1mega.train.health import Health
from r1mega.train.policy import Policy
from r1mega.train.schedule import learning_rate
from r1mega.train.trainee import StepResult


class Learner:
    """``update``: number of updates made so far; whoever goes back sets it."""

    def __init__(self, config: RlConfig, policy: Policy, loss: Callable[..., Any], pad_id: int):
        self.config, self.sizes, self.policy, self.mesh = config, config.rl, policy, policy.mesh
        self.loss, self._pad_id = loss, pad_id
        self.health, self.update_count = Health(), 0
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
        batches = self.batches(rows)
        self._keep("old", batches)
        if self.has_reference:
            with self.policy.as_reference():
                self._keep("ref", batches)
        if self.config.teacher is not None:
            with self.policy.as_teacher():
                self._keep("teacher", batches)

    def _keep(self, name: str, batches: list[RolloutBatch]) -> None:
        for batch, values_BS in zip(batches, self.policy.score(batches, self.logprobs), strict=True):
            for row, values in zip(batch.rows, batch.split(values_BS), strict=True):
                setattr(row, name, values)

    def logprobs(self, output: torch.Tensor | Hidden, batch: RolloutBatch) -> torch.Tensor:
        """Log-probabilities of the rows' own tokens at the sampling temperature, fp32 ``[B, S]``."""
        return token_logprobs(output, batch.targets_BS, self.temperature, support_BSK=batch.support_BSK)[0]

    def batches(self, rows: Sequence[RolloutRow]) -> list[RolloutBatch]:
        """Microbatches of rows on the device."""
        size, device = self.sizes.micro_batch_size, self.mesh.device.torch_device
        return microbatches(rows, size, self._pad_id, device, self.policy.part, self.policy.row_multiple)

    def train(self, rows: Sequence[RolloutRow], rollout: int) -> list[StepResult]:
        """The rollout in ``updates_per_rollout`` random minibatches, one optimizer step each."""
        order = list(range(len(rows)))
        random.Random(f"{self.config.seed}:{rollout}:minibatches").shuffle(order)
        count = self.sizes.updates_per_rollout
        return [self.update([rows[idx] for idx in order[part::count]]) for part in range(count)]

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

        result = self.policy.update(self.batches(rows), objective, self._rate(self.update_count), self.health.judge)
        result.stats |= zip(MAXIMA, self.mesh.max(peaks, "data", "context", "pipeline").tolist(), strict=True)
        self.update_count += 1
        if not result.trouble:
            self.health.sound(result.loss)
        refresh = self.sizes.ref_refresh_updates
        if self.has_reference and refresh and self.update_count % refresh == 0:
            self.policy.copy_to_reference()
        return result
