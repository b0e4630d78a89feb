"""The loop of pretraining and SFT: batches in, optimizer steps, metrics, validation, checkpoints, resume.

One loop for both; they differ in the loader and in where the weights come from. The loss is the mean over learnt tokens of the
global batch, whatever the split into ranks and microbatches.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import Stopped, UserError
from r1mega.config.model import ModelConfig
from r1mega.config.parallel_rules import microbatch_step, stages_per_rank
from r1mega.config.rules import check_cut
from r1mega.config.train import PretrainConfig, SftConfig
from r1mega.data.loader import DocumentLoader, PretrainLoader, SftLoader, TokenBatch, validation_batches
from r1mega.data.tokenfile import TokenFile, check_tokenizer
from r1mega.data.tokenizer import tokenizer_hash
from r1mega.device import open_device, peak_tflops
from r1mega.mesh import Mesh, open_mesh
from r1mega.model.context import ContextPart
from r1mega.model.flops import train_flops_per_token
from r1mega.model.forward import TokenTensors, token_losses
from r1mega.train import checkpoint, stop
from r1mega.train.checkpoint import TrainState
from r1mega.train.experts import Placements
from r1mega.train.health import Health
from r1mega.train.lineage import Lineage
from r1mega.train.manifest import check_same_command
from r1mega.train.memory import watched
from r1mega.train.metrics import Metrics
from r1mega.train.pipeline.timeline import write_events
from r1mega.train.profile import Profile
from r1mega.train.ranges import named_layers
from r1mega.train.saving import run_saver
from r1mega.train.schedule import batch_size, learning_rate
from r1mega.train.trainee import LossSum, StepResult, Trainee


@dataclass
class Source:
    """What a run starts from: the loader, a checkpoint for the weights or None, the tokenizer to keep with the checkpoints."""

    loader: PretrainLoader | DocumentLoader | SftLoader
    init: Path | None
    tokenizer: str | None


def masked_sum(losses_BS: torch.Tensor, batch: TokenTensors) -> LossSum:
    """Sum of the learnt tokens' losses and their number."""
    total = (losses_BS.float() * batch.loss_mask_BS).sum()
    return total, batch.loss_mask_BS.sum(), {"lm": total.detach()}


def tensors(batch: TokenBatch, size: int, mesh: Mesh, *, segments: bool) -> list[TokenTensors]:
    """A data rank's rows as microbatches of ``size`` rows on the device, cut to this context rank's part of each sequence."""
    rows, device, own = len(batch.tokens_BS), mesh.device.torch_device, ContextPart.of(mesh.axes["context"])

    def part(array, start: int) -> torch.Tensor:
        return torch.from_numpy(array[start : start + size]).to(device)

    return [
        TokenTensors(
            part(batch.tokens_BS, start),
            part(batch.labels_BS, start),
            part(batch.loss_mask_BS, start),
            part(batch.segment_ids_BS, start) if segments else None,
        ).cut(own)
        for start in range(0, rows, size)
    ]


def fit(config: PretrainConfig | SftConfig, model: ModelConfig, open_source: Callable[[Mesh], Source]) -> dict[str, Any]:
    """Train to ``trainer.steps``; the same call goes on from the last checkpoint. Returns the result that a recipe keeps.

    Raises UserError, on all ranks, for token files of another tokenizer, a checkpoint of another model, and more spikes than
    ``trainer.spike_limit``; Stopped after a SIGTERM, when a checkpoint is written.
    """
    check_cut(config, model)
    mesh = open_mesh(open_device(config.device), config.parallel, config.launch, config.seed, stages_per_rank(config))
    source = open_source(mesh)
    expected = tokenizer_hash(source.tokenizer) if source.tokenizer else None
    metas = source.loader.metas + ([TokenFile(config.data.valid).meta] if config.data.valid else [])
    for meta in metas:
        check_tokenizer(meta, tokenizer_hash=expected, vocab_size=model.vocab_size)
    with stop.heeding(), watched(mesh, Path(config.out), "trainer.micro_batch_size or data.sequence_length") as watch:
        pipeline = config.pipeline.build(config.parallel.pipeline)
        watch.trainee = trainee = Trainee(model, config.optim, mesh, config.precision, pipeline, config.dispatcher)
        run = _Run(config, model, mesh, source, trainee)
        with named_layers(trainee, config.nvtx), run.saver:
            run.start()
            run.loop()
            return run.finish()


class _Run:
    """One process's part of a run; its methods are the loop's paragraphs."""

    def __init__(self, config, model: ModelConfig, mesh: Mesh, source: Source, trainee: Trainee):
        self.config, self.model, self.mesh, self.source, self.trainee = config, model, mesh, source, trainee
        self.trainer = config.trainer
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.command = "sft" if isinstance(config, SftConfig) else "pretrain"
        self.segments = source.loader.packing == "isolated"
        self.valid = self._validation() if config.data.valid else []  # opened now: a bad file must not end a run at its end
        self.state = TrainState()
        self.placements = Placements(config, trainee)
        self.health = Health(self.trainer.spike_sigma, self.trainer.spike_window, self.trainer.spike_limit)
        self.profile = Profile(self.folder, mesh, active=config.profile, skip=min(2, self.trainer.steps - 1), count=3)
        self.saver = run_saver(
            config, self.trainer, mesh, Lineage.begin(self.command, config.name, source.init), source.tokenizer, self._tell
        )
        self.valid_loss: float | None = None
        self.seconds = 0.0

    def start(self) -> None:
        """Load what the run goes on from, and open the metrics."""
        if self.mesh.is_first:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.clear(self.checkpoints)
        self.mesh.barrier()
        held = checkpoint.newest_whole(self.mesh, self.checkpoints)
        if held is not None:
            check_same_command(self.command, held)
            self._take(held)
            self.saver.go_on(held)
            self.source.loader.load_state_dict(self.state.cursor)
            self.health.load_state_dict(self.state.extra.get("health", {}))
        elif self.source.init is not None:
            checkpoint.load(self.trainee, self.source.init, weights_only=True)
        self.metrics = Metrics(
            self.folder, "step", self.trainer.steps, self.state.step, active=self.mesh.is_first, config=self.config
        )
        self.peak = self.trainer.peak_tflops or peak_tflops(self.mesh.device, self.trainee.dtype)

    def _take(self, held: Path) -> None:
        """Load a checkpoint of this run, each expert to where the run had it."""
        self.placements.load_state_dict(checkpoint.read_state(held)["extra"].get("placements", {}))
        self.state = checkpoint.load(self.trainee, held, verified=True)
        self.valid_loss, self.seconds = self.state.extra["valid_loss"], self.state.extra["seconds"]

    def _tell(self, kind: str, step: int, reason: str) -> None:
        self.metrics.event(kind, step, reason)

    def loop(self) -> None:
        """Steps up to ``trainer.steps``."""
        trainer, optim = self.trainer, self.config.optim
        multiple = trainer.micro_batch_size * self.mesh.data_size * microbatch_step(self.config)
        while self.state.step < trainer.steps:
            began = time.perf_counter()
            size = batch_size(optim, self.state.step, trainer.global_batch_size, multiple)
            batch = self.source.loader.next(size)
            parts = tensors(batch, trainer.micro_batch_size, self.mesh, segments=self.segments)
            rate = learning_rate(optim, self.state.step, trainer.steps)
            with self._recorded():
                result = self.trainee.step(parts, token_losses, masked_sum, rate, self.health.judge)
            self.mesh.device.synchronize()
            self.saver.poll()
            self.state.step += 1
            self.state.tokens += size * self.config.data.sequence_length
            if result.trouble and self._rolled_back(result.trouble):
                continue
            if not result.trouble:
                self.health.sound(result.loss)
                self.placements.measure(result.expert_load)
            self._after_step(result, rate, size, time.perf_counter() - began)

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """While a trace runs, note what the pipeline does when, for ``r1mega timeline``."""
        executor, axes = self.trainee.executor, self.mesh.axes
        executor.events = [] if self.profile.running else None
        try:
            yield
        except BaseException:
            executor.events = None
            raise
        if executor.events and not any(axes[axis].rank for axis in ("data", "tensor", "context")):
            write_events(self.folder, axes["pipeline"].rank, self.state.step + 1, executor.events)
        executor.events = None

    def _rolled_back(self, trouble: str) -> bool:
        """Log a step that was not applied and, where the run shall and can, go back to a checkpoint; the data stays moved on."""
        step, wanted = self.state.step, self.trainer.on_spike
        self.saver.wait()  # the run ends or goes back now, perhaps to what is being saved
        if wanted == "stop":
            raise UserError(
                f"training: sound losses with trainer.on_spike=stop; got {trouble} at step {step}; lower optim.lr, or use "
                "trainer.on_spike=skip or rollback; the same command goes on from the last checkpoint"
            )
        self.health.trouble(trouble)
        held = checkpoint.newest_whole(self.mesh, self.checkpoints) if wanted == "rollback" else None
        self.metrics.event(f"rolled back to step {_step_of(held)}" if held else "step skipped", step, trouble)
        if held is None:
            return False
        self._take(held)
        self.saver.go_on(held)
        self.health.load_state_dict(self.state.extra["health"], keep_troubles=True)
        self.metrics.rewind(self.state.step)
        return True

    def _after_step(self, result: StepResult, rate: float, size: int, seconds: float) -> None:
        step, trainer = self.state.step, self.trainer
        self.seconds += seconds
        self.metrics.advance()
        last = step == trainer.steps
        validate = self.config.data.valid is not None and (last or (trainer.valid_every and step % trainer.valid_every == 0))
        if validate:
            self.valid_loss = self._validate()
        saves = trainer.save_every and step % trainer.save_every == 0
        considered = self.placements.consider(step // trainer.save_every) if saves and not last else None
        asked = stop.asked(self.mesh)
        path = self._save() if last or saves or asked else None
        if last or validate or considered or step % trainer.log_every == 0 or step == 1:
            line = self._line(result, rate, size, seconds, validate)
            self.metrics.log(line | (considered.metrics() if considered else {}) | self.saver.metrics())
        # a checkpoint stands no earlier than the lines up to its step, which a run that goes on from it keeps
        self.saver.settle()
        if considered and considered.moves and not asked:
            self.saver.wait()
            self.placements.put()
            checkpoint.load(self.trainee, path, verified=True)
        self.profile.step()
        if asked:
            self.finish()
            raise Stopped(f"stopped: SIGTERM came, step {step} of {trainer.steps} is saved; the same command goes on from there")

    def _line(self, result: StepResult, rate: float, size: int, seconds: float, validated: bool) -> dict[str, Any]:
        tokens = size * self.config.data.sequence_length
        speed = tokens / seconds
        flops = train_flops_per_token(self.model, self.config.data.sequence_length) * speed
        line = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": result.loss + self.model.mtp_loss_coef * result.mtp_loss + self.model.seq_aux_loss_coef * result.aux_loss,
            "lm_loss": result.loss,
            "mtp_loss": result.mtp_loss,
            "aux_loss": result.aux_loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "batch": size,
            "tokens_per_second": speed,
            "mfu": flops / (self.peak * 1e12 * self.mesh.world_size),
            "step_seconds": seconds,
            **self.trainee.peaks.gib(),
            "expert_load": result.expert_load,
        }
        if validated:
            line["valid_loss"] = self.valid_loss
        sound = {name: value for name, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
        return sound if result.trouble else line

    def _validation(self) -> list[TokenTensors]:
        data, trainer, mesh = self.config.data, self.trainer, self.mesh
        batches = validation_batches(
            data.valid,
            data.sequence_length,
            trainer.global_batch_size,
            trainer.valid_batches,
            rank=mesh.data_rank,
            world=mesh.data_size,
            windows=self.source.loader.packing == "windows",
        )
        return [part for batch in batches for part in tensors(batch, trainer.micro_batch_size, mesh, segments=self.segments)]

    def _validate(self) -> float:
        return self.trainee.evaluate(self.valid, token_losses, masked_sum)[0]

    def _save(self) -> Path:
        self.state.cursor = self.source.loader.state_dict()
        self.state.extra = {
            "valid_loss": self.valid_loss,
            "seconds": self.seconds,
            "health": self.health.state_dict(),
            "placements": self.placements.state_dict(),
            "save_stall_seconds": self.saver.stall_seconds,
        }
        return self.saver.begin(self.trainee, self.state)

    def finish(self) -> dict[str, Any]:
        """Close trace and metrics and say where the result lies; what is under way is waited for."""
        self.saver.wait(exports=self.state.step == self.trainer.steps)
        self.profile.close()
        self.metrics.close()
        final = checkpoint.latest(self.checkpoints)
        if final is None:
            raise UserError(f"trainer: a finished run has a checkpoint; got none in {self.checkpoints}; was it removed meanwhile?")
        return {
            "checkpoint": str(final),
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "seconds": self.seconds,
            "valid_loss": self.valid_loss,
            "save_stall_seconds": self.saver.stall_seconds,
        }


def _step_of(held: Path) -> int:
    return int(held.name.rpartition("-")[2])
