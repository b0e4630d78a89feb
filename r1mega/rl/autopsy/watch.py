"""The look at every rollout: is the engine's log-probability of what it drew the trainer's? Over all data ranks, after scoring.

In: rows that the trainer has scored. Out: go on, do not train on it, or a UserError that names the next command. Outside the budget
evidence is written, for which all ranks gather the weights once as for a push.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.config.rl import DiffBudgetConfig, RlConfig
from r1mega.data.tokenizer import Tokenizer
from r1mega.device import DTYPES
from r1mega.model.names import native_shapes
from r1mega.rl.autopsy.evidence import FORMAT, WEIGHTS, Held, Row, folder_of, kept, write
from r1mega.rl.batch import RolloutRow
from r1mega.rl.engine.weights import destinations
from r1mega.rl.learner import Learner
from r1mega.rl.push.hashing import content_hash


@dataclass(frozen=True)
class Gap:
    """Of one rollout, over all ranks: ``mean`` and ``max`` |trainer - engine| in nats and ``kl`` (k3) over ``tokens`` of the
    present weights; ``stale_mean`` over ``stale_tokens`` of older ones."""

    mean: float
    max: float
    kl: float
    tokens: int
    stale_mean: float
    stale_tokens: int

    def line(self) -> dict[str, float]:
        """For the metric line, which has mean and maximum over all tokens already."""
        return {"rollout_kl": self.kl, "stale_diff_mean": self.stale_mean}


@dataclass(frozen=True)
class Budget:
    """Limits in nats."""

    mean: float
    max: float
    kl: float

    def faults(self, gap: Gap, stale_mean: float | None) -> list[str]:
        """What is outside, in words. A number that is none is outside."""
        pairs = [("mean", gap.mean, self.mean), ("max", gap.max, self.max), ("kl", gap.kl, self.kl)]
        if stale_mean is not None:
            pairs.append(("stale_mean", gap.stale_mean, stale_mean))
        return [f"{name} {value:.3g} above {limit:g}" for name, value, limit in pairs if not value <= limit]


USUAL = {
    "fp32": Budget(mean=1e-3, max=0.2, kl=1e-3),
    "bf16": Budget(mean=0.1, max=5.0, kl=0.05),
    "fp8": Budget(mean=0.25, max=10.0, kl=0.2),
}
"""Number format to limits that a sound pair of engine and trainer keeps.

fp32: means of this project's runs are 1e-6 to 4e-6; single tokens reach 8e-3 where two experts tie in the last bits (docs/LOG.md),
and a mean of 1e-3 is hundreds of times more than rounding gives. bf16: this project's means are below 0.05, single tokens reach
0.6; other systems report means of 0.01 to 0.04 with MoE models that run well, and several nats for single tokens whose experts
flip. fp8, of either side: twice bf16's, for the rounding of weights and activations to 3 bits of mantissa.
"""


def gap_of(mesh, rows: Sequence[Row], version: int) -> Gap:
    """Over the data ranks of ``mesh``; ``version``: of the trainer's weights."""
    parts: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for row in rows:
        difference, fresh = row.trainer.double() - row.engine.double(), row.fresh_T(version)
        parts[True].append(difference[fresh])
        parts[False].append(difference[row.own_T & ~fresh])
    fresh, stale = (torch.cat(parts[kind] or [torch.zeros(0, dtype=torch.float64)]) for kind in (True, False))
    k3 = torch.expm1(fresh) - fresh
    sums = [fresh.abs().sum(), k3.sum(), stale.abs().sum(), torch.tensor(float(len(fresh))), torch.tensor(float(len(stale)))]
    device = mesh.device.torch_device
    total, kl, old, count, old_count = mesh.sum(torch.stack([value.double() for value in sums]).to(device)).tolist()
    largest = fresh.abs().max().item() if len(fresh) else 0.0
    largest = float("inf") if largest != largest else largest  # a maximum over ranks may lose a NaN
    (largest,) = mesh.max(torch.tensor([largest], dtype=torch.float64, device=device)).tolist()
    return Gap(total / max(count, 1), largest, kl / max(count, 1), int(count), old / max(old_count, 1), int(old_count))


def format_of(precision: Any, engine: Any) -> str:
    """The coarser number format of trainer and engine: fp32, bf16 or fp8."""
    found = {"fp8" if precision.products != "plain" else precision.dtype}
    for server in getattr(engine, "servers", ()):
        info = getattr(server, "info", None) or {}
        quantised = str(info.get("quantization") or "")
        dtype = str(info.get("dtype") or "auto").removeprefix("torch.")
        found.add("fp8" if "fp8" in quantised else "fp32" if dtype in ("float32", "float") else "bf16")
    if isinstance(dtype := getattr(engine, "dtype", None), torch.dtype):
        found.add("fp32" if dtype == torch.float32 else "bf16")
    return next(name for name in ("fp8", "bf16", "fp32") if name in found)


def budget_of(config: DiffBudgetConfig, number_format: str) -> Budget:
    """The limits of ``config``, the format's where it gives none."""
    usual = USUAL[number_format]
    given = {name: getattr(config, name) for name in ("mean", "max", "kl")}
    return Budget(**{name: getattr(usual, name) if value is None else value for name, value in given.items()})


class Watch:
    """One run's. ``writes``: this rank writes its data rank's evidence. ``gap``: of the last rollout; ``skipped``: rollouts that
    were not trained on, since this start."""

    def __init__(self, config: RlConfig, learner: Learner, tokenizer: Tokenizer, writes: bool):
        self.config, self.sizes, self.learner, self.policy = config, config.rl.diff_budget, learner, learner.policy
        self.mesh, self.tokenizer, self.writes, self.folder = learner.mesh, tokenizer, writes, Path(config.out)
        self.gap: Gap | None = None
        self.skipped = 0

    def look(self, rows: Sequence[RolloutRow], rollout: int, engine: Any, pusher: Any, tell) -> bool:
        """Whether to train on the rollout of number ``rollout``. Called by all ranks.

        ``engine``, ``pusher``: this rank's, None where it has none; ``tell(kind, step, reason)``: writes an event. Raises UserError
        with ``action=stop``.
        """
        if self.sizes.action == "off":
            return True
        version = self.learner.update_count
        made = [Row.of(place, row) for place, row in enumerate(rows)]
        self.gap = gap_of(self.mesh, made, version)
        number_format = self.mesh.broadcast_object(format_of(self.config.precision, engine))
        budget = budget_of(self.sizes, number_format)
        # one rank decides: sums over other lines of ranks may differ in their last bit
        faults = self.mesh.broadcast_object(budget.faults(self.gap, self.sizes.stale_mean))
        if not faults:
            return True
        numbers = kept(self.folder) if self.mesh.is_first else []
        is_kept = self.mesh.broadcast_object(rollout in numbers or len(numbers) < self.sizes.keep)
        if is_kept:
            self._keep(made, rollout, version, budget, number_format, engine, pusher)
        told = f"engine and trainer differ in {self.gap.tokens + self.gap.stale_tokens} tokens by {', '.join(faults)} nats"
        way = f"r1mega autopsy run={self.folder} step={rollout}"
        if self.sizes.action == "stop":
            raise UserError(f"rl.diff_budget: {self._rule(budget)}; got rollout {rollout}: {told}; see why with {way}")
        is_skipped = self.sizes.action == "skip"
        self.skipped += is_skipped
        tell(
            "not trained on" if is_skipped else "trained on all the same",
            rollout,
            f"{told}; {way if is_kept else 'no evidence kept'}",
        )
        return not is_skipped

    def line(self) -> dict[str, float]:
        """For the metric line."""
        return {} if self.gap is None else {**self.gap.line(), "diff_skipped": self.skipped}

    def _rule(self, budget: Budget) -> str:
        return f"at most mean {budget.mean:g}, max {budget.max:g}, kl {budget.kl:g}"

    def _keep(
        self, rows: list[Row], rollout: int, version: int, budget: Budget, number_format: str, engine: Any, pusher: Any
    ) -> None:
        """Write the evidence; a disk that is full is told like any other failure."""
        ids = self.tokenizer
        sums, held, weights = self._weights(engine, pusher)
        means = [_mean(row, version) for row in rows]
        worst = sorted(range(len(rows)), key=lambda place: -means[place])[: self.sizes.rows]
        facts = {
            "gap": asdict(self.gap),
            "budget": asdict(budget),
            "stale_mean": self.sizes.stale_mean,
            "row_means": means,
            "format": number_format,
            "temperature": self.learner.temperature,
            "model": asdict(self.policy.model_config),
            "hf_config": self.policy.published_config(bos_id=ids.bos_id, eos_id=ids.eos_id, pad_id=ids.pad_id),
            "precision": asdict(self.config.precision),
            "sampling": asdict(self.config.rl.sampling),
            "engine": type(self.config.engine).__name__,
            "init": str(Path(self.config.init).resolve()),
            "config_sha256": hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True, default=str).encode()).hexdigest(),
        }
        folder, rank, failure = folder_of(self.folder, rollout), self.mesh.data_rank, ""
        values = {"format": FORMAT, "rollout": rollout, "version": version, "rank": rank, "facts": facts}
        values["rows"] = [{name: value for name, value in vars(rows[place]).items() if name != "rank"} for place in worst]
        if self.mesh.is_first:
            values |= {"sums": sums, "held": held and asdict(held)}
        try:
            if self.writes:
                write(folder / f"rank-{rank:05d}.pt", values)
            if weights:
                write(folder / WEIGHTS, {"format": FORMAT, "version": version, "tensors": weights})
        except OSError as error:
            failure = f"{error.filename or folder}: evidence can be written; got {error.strerror or error}; make room there"
        self.mesh.agree(failure)

    def _weights(self, engine: Any, pusher: Any) -> tuple[dict[str, str], Held | None, dict[str, torch.Tensor]]:
        """On the first rank: hashes of the published tensors, what the engine held instead, and the tensors where they are small.
        All ranks gather."""
        model, limit = self.policy.model_config, self.sizes.weights_bytes
        size = sum(torch.Size(shape).numel() for shape in native_shapes(model).values())
        is_small = size * DTYPES[self.config.precision.dtype].itemsize <= limit
        places = destinations(engine.model) if hasattr(engine, "load_weights") and self.mesh.is_first else {}
        held = Held() if places else None
        sums, weights, kept_bytes = {}, {}, 0
        for name, tensor in self.policy.published_tensors(everywhere=False):
            tensor = tensor.detach()
            sums[name] = content_hash(tensor)
            if is_small:
                weights[name] = tensor.cpu().clone()
            if (place := places.get(name)) is None:
                continue
            held.asked += 1
            if not torch.equal(tensor.to(place.device, place.dtype), place):
                held.wrong.append(name)
                if (kept_bytes := kept_bytes + place.numel() * place.element_size()) <= limit:
                    held.tensors[name] = place.detach().cpu().clone()
        if self.mesh.is_first and held is None and self._is_idle(engine) and hasattr(pusher, "wrong_now"):
            found = pusher.wrong_now()
            held = None if found is None else Held(*found)
        return sums, held, weights

    def _is_idle(self, engine: Any) -> bool:
        """Nothing is sampled while the trainer works, and the engine has its weights in memory."""
        return self.config.rl.lag == 0 and self.config.rl.oversample == 1.0 and not getattr(engine, "sleeps", True)


def _mean(row: Row, version: int) -> float:
    """Mean difference of a row's own tokens of the present weights, of all its own ones where there are none."""
    fresh = row.fresh_T(version)
    chosen = fresh if bool(fresh.any()) else row.own_T
    found = (row.trainer - row.engine)[chosen].abs()
    return float(found.mean()) if len(found) else 0.0
