"""``r1mega rl``: prompt, rollout, reward, advantage, loss, weights, and back to rollout. On-policy, every part a registered choice.

A data rank generates for its share of the questions and trains on what it generated; groups stay whole on their data rank, the
optimizer step is over all ranks. Context ranks share a data rank's generating and judging, and each row in scoring and training.
What each part means lies in its own file; this one only orders them.
"""

from __future__ import annotations

import random
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import Stopped, UserError
from r1mega.config.rl import RlConfig
from r1mega.data.problems import Problem, load_problems
from r1mega.data.prompts import PromptStream
from r1mega.model.outputs import Hidden
from r1mega.rl.batch import RolloutBatch, RolloutRow, microbatches
from r1mega.rl.logprobs import token_logprobs
from r1mega.rl.loss.stats import MAXIMA
from r1mega.rl.metrics import mean_load, rollout_line
from r1mega.rl.reward.mix import FAILURES, by_reward, keep_failures, names_of, weights_of, write_failures
from r1mega.rl.reward.runner import RewardRunner, total
from r1mega.rl.setup import (
    encode_prompts,
    open_engine,
    open_policy,
    open_rewards,
    open_run_mesh,
    open_tokenizer,
    over_context,
    response_text,
)
from r1mega.rl.shaping import overlong_penalties
from r1mega.train import checkpoint, stop
from r1mega.train.checkpoint import TrainState
from r1mega.train.health import Health
from r1mega.train.lineage import Lineage
from r1mega.train.manifest import check_same_command
from r1mega.train.memory import Watch, watched
from r1mega.train.metrics import Metrics
from r1mega.train.profile import Profile
from r1mega.train.ranges import named_layers
from r1mega.train.saving import run_saver
from r1mega.train.schedule import learning_rate
from r1mega.train.trainee import StepResult


def rl(config: RlConfig) -> dict[str, Any]:
    """Reinforce ``config.init`` for ``rl.rollouts`` rollouts; the same call goes on from the last checkpoint."""
    mesh = open_run_mesh(config)
    init = checkpoint.resolve(config.init)
    way_out = "rl.micro_batch_size or rl.sampling.max_new_tokens"
    with (
        open_rewards(config.reward, config.reward.weights) as rewards,
        stop.heeding(),
        watched(mesh, Path(config.out), way_out) as watch,
    ):
        loop = RlLoop(config, mesh, init, rewards, watch)
        with named_layers(loop.policy.trainee, config.nvtx), loop.saver:
            while loop.state.extra["rollouts"] < config.rl.rollouts:
                loop.rollout()
            return loop.finish()


class RlLoop:
    """One rank's part of the loop. ``rollout`` is one turn: the methods that it calls are the arrows of the picture."""

    def __init__(self, config: RlConfig, mesh, init: Path, rewards: RewardRunner, watch: Watch | None = None):
        self.config, self.mesh, self.sizes, self.rewards = config, mesh, config.rl, rewards
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        if mesh.is_first:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.clear(self.checkpoints)
        mesh.barrier()
        self.tokenizer = open_tokenizer(init)
        self.saver = run_saver(
            config, self.sizes, mesh, Lineage.begin("rl", config.name, init), str(self.tokenizer.path), self._tell
        )
        self.policy = open_policy(config, init, mesh, config.optim, config.model, config.teacher)
        if watch is not None:
            watch.trainee = self.policy.trainee
        problems = load_problems(config.data.problems, limit=config.data.limit)
        context = self.policy.model_config.max_position_embeddings
        encoded = encode_prompts(self.tokenizer, problems, self.sizes.sampling.max_new_tokens, context)
        self.prompt_of = {problem.question: prompt for problem, prompt in zip(problems, encoded, strict=True)}
        self.prompts = PromptStream(problems, self.sizes.prompts_per_rollout, config.seed)
        self.state = TrainState(extra={"rollouts": 0, "seconds": 0.0})
        self.has_reference = getattr(config.policy_loss, "kl_coef", 0) > 0
        if self.has_reference:
            self.policy.copy_to_reference()
        self.health = Health()
        held = checkpoint.newest_whole(mesh, self.checkpoints)
        if held is not None:
            check_same_command("rl", held)
            self.state = self.policy.load(held, weights_only=False, verified=True)
            self.saver.go_on(held)
            self.prompts.load_state_dict(self.state.cursor)
            self.health.load_state_dict(self.state.extra.get("health", {}))
        self.advantages, self.loss = config.advantage.build(), config.policy_loss.build()
        self.engine = open_engine(config.engine, self.policy, self.tokenizer)
        self.metrics = Metrics(
            self.folder, "rollout", self.sizes.rollouts, self.state.extra["rollouts"], active=mesh.is_first, config=config
        )
        self.forget_failures()
        self.profile = Profile(self.folder, mesh, active=config.profile, skip=min(1, self.sizes.rollouts - 1), count=1)
        self.seconds: dict[str, float] = {}
        self.push()

    def rollout(self) -> None:
        """One turn: generate, judge, score, update, push."""
        began, self.seconds = time.perf_counter(), {}
        rows, problems = self.generate()
        judged = self.judge(rows, problems)
        self.score(rows)
        results = self.train(rows)
        self.saver.poll()
        troubles = [result.trouble for result in results if result.trouble]
        if troubles and self.rolled_back(troubles):
            return
        self.push()
        self.state.extra["rollouts"] += 1
        self.state.extra["seconds"] += time.perf_counter() - began
        self.state.tokens += sum(self.mesh.gather_objects(sum(row.size for row in rows)))
        asked = stop.asked(self.mesh)
        self.save(asked)
        self.log(rows, judged, results)
        self.saver.settle()  # no earlier than the lines up to it, which a run that goes on from it keeps
        self.profile.step()
        if asked:
            self.finish()
            raise Stopped(
                f"stopped: SIGTERM came, rollout {self.state.extra['rollouts']} of {self.sizes.rollouts} is saved; "
                "the same command goes on from there"
            )

    def _tell(self, kind: str, step: int, reason: str) -> None:
        self.metrics.event(kind, step, reason)

    def rolled_back(self, troubles: list[str]) -> bool:
        """Log updates that were not applied and, where the run shall and can, go back; the prompts stay moved on."""
        number, wanted = self.state.extra["rollouts"] + 1, self.sizes.on_spike
        self.saver.wait()  # the run ends or goes back now, perhaps to what is being saved
        if wanted == "stop":
            raise UserError(
                f"training: sound updates with rl.on_spike=stop; got {troubles[0]} in rollout {number}; lower optim.lr, or use "
                "rl.on_spike=skip or rollback; the same command goes on from the last checkpoint"
            )
        for trouble in troubles:
            self.health.trouble(trouble)
        held = checkpoint.newest_whole(self.mesh, self.checkpoints) if wanted == "rollback" else None
        state = self.policy.load(held, weights_only=False, verified=True) if held else None
        told = f"rolled back to rollout {state.extra['rollouts']}" if state else f"{len(troubles)} of its updates skipped"
        self.metrics.event(told, number, troubles[0])
        if state is None:
            return False
        self.state = state
        self.saver.go_on(held)
        self.metrics.rewind(state.extra["rollouts"])
        self.forget_failures()
        self.push()
        return True

    def forget_failures(self) -> None:
        """Rewards' failures of rollouts that are made again."""
        if self.mesh.is_first:
            keep_failures(self.folder / FAILURES, self.state.extra["rollouts"])

    def generate(self) -> tuple[list[RolloutRow], list[Problem]]:
        """G responses to each of this data rank's questions, groups side by side."""
        with self.timed("rollout"):
            number, sizes = self.state.extra["rollouts"], self.sizes
            mine = self.prompts.next()[self.mesh.data_rank :: self.mesh.data_size]
            problems = [problem for problem in mine for _ in range(sizes.group_size)]
            prompts = [self.prompt_of[problem.question] for problem in problems]
            line = self.mesh.axes["context"]
            place = f"{self.mesh.data_rank}" if line.size == 1 else f"{self.mesh.data_rank}:{line.rank}"
            seed = random.Random(f"{self.config.seed}:{number}:{place}").getrandbits(62)
            completions = over_context(
                self.mesh, len(prompts), lambda share: self.engine.generate(prompts[share], sizes.sampling, seed)
            )
        return [RolloutRow(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)], problems

    def judge(self, rows: list[RolloutRow], problems: list[Problem]) -> dict[str, list[float]]:
        """Rewards by name and their sum, weighted by the problem's source; sets the rows' advantages."""
        weights, by_source = self.config.reward.weights, self.config.reward.by_source
        with self.timed("reward"):
            texts = [response_text(self.tokenizer, row.completion) for row in rows]
            records = over_context(self.mesh, len(texts), lambda share: self.rewards.score(problems[share], texts[share]))
            rewards = total(records, [weights_of(problem.source, weights, by_source) for problem in problems])
            shaped = self._shape(rows)
            rewards = [reward + penalty for reward, penalty in zip(rewards, shaped, strict=True)]
            if self.sizes.shuffle_rewards:
                rewards = self._shuffled(rewards)
            for row, advantage in zip(rows, self._advantages(rows, rewards), strict=True):
                row.advantage = advantage
        if self.mesh.axes["context"].rank == 0:
            write_failures(self.folder / FAILURES, self.state.extra["rollouts"] + 1, problems, texts, records)
        by_name = by_reward(records, names_of(weights, by_source), self.mesh.gather_objects)
        failed = [float(any(entry.failure for entry in record.values())) for record in records]
        punished = {"overlong": shaped} if self.sizes.overlong.cache_tokens else {}
        return {**by_name, **punished, "reward": rewards, "reward_failed": failed}

    def _shape(self, rows: list[RolloutRow]) -> list[float]:
        """What the lengths add to the rewards; rows that the loss shall not see are told so."""
        overlong, longest = self.sizes.overlong, self.sizes.sampling.max_new_tokens
        for row in rows:
            row.counts = not (overlong.mask_truncated and row.completion.finish_reason == "length")
        lengths = [len(row.completion.token_ids) for row in rows]
        return overlong_penalties(lengths, longest, overlong.cache_tokens, overlong.penalty)

    def _advantages(self, rows: list[RolloutRow], rewards: list[float]) -> list[float]:
        """Of this rank's rows; a choice may normalise over all ranks' groups, so it is given all of them."""
        everyone = self.mesh.gather_objects((rewards, [row.counts for row in rows]))
        rewards_PG, counts_PG = (
            torch.tensor([item for part in column for item in part]).view(-1, self.sizes.group_size)
            for column in zip(*everyone, strict=True)
        )
        advantages = self.advantages(rewards_PG, counts_PG).flatten().tolist()
        return advantages[self.mesh.data_rank * len(rows) :][: len(rows)]

    def _shuffled(self, rewards: list[float]) -> list[float]:
        everyone = [value for part in self.mesh.gather_objects(rewards) for value in part]
        random.Random(f"{self.config.seed}:{self.state.extra['rollouts']}:control").shuffle(everyone)
        return everyone[self.mesh.data_rank * len(rewards) :][: len(rewards)]

    def score(self, rows: list[RolloutRow]) -> None:
        """The trainer's own log-probabilities of the rollout (pi_old), the reference's and a teacher's where they are wanted."""
        with self.timed("score"):
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
        temperature = self.sizes.sampling.temperature or 1.0
        return token_logprobs(output, batch.targets_BS, temperature, support_BSK=batch.support_BSK)[0]

    def batches(self, rows: list[RolloutRow]) -> list[RolloutBatch]:
        """Microbatches of rows on the device."""
        size, pad_id, device = self.sizes.micro_batch_size, self.tokenizer.pad_id, self.mesh.device.torch_device
        return microbatches(rows, size, pad_id, device, self.policy.part, self.policy.row_multiple)

    def train(self, rows: list[RolloutRow]) -> list[StepResult]:
        """The rollout in ``updates_per_rollout`` random minibatches, one optimizer step each."""
        with self.timed("train"):
            order = list(range(len(rows)))
            random.Random(f"{self.config.seed}:{self.state.extra['rollouts']}:minibatches").shuffle(order)
            count = self.sizes.updates_per_rollout
            return [self.update([rows[idx] for idx in order[part::count]]) for part in range(count)]

    def update(self, rows: list[RolloutRow]) -> StepResult:
        """One optimizer step on one minibatch."""
        counted = [len(row.completion.token_ids) for row in rows if row.counts]
        sequences, tokens = (sum(column) for column in zip(*self.mesh.gather_objects((len(counted), sum(counted))), strict=True))
        peaks = torch.zeros(len(MAXIMA), dtype=torch.float64, device=self.mesh.device.torch_device)

        def objective(output: torch.Tensor | Hidden, batch: RolloutBatch):
            logprobs_BS, entropy_BS = token_logprobs(
                output, batch.targets_BS, self.sizes.sampling.temperature or 1.0, support_BSK=batch.support_BSK
            )
            longest = self.sizes.sampling.max_new_tokens
            loss, stats = self.loss(batch.loss_input(logprobs_BS, sequences, tokens, longest))
            peaks.copy_(torch.maximum(peaks, stats.maxima()))
            return loss, {**stats.sums(), "entropy_sum": (entropy_BS * batch.mask_BS).sum()}

        steps = self.sizes.rollouts * self.sizes.updates_per_rollout
        result = self.policy.update(
            self.batches(rows), objective, learning_rate(self.config.optim, self.state.step, steps), self.health.judge
        )
        result.stats |= zip(MAXIMA, self.mesh.max(peaks, "data", "context", "pipeline").tolist(), strict=True)
        self.state.step += 1
        if not result.trouble:
            self.health.sound(result.loss)
        refresh = self.sizes.ref_refresh_updates
        if self.has_reference and refresh and self.state.step % refresh == 0:
            self.policy.copy_to_reference()
        return result

    def push(self) -> None:
        """Hand the weights to the engine, in memory, through the name table."""
        with self.timed("push"):
            self.engine.load_weights(self.policy.published_tensors(), version=self.state.step)

    def log(self, rows: list[RolloutRow], judged: dict[str, list[float]], results: list[StepResult]) -> None:
        """One metric line a rollout, over all ranks."""
        sizes = self.sizes
        self.metrics.advance()
        line = rollout_line(self.mesh, rows, judged, results, sizes.group_size)
        number = self.state.extra["rollouts"]
        if number % sizes.log_every and number != sizes.rollouts:
            return
        rate = learning_rate(self.config.optim, self.state.step - 1, sizes.rollouts * sizes.updates_per_rollout)
        seconds = {f"seconds_{name}": value for name, value in self.seconds.items()}
        place = {"update": self.state.step, "rollout": number, "lr": rate, "tokens": self.state.tokens}
        self.metrics.log(
            {**place, **self.policy.peak_gib(), **line, **seconds, "expert_load": mean_load(results), **self.saver.metrics()}
        )

    def save(self, asked: bool) -> None:
        """Begin a checkpoint where it is due, and where SIGTERM came (``asked``)."""
        number, every = self.state.extra["rollouts"], self.sizes.save_every
        last = number == self.sizes.rollouts
        if last or asked or (every and number % every == 0):
            self.state.extra |= {"health": self.health.state_dict(), "save_stall_seconds": self.saver.stall_seconds}
            self.state.cursor = self.prompts.state_dict()
            self.policy.save(self.saver, self.state)

    def finish(self) -> dict[str, Any]:
        """Close and say where the result lies; what is under way is waited for."""
        self.saver.wait(exports=self.state.extra["rollouts"] == self.sizes.rollouts)
        self.profile.close()
        self.metrics.close()
        return {
            "checkpoint": str(checkpoint.resolve(self.checkpoints)),
            "rollouts": self.state.extra["rollouts"],
            "updates": self.state.step,
            "tokens": self.state.tokens,
            "seconds": self.state.extra["seconds"],
            "save_stall_seconds": self.saver.stall_seconds,
        }

    @contextmanager
    def timed(self, name: str):
        """Add the time inside to the phase's sum."""
        began = time.perf_counter()
        yield
        self.mesh.device.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
