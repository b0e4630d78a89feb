"""Saving beside the training: what the training thread gives is a moment's copy; writing, hashing and publishing go on behind it.

A save has three parts. The training threads of all ranks copy this rank's shards to host memory and plan (:meth:`Saver.begin`). A
thread of each rank writes its file, flushes it and takes its hash. When all ranks have, which they agree on between two steps
(:meth:`Saver.poll`), a thread of rank 0 writes index and manifest, renames the folder, removes older checkpoints and sends the new
one to the run's URL. No thread but the training's enters a collective; what ranks tell each other lies in the unfinished folder.

One save is under way at a time. :meth:`Saver.wait` ends it before anything that reads the checkpoint. Where the disk or a
rank's host memory is full, all ranks raise the same UserError at the next of these calls and the last checkpoint stays whole.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1mega.compat import megatron_writer
from r1mega.config.errors import UserError
from r1mega.config.rl import RlConfig, RolloutConfig
from r1mega.config.train import PretrainConfig, SftConfig, TrainerConfig
from r1mega.files import published
from r1mega.mesh import Mesh
from r1mega.train import hostmemory, manifest
from r1mega.train.convert.disk import sync
from r1mega.train.convert.native import CONTENT
from r1mega.train.exporting import Exporter
from r1mega.train.hostmemory import HostMemory
from r1mega.train.lineage import Lineage
from r1mega.train.trainee import Trainee

LONGEST_PAUSE = 0.05
"""Seconds between two looks at a save that is waited for."""
CLOSING_SECONDS = 60.0
"""Longest wait for a thread of a run that ends with an error."""


@dataclass
class TrainState:
    """Where a run stands. ``cursor``: the loader's state; ``extra``: what a command adds (RL: rollouts done)."""

    step: int = 0
    tokens: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class _Abandoned(Exception):
    """The run has ended with an error: the thread that writes may stop."""


@dataclass
class _Job:
    """One save under way. ``plans``: this rank's part of each folder of tensors, by its name; ``files``: name to content of what
    rank 0 writes beside them; ``error``: what a thread met."""

    step: int
    aside: Path
    final: Path
    plans: dict[str, megatron_writer.Plan] = field(default_factory=dict)
    files: dict[str, bytes | list[Any]] = field(default_factory=dict)
    thread: threading.Thread | None = None
    error: BaseException | None = None
    is_written: bool = False

    def run(self, part: Callable[[_Job], None]) -> None:
        """Start ``part(self)`` in a thread; what it raises is kept."""

        def guarded() -> None:
            try:
                part(self)
            except BaseException as error:  # noqa: BLE001 - raised again in the training thread
                self.error = error

        self.thread = threading.Thread(target=guarded, daemon=True, name=f"save-{self.step}")
        self.thread.start()

    @property
    def is_busy(self) -> bool:
        """True while this rank's thread is at work."""
        return self.thread is not None and self.thread.is_alive()


class Saver:
    """A run's checkpoints on the way to its folder. As a context it ends with :meth:`close`, whatever ends the run.

    ``background`` False: :meth:`begin` returns when all is written; :meth:`settle` then publishes. ``switch``: that knob's key.
    ``tell(kind, step, reason)``: called on rank 0 for what is worth a line. ``stall_seconds``: what the training thread has lost.
    """

    def __init__(
        self,
        mesh: Mesh,
        folder: Path,
        lineage: Lineage,
        *,
        background: bool,
        switch: str = "trainer.async_save",
        keep_last: int,
        keep_every: int = 0,
        tokenizer: str | None = None,
        exporter: Exporter | None = None,
        tell: Callable[[str, int, str], None] = lambda kind, step, reason: None,
    ):
        self.mesh, self.folder, self.lineage, self.background, self.switch = mesh, folder, lineage, background, switch
        self.keep_last, self.keep_every, self.tokenizer, self.tell = keep_last, keep_every, tokenizer, tell
        self.exporter = exporter if mesh.is_first else None
        self.stall_seconds = self._told_seconds = 0.0
        self._job: _Job | None = None
        self._host = HostMemory(pinned=not mesh.device.is_cpu)
        self._is_checked = False
        self._abandoned = threading.Event()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()

    # Called by all ranks at the same places.

    def begin(
        self, trainee: Trainee, state: TrainState, reference: Callable[[], contextlib.AbstractContextManager[None]] | None = None
    ) -> Path:
        """Take a copy of the run as it is and save that; returns the folder that the checkpoint will have.

        Waits for the save before this one. ``reference``: inside it, the trainee's weights are those of RL's reference, which each
        rank saves its shards of too; they are copied to host memory in any case. Raises UserError, on all ranks, where the disk
        refuses or a rank's host memory does not hold the copy.
        """
        with self._losing_time():
            self._finish()
            mesh = self.mesh
            final = self.folder / f"step-{state.step:08d}"
            aside = self.folder / f".{final.name}.tmp"
            rng = mesh.gather_everywhere(mesh.device.rng_state())
            folders = ("weights", "reference") if reference else ("weights",)
            self._on_first(lambda: self._make(aside, folders))
            sharded_state = sharded(trainee, loading=False) | {"content_metadata": dict(CONTENT)}
            sharded_reference = sharded(trainee, loading=False, with_optimizer=False) if reference else {}
            job = _Job(state.step, aside, final)

            def take() -> None:
                self._host.reset()
                job.plans["weights"] = megatron_writer.plan(sharded_state, str(aside / "weights"), mesh.rank)
                if self.background:
                    self._copy(job.plans["weights"])
                if reference:
                    with reference():
                        job.plans["reference"] = megatron_writer.plan(sharded_reference, str(aside / "reference"), mesh.rank)
                        self._copy(job.plans["reference"])
                if mesh.is_first:
                    record = {**asdict(state), "model": asdict(trainee.model_config), "degrees": mesh.degrees}
                    record |= {"dtype": str(trainee.dtype).removeprefix("torch."), **self.lineage.record(final)}
                    job.files = {f"{name}/common.pt": plan.common for name, plan in job.plans.items()}
                    job.files |= {"rng.pt": rng, "state.json": json.dumps(record, indent=1).encode()}

            self._together(job, take)
            if not self._is_checked:
                owned = mesh.gather_everywhere([plan.owned for plan in job.plans.values()])
                self._together(job, lambda: [megatron_writer.check(one) for one in zip(*owned, strict=True)])
                self._is_checked = True
            self._job = job
            job.run(self._write)
            while not self.background and mesh.any(job.is_busy):
                self._pause()
            return final

    def poll(self) -> None:
        """Take the save under way a part further where all ranks have done theirs. Between two steps; free without a save."""
        if self._job is not None:
            with self._losing_time():
                self._advance()
        self._tell_exports()

    def go_on(self, held: Path) -> None:
        """The run goes on from ``held``: the next checkpoint names it, and an export of it that is missing is made."""
        self.lineage.go_on(held)
        state = manifest.read_state(held)
        self.stall_seconds = self._told_seconds = max(self.stall_seconds, state["extra"].get("save_stall_seconds", 0.0))
        if self.exporter is not None:
            self.exporter.consider(held, state["step"])
            self.exporter.clear()

    def settle(self) -> None:
        """Where saves are not in the background, publish the one that :meth:`begin` has written."""
        if not self.background:
            self.wait()

    def wait(self, *, exports: bool = False) -> None:
        """Until the save under way is published, and with ``exports`` until no export is under way either."""
        with self._losing_time():
            self._finish()
            while exports and self.mesh.any(self.exporter is not None and self.exporter.is_busy):
                time.sleep(LONGEST_PAUSE)
            if exports:
                self._on_first(self.retire)  # what the export held
        self._tell_exports()

    def metrics(self) -> dict[str, float]:
        """For a metric line: the seconds that the training thread has lost since the last one, where it has lost any."""
        lost, self._told_seconds = self.stall_seconds - self._told_seconds, self.stall_seconds
        return {"save_stall_seconds": lost} if lost else {}

    def close(self) -> None:
        """Stop saving. This rank's alone: what is not published by now never will be.

        The thread that writes is waited for, up to a minute. One that the disk holds up longer, and an export under way, ends with
        the process; what they leave is removed when the run goes on.
        """
        self._abandoned.set()
        job, self._job = self._job, None
        if job is not None and job.thread is not None:
            job.thread.join(CLOSING_SECONDS)
            if self.mesh.is_first and not job.is_busy:
                shutil.rmtree(job.aside, ignore_errors=True)

    # The training thread's part.

    @contextlib.contextmanager
    def _losing_time(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - began

    def _on_first(self, part: Callable[[], None]) -> None:
        """``part()`` on rank 0; all ranks return when it is done, or raise where the disk refuses."""
        failure = ""
        try:
            if self.mesh.is_first:
                part()
        except OSError as error:
            failure = unwritten(self.folder, error)
        self.mesh.agree(failure)

    def _together(self, job: _Job, part: Callable[[], None]) -> None:
        """``part()``, in which ranks do not meet, on all ranks; where it fails on one, all raise."""
        try:
            part()
        except Exception as error:  # noqa: BLE001 - raised again when all ranks know
            job.error = error
        self._agree(job)

    def _make(self, aside: Path, folders: Sequence[str]) -> None:
        """The unfinished folder, with empty ones in it."""
        shutil.rmtree(aside, ignore_errors=True)
        for name in folders:
            (aside / name).mkdir(parents=True)

    def _copy(self, plan: megatron_writer.Plan) -> None:
        """Put host copies in the place of everything that changes. Without ``background`` of memory that is not kept."""
        copy = self._host.copy if self.background else lambda value: value.detach().to("cpu", copy=True)
        plan.values = [value if isinstance(value, io.BytesIO) else copy(value) for value in plan.values]
        self.mesh.device.synchronize()

    def _finish(self) -> None:
        while self._job is not None:
            self._pause()
            self._advance()

    def _pause(self) -> None:
        """Until this rank's thread is done, or for a moment: ranks meet again and again, so that nobody seems to be stuck."""
        if self._job.is_busy:
            self._job.thread.join(LONGEST_PAUSE)
        elif self._job.is_written and not self.mesh.is_first:
            time.sleep(LONGEST_PAUSE / 10)

    def _advance(self) -> None:
        """If all ranks' threads are done: agree on what they met, and publish what is written or forget what is published."""
        job = self._job
        if self.mesh.any(job.is_busy):
            return
        self._agree(job)
        if job.is_written:
            self._job = None
        else:
            job.is_written = True
            if self.mesh.is_first:
                job.run(self._publish)

    def _agree(self, job: _Job) -> None:
        """Where a rank's part of the save has met an error, end the save and raise on all ranks."""
        error, defect, failure = job.error, None, ""
        if isinstance(error, UserError):
            failure = str(error)
        elif hostmemory.is_exhausted(error, self.mesh.device):
            values = [value for plan in job.plans.values() for value in plan.values]
            told = hostmemory.without_room(error, values, self.switch if self.background else "")
            failure = f"checkpoint {job.final}: {told} and run the same command, {goes_on(self.folder)}"
        elif isinstance(error, OSError | RuntimeError if job.thread else OSError) and not self.mesh.device.is_out_of_memory(error):
            failure = unwritten(self.folder, error)
        elif error is not None:  # ours, or the device's memory that ran out: this rank's own error says more
            failure, defect = f"checkpoint {job.final}: it is written; got {type(error).__name__} {error}; see that rank", error
        try:
            self.mesh.agree(failure)
        except UserError as agreed:
            self._job = None
            if self.mesh.is_first:
                shutil.rmtree(job.aside, ignore_errors=True)  # gives a full disk its room back
            raise (defect or agreed) from (None if defect else error)

    def _tell_exports(self) -> None:
        for step, reason in self.exporter.take_failures() if self.exporter is not None else ():
            self.tell("export failed", step, reason)

    # The threads'.

    def _write(self, job: _Job) -> None:
        """This rank's file and its hash; on rank 0 also what is no shard."""
        made, entries = {}, {}
        for folder, plan in job.plans.items():
            results = plan.write(self._check_abandoned)
            plan.values = []
            made[folder] = (plan.plan, results)
            names = sorted({f"{folder}/{one.storage_data.relative_path}" for one in results})
            entries |= {name: manifest.entry(job.aside / name) for name in names}
        (job.aside / f".part-{self.mesh.rank}").write_bytes(pickle.dumps((made, entries)))
        if not self.mesh.is_first:
            return
        for name, content in job.files.items():
            if isinstance(content, bytes):
                (job.aside / name).write_bytes(content)
            else:
                torch.save(content, job.aside / name)
        job.files = {}
        if self.tokenizer:
            shutil.copytree(self.tokenizer, job.aside / "tokenizer")

    def _publish(self, job: _Job) -> None:
        """Rank 0's: index, manifest, rename, and away with older ones, which go only when the new one stands.

        A run never writes the same step twice; one who does has, between two renames, neither of them under its name.
        """
        aside, final, folder = job.aside, job.final, self.folder
        parts = []
        for rank in range(self.mesh.world_size):
            path = aside / f".part-{rank}"
            parts.append(pickle.loads(path.read_bytes()))  # ours, written a moment ago
            path.unlink()
        for name, plan in job.plans.items():
            plans, results = zip(*(made[name] for made, _ in parts), strict=True)
            megatron_writer.finish(plan.writer, plans, results, str(aside / name))
        entries = {name: entry for _, own in parts for name, entry in own.items()}
        manifest.write(aside, entries | manifest.hashes(aside, known=entries))
        self._check_abandoned()
        if final.exists():
            final.rename(folder / f".{final.name}.old")
        aside.rename(final)
        sync(folder)
        self.lineage.advance(final, job.step)
        self.retire()
        failure = published(final)
        if failure:
            raise UserError(failure)
        if self.exporter is not None:
            self.exporter.consider(final, job.step)

    def retire(self) -> None:
        """Remove checkpoints that are no longer to be kept. Rank 0 only."""
        held = self.exporter.holding if self.exporter is not None else set()
        for old in manifest.surplus(self.folder, self.keep_last, self.keep_every):
            if old not in held:
                old.rename(self.folder / f".{old.name}.old")  # at once gone for readers, whenever this process is killed
        clear(self.folder)

    def _check_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise _Abandoned


def run_saver(
    config: PretrainConfig | SftConfig | RlConfig,
    section: TrainerConfig | RolloutConfig,
    mesh: Mesh,
    lineage: Lineage,
    tokenizer: str | None,
    tell: Callable[[str, int, str], None],
) -> Saver:
    """The saver of a command's run. ``section``: where its knobs are; rl counts in rollouts, checkpoints in updates."""
    out, updates = Path(config.out), getattr(section, "updates_per_rollout", 1)
    return Saver(
        mesh,
        out / "checkpoints",
        lineage,
        background=section.async_save,
        switch=f"{'rl' if isinstance(config, RlConfig) else 'trainer'}.async_save",
        keep_last=section.keep_last,
        keep_every=section.keep_every * updates,
        tokenizer=tokenizer,
        exporter=Exporter(out / "exports", section.export_every * updates, section.export_dtype),
        tell=tell,
    )


def sharded(trainee: Trainee, *, loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    """Megatron's sharded state of model and optimizer, of live tensors."""
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    megatron_writer.apply()
    metadata = ensure_metadata_has_dp_cp_group(None)
    model = trainee.held.sharded_state_dict(metadata=metadata)
    state: dict[str, Any] = {"model": model}
    if with_optimizer and trainee.optimizer is not None:
        if loading:
            trainee.allocate_moments()
        state["optimizer"] = trainee.optimizer.sharded_state_dict(
            trainee.held.sharded_state_dict(metadata=metadata), is_loading=loading, metadata=CONTENT
        )
    return state


def unwritten(folder: Path, error: BaseException) -> str:
    """What to tell of a save into ``folder`` that the disk failed."""
    told = error.strerror if isinstance(error, OSError) else None
    if not told:
        told = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        if "inline_container" in told and shutil.disk_usage(folder).free < 1 << 20:  # torch.save does not say why it could not
            told = os.strerror(errno.ENOSPC)
    free = shutil.disk_usage(folder).free / 2**30
    return (
        f"checkpoint {folder}: the disk takes what is saved; got {told} with {free:.1f} GiB free; make "
        f"room and run the same command, {goes_on(folder)}"
    )


def goes_on(folder: Path) -> str:
    """What is there for a run whose save has failed."""
    last = manifest.latest(folder)
    return f"{last.name} is whole and it goes on from there" if last else "there is no earlier one"


def clear(folder: Path) -> None:
    """Remove what killed processes left half written or half removed."""
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest, ignore_errors=True)
