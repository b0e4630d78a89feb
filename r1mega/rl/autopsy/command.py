"""``r1mega autopsy``: a rollout's evidence, its weights and the judge become findings, the most likely cause first.

In: a run's folder and a rollout's number. Out: sentences or JSON, and the exit status. Changes nothing in the run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from r1mega.compat import megatron_jit
from r1mega.config.compose import load_config, model_from_dict
from r1mega.config.errors import Failed, UserError
from r1mega.config.run import LaunchConfig, ParallelConfig, PrecisionConfig
from r1mega.config.tools import AutopsyConfig
from r1mega.data.tokenizer import load_tokenizer
from r1mega.device import open_device
from r1mega.mesh import open_mesh
from r1mega.model import names
from r1mega.model.published import published_config
from r1mega.rl.autopsy import evidence as kept
from r1mega.rl.autopsy import layers, live, rounding, routing
from r1mega.rl.autopsy import weights as other
from r1mega.rl.autopsy.case import Case, Finding
from r1mega.rl.autopsy.evidence import Evidence
from r1mega.rl.autopsy.judge import Judge
from r1mega.rl.autopsy.sampling import sampling
from r1mega.rl.autopsy.tokens import tokens
from r1mega.rl.autopsy.watch import Budget, Gap, budget_of, format_of, gap_of
from r1mega.rl.batch import RolloutRow, microbatches
from r1mega.rl.engine.sglang.client import Server
from r1mega.rl.logprobs import token_logprobs
from r1mega.rl.push.hashing import content_hash
from r1mega.rl.types import Completion
from r1mega.train import manifest
from r1mega.train.gathering import take_parts
from r1mega.train.policy import Policy

SHOWN = 3
"""Findings that do not convict are told up to so many."""
LEAST_SHARE = 0.2
"""Of the difference, below which a finding is not told."""
CHEAP = (tokens, sampling, other.staleness, other.weights_held, routing.reported, other.expert_bias)
SEARCH = (other.stale, other.experts, other.wrong_scale)
"""Hypotheses in their order; a search begins where nothing before it convicts."""

Tensors = dict[str, torch.Tensor]


def autopsy(cfg: AutopsyConfig) -> dict[str, Any]:
    """Print the causes, the most likely first. Raises Failed where the difference is within its budget, UserError where no cause
    explains it."""
    megatron_jit.apply()
    run = Path(cfg.run)
    found = _evidence(run, cfg.step)
    subject = Subject(found, run, cfg)
    number, gap, faults = found.rollout, subject.gap, subject.faults
    if not faults:
        budget = found.facts["budget"]
        raise Failed(
            f"rollout {number}: engine and trainer agree within the budget: mean {gap['mean']:.3g} of {budget['mean']:g}, max "
            f"{gap['max']:.3g} of {budget['max']:g}, kl {gap['kl']:.3g} of {budget['kl']:g} nats"
        )
    findings = subject.findings()
    result = {
        "run": str(run),
        "rollout": number,
        "version": found.version,
        "gap": gap,
        "side": subject.case.side,
        "notes": subject.notes,
        "causes": [asdict(finding) for finding in findings],
        "passes": subject.case.judge.passes,
    }
    if cfg.json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join(_sentences(found, gap, subject, findings)))
    if not findings or not _is_cause(findings[0]):
        best = f"{findings[0].explained:.0%} by {findings[0].kind}" if findings else "none of it"
        raise UserError(
            f"autopsy: a cause that explains the difference of rollout {number}; got {best}; "
            + ("raise passes" if not subject.case.can_search() else "look at its rows in " + str(kept.folder_of(run, number)))
        )
    return result


def _is_cause(finding: Finding) -> bool:
    return finding.convicts or finding.is_certain


def _sentences(found: Evidence, gap: dict[str, Any], subject: Subject, findings: list[Finding]) -> Iterable[str]:
    yield (
        f"rollout {found.rollout}, weights of version {found.version}: engine and trainer differ by mean {gap['mean']:.3g}, max "
        f"{gap['max']:.3g}, kl {gap['kl']:.3g} nats over {gap['tokens']} tokens; outside the budget: {', '.join(subject.faults)}"
    )
    yield from subject.notes
    for place, finding in enumerate(findings, 1):
        yield f"{place}. {finding.kind} ({max(finding.explained, 0):.1%} explained): {finding.says}"


class Subject:
    """The rollout on the table. ``notes``: what limits the verdict, in sentences."""

    def __init__(self, found: Evidence, run: Path, cfg: AutopsyConfig):
        self.found, self.run, self.cfg, self.notes = found, run, cfg, []
        self.mesh = open_mesh(open_device(cfg.device), ParallelConfig(), LaunchConfig(), cfg.seed)
        if not found.facts:
            self._facts_from_config()
        facts = found.facts
        precision = PrecisionConfig(**facts["precision"])
        self.policy = Policy(model_from_dict(facts["model"]), None, self.mesh, precision)
        self.trainer_format = "fp8" if precision.products != "plain" else precision.dtype
        saves = _saves(run, facts.get("init"))
        weights, is_exact = self._weights(saves)
        self._take(weights)
        judge = Judge(facts["hf_config"], weights, str(self.mesh.device.torch_device), facts["temperature"])
        self._rescore(judge)
        older = {
            version: _reader(lambda path=path: self._of_checkpoint(path))
            for version, path in saves.items()
            if version < found.version or (not is_exact and version != found.version)
        }
        roles = {part.name: part.role for part in names.parts(self.policy.model_config) if not part.copy}
        passes = judge.passes + cfg.passes
        self.case = Case(
            found.rows, judge, found.version, facts, roles, [], "engine", is_exact, older, found.held, found.sums, passes
        )
        self.case.nominal = judge.score(found.rows)
        self.case.side = self._side()
        if not found.facts.get("gap"):
            gap = gap_of(self.mesh, found.rows, found.version)
            found.facts["gap"] = asdict(gap)
        self.gap = found.facts["gap"]
        self.faults = self._faults()

    def findings(self) -> list[Finding]:
        """The most likely cause first."""
        case, made = self.case, []
        for hypothesis in (*CHEAP, *SEARCH):
            if hypothesis in SEARCH and any(finding.convicts for finding in made):
                continue
            made += hypothesis(case)
        if case.side == "trainer":
            made += layers.layer(case, self.policy, self.trainer_format)
        if getattr(self.cfg.engine, "url", None):
            made += live.rescored(case, Server.open(self.cfg.engine.urls()[0], self.cfg.engine.api_key()))
        if not any(_is_cause(finding) for finding in made):
            made += rounding.rounding(case, case.facts["format"])
        return ranked(made)

    def _facts_from_config(self) -> None:
        """What evidence would have said, from the run's own config and checkpoint."""
        config = load_config(self.run)
        model = manifest.read_model(self.run)
        ids = load_tokenizer(manifest.tokenizer_of(manifest.resolve(self.run)))
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.precision.dtype]
        number_format = format_of(config.precision, None)
        self.found.facts = {
            "temperature": config.rl.sampling.temperature or 1.0,
            "model": asdict(model),
            "hf_config": published_config(model, bos_id=ids.bos_id, eos_id=ids.eos_id, pad_id=ids.pad_id, dtype=dtype),
            "precision": asdict(config.precision),
            "format": number_format,
            "budget": asdict(budget_of(config.rl.diff_budget, number_format)),
            "stale_mean": config.rl.diff_budget.stale_mean,
            "init": config.init,
        }
        self.notes.append("no evidence was kept: rows are the ledger's, and the trainer's log-probabilities are made again here")

    def _faults(self) -> list[str]:
        return Budget(**self.found.facts["budget"]).faults(Gap(**self.gap), self.found.facts.get("stale_mean"))

    def _weights(self, saves: dict[int, Path]) -> tuple[Tensors, bool]:
        """The trainer's published tensors in that rollout: kept with the evidence, or of the checkpoint of that version, or of the
        nearest one before."""
        found = self.found
        if found.weights is not None:
            return found.weights, True
        before = [version for version in saves if version <= found.version] or ([0] if 0 in saves else [])
        if not before:
            raise UserError(
                f"run: the weights of version {found.version}, with the evidence or in a checkpoint; got neither in {self.run}; "
                "raise rl.diff_budget.weights_bytes, or save more often"
            )
        made = self._of_checkpoint(saves[max(before)])
        differ = [name for name, digest in found.sums.items() if content_hash(made[name]) != digest]
        is_exact = max(before) == found.version and not differ
        if not is_exact:
            self.notes.append(
                f"the judge has the weights of version {max(before)}, the nearest that is left of version {found.version}"
                + (f" ({len(differ)} of {len(found.sums)} tensors differ by their hashes)" if found.sums else "")
                + ": differences of the size of these updates are not told from causes"
            )
        return made, is_exact

    def _of_checkpoint(self, path: Path) -> Tensors:
        """A checkpoint's published tensors, through the policy, whose weights are then others."""
        held = {name: tensor.clone() for name, tensor in self.policy.trainee.named_tensors()}
        try:
            self.policy.load(path, weights_only=True)
            return {name: tensor.detach().cpu().clone() for name, tensor in self.policy.published_tensors()}
        finally:
            for name, tensor in self.policy.trainee.named_tensors():
                tensor.copy_(held[name])

    def _take(self, weights: Tensors) -> None:
        """Put published tensors into the policy."""
        native = names.from_hf(self.policy.model_config, weights.items())
        take_parts(self.policy.trainee, native)

    def _rescore(self, judge: Judge) -> None:
        """The trainer's log-probabilities of rows that nobody kept any of."""
        lacking = [row for row in self.found.rows if row.trainer is None]
        for row in lacking:
            made = RolloutRow(row.prompt, Completion(row.tokens, row.engine.tolist(), "stop"))
            batches = microbatches([made], 1, 0, self.mesh.device.torch_device, self.policy.part, self.policy.row_multiple)
            (values,) = self.policy.score(
                batches, lambda output, batch: token_logprobs(output, batch.targets_BS, judge.temperature)[0]
            )
            row.trainer = batches[0].split(values)[0].float().cpu()

    def _side(self) -> str:
        """Who is further from the judge."""
        case = self.case
        sums = {}
        for side in ("engine", "trainer"):
            case.side = side
            sums[side] = case.before
        count = max(case.tokens, 1)
        self.notes.append(
            "to transformers in fp32 with these weights the engine differs by "
            f"{sums['engine'] / count:.2g} nats, the trainer by {sums['trainer'] / count:.2g} (mean of {count} tokens in "
            f"{len(case.rows)} rows)"
        )
        return "trainer" if sums["trainer"] > sums["engine"] else "engine"


def ranked(findings: list[Finding]) -> list[Finding]:
    """Certain and convicting ones first, then by what they leave; those that explain next to nothing are left out."""
    told = [finding for finding in findings if finding.explained >= LEAST_SHARE or finding.is_certain]
    # a fit that leaves about as much as a fact of the engine's or of the trainer's is behind it
    told.sort(key=lambda finding: (not finding.convicts, not finding.is_certain, finding.left))
    causes = [finding for finding in told if _is_cause(finding)]
    return causes + [finding for finding in told if not _is_cause(finding)][: SHOWN if not causes else max(0, SHOWN - len(causes))]


def _evidence(run: Path, step: int | None) -> Evidence:
    numbers = kept.kept(run)
    if step is None:
        if not numbers:
            raise UserError(f"step: a rollout with evidence; got none in {run / kept.FOLDER}; give step=NUMBER to go by the ledger")
        step = numbers[-1]
    return kept.read(run, step) or kept.from_ledger(run, step)


def _saves(run: Path, init: str | None) -> dict[int, Path]:
    """Version (updates made) to the run's checkpoints, and what it began from as version 0."""
    found: dict[int, Path] = {}
    if init:
        with contextlib.suppress(UserError):
            found[0] = manifest.resolve(init)
    for path in manifest.finished(run / "checkpoints"):
        with contextlib.suppress(UserError, KeyError):
            found[manifest.read_state(path)["step"]] = path
    return found


def _reader(read: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """Read once."""
    made: list[Tensors] = []

    def once() -> Tensors:
        if not made:
            made.append(read())
        return made[0]

    return once
