"""One run of ``r1mega rl`` on this rank: everything that is opened for it, what it keeps between turns, what it writes.

The loop orders the calls; what crosses ranks does so here: samples are shared inside a data rank, rewards over all of them, weights
are gathered for the push. A failure of one rank's rollouts or push is told to all before anyone goes on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from r1mega.config.rl import RlConfig
from r1mega.data.problems import load_problems
from r1mega.data.prompts import PromptStream
from r1mega.rl.autopsy.watch import Watch
from r1mega.rl.batch import RolloutRow
from r1mega.rl.delivery import Delivery
from r1mega.rl.environment import Single
from r1mega.rl.environment.play import Player
from r1mega.rl.learner import Learner
from r1mega.rl.ledger import FOLDER, Frame, History, Ledger, next_start
from r1mega.rl.metrics import Pace, mean_load, rollout_line, source_line
from r1mega.rl.place import Place
from r1mega.rl.reward.mix import FAILURES, by_reward, keep_failures, names_of, weights_of, write_failures
from r1mega.rl.reward.runner import RewardRunner
from r1mega.rl.rollouts import Judge, Plan, Rollouts, Taken, result_of, sample_text
from r1mega.rl.routing import RoutingShape
from r1mega.rl.setup import encode_prompts, open_engine, open_environment, open_policy, open_rewards, open_run_mesh, open_tokenizer
from r1mega.rl.shaping import learnable_groups, overlong_penalties
from r1mega.rl.together import AGREE_SECONDS, together
from r1mega.rl.types import Sample
from r1mega.rl.validation import Validation, valid_line
from r1mega.train import checkpoint, stop
from r1mega.train.checkpoint import TrainState
from r1mega.train.lineage import Lineage
from r1mega.train.manifest import check_same_command
from r1mega.train.memory import watched
from r1mega.train.metrics import Metrics
from r1mega.train.profile import Profile
from r1mega.train.ranges import named_layers
from r1mega.train.saving import run_saver
from r1mega.train.trainee import StepResult


@contextmanager
def opened(config: RlConfig) -> Iterator[Run]:
    """A run, ready for its next rollout; what it has started ends with the context, however that ends."""
    mesh = open_run_mesh(config)
    init = checkpoint.resolve(config.init)
    with ExitStack() as stack:
        rewards = stack.enter_context(open_rewards(config.reward, config.reward.weights))
        stack.enter_context(stop.heeding())
        watch = stack.enter_context(watched(mesh, Path(config.out), "rl.micro_batch_size or rl.sampling.max_new_tokens"))
        run = Run(config, mesh, init, rewards, stack)
        watch.trainee = run.policy.trainee
        stack.enter_context(named_layers(run.policy.trainee, config.nvtx))
        stack.enter_context(run.saver)
        yield run


class Run:
    """``done``: rollouts that have been trained on. ``stack``: gets what has to be closed."""

    def __init__(self, config: RlConfig, mesh, init: Path, rewards: RewardRunner, stack: ExitStack):
        self.config, self.mesh, self.sizes = config, mesh, config.rl
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        if mesh.is_first:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.clear(self.checkpoints)
        mesh.barrier()
        self.tokenizer = open_tokenizer(init)
        environment, environment_name = open_environment(config.environment)
        lineage = Lineage.begin("rl", config.name, init)
        self.saver = run_saver(config, self.sizes, mesh, lineage, str(self.tokenizer.path), self._tell)
        self.policy = open_policy(config, init, mesh, config.optim, config.model, config.teacher)
        self.learner = Learner(config, self.policy, config.policy_loss.build(), self.tokenizer.pad_id)
        problems = load_problems(config.data.problems, limit=config.data.limit)
        context = self.policy.model_config.max_position_embeddings
        # refuses before anything is generated
        encode_prompts(self.tokenizer, problems, self.sizes.sampling.max_new_tokens, context)
        held_out = load_problems(self.sizes.valid.problems, limit=self.sizes.valid.limit) if self.sizes.valid.every else []
        encode_prompts(self.tokenizer, held_out, self.sizes.sampling.max_new_tokens, context)
        self._place = Place.of(mesh, self.sizes.prompts_per_rollout)
        self.stream = PromptStream(problems, config.seed, self._place.number, self._place.count)
        self.state = TrainState(extra={"rollouts": 0, "seconds": 0.0})
        held = checkpoint.newest_whole(mesh, self.checkpoints)
        if held is not None:
            check_same_command("rl", held)
            self._take_state(self.policy.load(held, weights_only=False, verified=True))
            self.saver.go_on(held)
        self.advantages = config.advantage.build()
        self.ledger, known = self._open_ledger()
        stack.callback(self.ledger.close)
        self.engine = open_engine(config.engine, self.policy, self.tokenizer, self.folder, self._place.generates)
        self.rollouts: Rollouts | None = None
        self._validation: Validation | None = None
        if self.engine is not None:
            stack.callback(self.engine.close)
            judge = Judge(rewards, lambda source: weights_of(source, config.reward.weights, config.reward.by_source))
            sampling, seconds = self.sizes.sampling, self.sizes.step_seconds
            player = Player(environment, self.engine, self.tokenizer, sampling, context, seconds, environment_name)
            self.rollouts = Rollouts(self._plan(), player, judge, self.stream, self.ledger, known)
            stack.callback(self.rollouts.close)
            if held_out:
                self._validation = Validation(self.sizes.valid, held_out, self.rollouts, self._place, config.seed)
        self.delivery = Delivery(config.push, self.learner, self.engine, self.rollouts, self.hf_config, self.folder, stack)
        self.pace = Pace(mesh, self.rollouts)
        self._watch = Watch(config, self.learner, self.tokenizer, self._place.writes)
        self._environment_failed = False
        self.metrics = Metrics(self.folder, "rollout", self.sizes.rollouts, self.done, active=mesh.is_first, config=config)
        stack.callback(self.metrics.close)
        self._forget_failures()
        self.profile = Profile(self.folder, mesh, active=config.profile, skip=min(1, self.sizes.rollouts - 1), count=1)
        self.seconds: dict[str, float] = {}

    @property
    def done(self) -> int:
        """Rollouts that have been trained on."""
        return self.state.extra["rollouts"]

    def _plan(self) -> Plan:
        sizes, wanted = self.sizes, self.sizes.dynamic_sampling

        def keeps(group: list[Sample]) -> bool:
            # a source may have rewards of its own, without that one
            values = [sample.records[wanted.by].value if wanted.by in sample.records else sample.reward for sample in group]
            return bool(
                learnable_groups(torch.tensor([values], dtype=torch.float64), torch.tensor([list(map(self._counts, group))]))
            )

        return Plan(
            share=self._place.share,
            group_size=sizes.group_size,
            sampling=sizes.sampling,
            seed=self.config.seed,
            lag=sizes.lag,
            oversample=sizes.oversample,
            patience=wanted.oversampling,
            routing=RoutingShape.of(self.policy.model_config) if self.learner.hears_engine else None,
            replays=sizes.routing_replay == "r3" or getattr(self.config.engine, "sampling_mask", False),
            **({"keeps": keeps} if wanted.by else {}),
        )

    def _counts(self, sample: Sample) -> bool:
        return not (self.sizes.overlong.mask_truncated and sample.completion.finish_reason == "length")

    def _open_ledger(self) -> tuple[Ledger, dict[tuple[int, int], Frame]]:
        """This start's file, and what earlier ones have made that this one can use."""
        folder, extra = self.folder / FOLDER, self.state.extra
        start = self.mesh.broadcast_object(next_start(folder))
        known: dict[tuple[int, int], Frame] = {}
        ledger = Ledger(folder, start, self.mesh.rank, self.done, self.state.step)
        self.mesh.barrier()  # every file has begun: the history says from where this start goes on
        if start > 1 and self._place.generates:
            history = History(folder, extra.get("ledger_start", 1))
            cursor = self.stream.state_dict()
            known = history.unused(cursor["consumed"], cursor["done"])
        extra["ledger_start"] = start
        return ledger, known

    @property
    def hf_config(self) -> dict[str, Any]:
        """The policy's ``config.json``."""
        ids = self.tokenizer
        return self.policy.published_config(bos_id=ids.bos_id, eos_id=ids.eos_id, pad_id=ids.pad_id)

    @contextmanager
    def engine_asleep(self) -> Iterator[None]:
        """The engine's device memory is the trainer's meanwhile, where the engine can sleep and nothing runs ahead."""
        with self.delivery.asleep(in_step=self.sizes.lag == 0 and self.sizes.oversample == 1.0):
            yield

    def push(self) -> None:
        """Hand the weights to the engine and have it prove that it holds them; nothing is sampled meanwhile."""
        with self.timed("push"):
            self.delivery.push(self.learner.update_count)

    def _take_state(self, state: TrainState) -> None:
        self.state, self.learner.update_count = state, state.step
        self.stream.load_state_dict(state.cursor)
        self.learner.health.load_state_dict(state.extra.get("health", {}))

    def _tell(self, kind: str, step: int, reason: str) -> None:
        self.metrics.event(kind, step, reason)

    def begin_turn(self) -> float:
        """Start a turn's clocks."""
        self.seconds = {}
        return time.perf_counter()

    def take(self) -> Taken:
        """The next rollout's groups of this data rank; all its ranks get them. Servers that have come back get a push meanwhile."""
        self._wait("rollout")
        taken = together(self.mesh, lambda: self.rollouts.take() if self.rollouts else Taken())
        for axis in ("context", "tensor", "pipeline"):
            if self.mesh.axes[axis].size > 1:
                parts = self.mesh.gather_objects(taken, axis)
                waited = max(part.waited_seconds for part in parts)
                groups, dropped = sum((part.groups for part in parts), []), sum((part.dropped for part in parts), [])
                taken = Taken(groups, dropped, waited, sum(part.refused for part in parts))
        return taken

    def _wait(self, phase: str, work: asyncio.Task | None = None) -> None:
        """Until all ranks' ``work`` (None: rollouts) is done; ``phase``: the clock that runs, which a push meanwhile is none of."""
        seconds = AGREE_SECONDS if self.mesh.world_size > 1 else None
        states = {"waiting"}
        while states != {"done"}:
            states = set(self.mesh.gather_everywhere(self.rollouts.look(seconds, work) if self.rollouts else "done"))
            if "stale" in states:
                self.metrics.event("pushed again", self.done + 1, "a server has started anew")
                before = self.seconds.get("push", 0.0)
                self.push()
                self.seconds[phase] = self.seconds.get(phase, 0.0) - (self.seconds["push"] - before)

    def validate(self) -> dict[str, float]:
        """Numbers of the held-out problems (:func:`r1mega.rl.validation.valid_line`), where it is their turn and was not done."""
        every, done = self.sizes.valid.every, self.done
        is_due = every and (done % every == 0 or done == self.sizes.rollouts)
        if not is_due or self.state.extra.get("validated") == done:
            return {}
        self.state.extra["validated"] = done
        with self.timed("valid"):
            work = self.rollouts.begin(self._validation.answers()) if self.rollouts else None
            self._wait("valid", work)
            mine = together(self.mesh, lambda: result_of(work) if work else [])
        return valid_line([answer for part in self.mesh.gather_everywhere(mine) for answer in part])

    def begin(self) -> None:
        """Push the first weights; a run that begins, or was stopped before it could, says what they are worth."""
        self.push()
        if line := self.validate():
            self.metrics.log({"update": self.learner.update_count, "rollout": self.done, **line})

    def value(self, taken: Taken) -> tuple[list[RolloutRow], dict[str, list[float]]]:
        """Rows with their advantages, which a choice may normalise over all ranks' groups; and what the rewards said, by name."""
        samples, sizes = taken.samples, self.sizes
        lengths = [len(sample.completion.token_ids) for sample in samples]
        shaped = overlong_penalties(lengths, sizes.sampling.max_new_tokens, sizes.overlong.cache_tokens, sizes.overlong.penalty)
        rewards = [sample.reward + penalty for sample, penalty in zip(samples, shaped, strict=True)]
        if sizes.shuffle_rewards:
            rewards = self.shuffled(rewards)
        counts = [self._counts(sample) for sample in samples]
        advantages = self.advantages_of(rewards, counts)
        rows = []
        for sample, advantage, count in zip(samples, advantages, counts, strict=True):
            sample.advantage = advantage
            rows.append(RolloutRow(sample.prompt, sample.completion, advantage, counts=count, own=sample.own))
        names = names_of(self.config.reward.weights, self.config.reward.by_source)
        told = by_reward([sample.records for sample in samples], names, self.mesh.gather_objects)
        if not isinstance(self.config.environment, Single):
            told["environment"] = [sample.environment_reward for sample in samples]
            told["environment_failed"] = [float(bool(sample.environment_failure)) for sample in samples]
            self._tell_of_failures(samples)
        punished = {"overlong": shaped} if sizes.overlong.cache_tokens else {}
        failed = [float(any(record.failure for record in sample.records.values())) for sample in samples]
        return rows, {**told, **punished, "reward": rewards, "reward_failed": failed}

    def advantages_of(self, rewards: list[float], counts: list[bool]) -> list[float]:
        """Of this data rank's responses; a choice may normalise over all ranks' groups, so it is given all of them."""
        everyone = self.mesh.gather_objects((rewards, counts))
        rewards_PG, counts_PG = (
            torch.tensor([item for part in column for item in part]).view(-1, self.sizes.group_size)
            for column in zip(*everyone, strict=True)
        )
        first = sum(len(part[0]) for part in everyone[: self.mesh.data_rank])
        return self.advantages(rewards_PG, counts_PG).flatten().tolist()[first : first + len(rewards)]

    def watch(self, rows: list[RolloutRow]) -> bool:
        """Are engine and trainer near enough to train on the rollout? See :class:`r1mega.rl.autopsy.watch.Watch`."""
        return self._watch.look(rows, self.done + 1, self.engine, self.delivery.pusher, self._tell)

    def _tell_of_failures(self, samples: list[Sample]) -> None:
        """The first failure of the environment in this start is told with its name; the others are counted."""
        mine = next((sample.environment_failure for sample in samples if sample.environment_failure), "")
        failures = [failure for failure in self.mesh.gather_objects(mine) if failure]
        if failures and not self._environment_failed:
            self._environment_failed = True
            self.metrics.event("the environment failed; environment_failed counts such episodes", self.done + 1, failures[0])

    def shuffled(self, rewards: list[float]) -> list[float]:
        """The rewards of all ranks in another order: this rank's part of it."""
        everyone = [value for part in self.mesh.gather_objects(rewards) for value in part]
        random.Random(f"{self.config.seed}:{self.done}:control").shuffle(everyone)
        return everyone[self.mesh.data_rank * len(rewards) :][: len(rewards)]

    def count(self, taken: Taken, rows: list[RolloutRow], seconds: float, is_sound: bool = True) -> None:
        """The rollout is trained on: counted, and written into the ledger as used; as dropped where it is not ``is_sound``."""
        extra = self.state.extra
        extra["rollouts"] += 1
        extra["seconds"] += seconds
        self.state.step = self.learner.update_count
        self.trained_tokens = sum(self.mesh.gather_objects(sum(row.size for row in rows)))
        self.state.tokens += self.trained_tokens
        used, dropped = self._finish(taken)
        if not self._place.writes:
            return
        place = {"rollout": self.done, "update": self.learner.update_count, "consumed": self.stream.consumed, "time": time.time()}
        samples = taken.samples
        about = {"samples": [sample.id for sample in samples], "advantages": [sample.advantage for sample in samples]}
        about |= {"updates": self.learner.updates_of(len(samples), self.done - 1), "seconds": self.seconds}
        kind, about = ("use", about) if is_sound else ("drop", {"reason": "rl.diff_budget"})
        self.ledger.write(kind, {**place, "items": used, **about})
        if dropped:
            self.ledger.write("drop", {**place, "items": dropped, "reason": "rl.dynamic_sampling"})
        texts = [sample_text(self.tokenizer, sample) for sample in samples]
        records = [sample.records for sample in samples]
        write_failures(self.folder / FAILURES, self.done, [sample.problem for sample in samples], texts, records)

    def _finish(self, taken: Taken) -> tuple[list[int], list[int]]:
        """All ranks' questions of a rollout are done; this data rank's that were used, and that were dropped."""
        used, dropped = ([group[0].item for group in groups] for groups in (taken.groups, taken.dropped))
        for items in self.mesh.gather_objects(used + dropped):
            self.stream.finish(items)
        return used, dropped

    def log(
        self,
        taken: Taken,
        rows: list[RolloutRow],
        told: dict[str, list[float]],
        results: list[StepResult],
        valid: dict[str, float],
    ) -> None:
        """One metric line a rollout, over all ranks; ``valid``: of :meth:`validate`."""
        self.metrics.advance()
        first = self.learner.update_count - len(results)
        line = rollout_line(self.mesh, rows, taken, told, results, self.sizes.group_size, first)
        line |= source_line(self.mesh.gather_objects, taken.samples, told["reward"])
        line |= self.pace.line(self.seconds, self.trained_tokens)
        counted = {"reward_failures": line["reward_failed"] * line["responses"], "engine_deaths": line.get("engine_deaths", 0)}
        self.metrics.count(rollouts=1, samples=line["responses"], **counted)
        if self.learner.hears_engine:
            line |= {"routing_agreement": self.learner.agreement, "routing_refused": sum(self.mesh.gather_objects(taken.refused))}
        if self.done % self.sizes.log_every and self.done != self.sizes.rollouts and not valid:
            return
        whole = sum(self.seconds.values())
        line |= {f"seconds_{name}": value for name, value in self.seconds.items()}
        line["idle_share"] = self.seconds.get("rollout", 0.0) / max(whole, 1e-9)
        line |= (self.delivery.report.line() if self.delivery.report else {}) | self._watch.line() | valid
        place = {"update": self.learner.update_count, "rollout": self.done, "lr": self.learner.rate, "tokens": self.state.tokens}
        self.metrics.log({**place, **self.policy.peak_gib(), **line, "expert_load": mean_load(results), **self.saver.metrics()})

    def save(self, asked: bool) -> None:
        """Begin a checkpoint where it is due, and where SIGTERM came (``asked``)."""
        every, last = self.sizes.save_every, self.done == self.sizes.rollouts
        if last or asked or (every and self.done % every == 0):
            self.ledger.sync()  # a checkpoint counts on what its rollouts have used
            self.state.extra |= {"health": self.learner.health.state_dict(), "save_stall_seconds": self.saver.stall_seconds}
            self.state.cursor = self.stream.state_dict()
            self.policy.save(self.saver, self.state)

    def go_back(self, taken: Taken) -> bool:
        """Back to the last checkpoint, with other questions than those of ``taken`` and of the rollouts that are undone.

        Returns false where there is no checkpoint.
        """
        held = checkpoint.newest_whole(self.mesh, self.checkpoints)
        if held is None:
            return False
        if self.rollouts is not None:
            self.rollouts.abandon()
        self._finish(taken)
        moved_on, start, health = self.stream.state_dict(), self.state.extra["ledger_start"], self.learner.health.state_dict()
        self._take_state(self.policy.load(held, weights_only=False, verified=True))
        undone = self.stream.done_until(moved_on)
        self.stream.load_state_dict(moved_on)
        self.learner.health.load_state_dict(health)
        self.state.extra["ledger_start"] = start
        self.saver.go_on(held)
        self.ledger.write("back", {"rollout": self.done, "update": self.learner.update_count})
        if self.mesh.is_first:
            place = {"rollout": self.done + 1, "update": self.learner.update_count, "consumed": self.stream.consumed}
            self.ledger.write("drop", {**place, "items": undone, "reason": "rl.on_spike"})
        self._forget_failures()
        return True

    def _forget_failures(self) -> None:
        """Rewards' failures of rollouts that are made again."""
        if self.mesh.is_first:
            keep_failures(self.folder / FAILURES, self.done)

    def finish(self) -> dict[str, Any]:
        """Wait for what is under way and say where the result lies."""
        self.saver.wait(exports=self.done == self.sizes.rollouts)
        self.profile.close()
        self.metrics.close()
        return {
            "checkpoint": str(checkpoint.resolve(self.checkpoints)),
            "rollouts": self.done,
            "updates": self.learner.update_count,
            "tokens": self.state.tokens,
            "seconds": self.state.extra["seconds"],
            "save_stall_seconds": self.saver.stall_seconds,
        }

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time inside to the phase's sum."""
        began = time.perf_counter()
        yield
        self.mesh.device.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
