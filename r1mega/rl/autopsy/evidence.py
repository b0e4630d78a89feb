"""What a rollout outside its budget leaves behind, and the same read back. In and out: a file a data rank, values and tensors.

``OUT/autopsy/rollout-N/rank-R.pt``: the responses that differ most and what they were scored by; rank 0's also has the trainer's
hash of every published tensor, and what the engine held instead where it could be asked. ``weights.pt`` beside it: the trainer's
published tensors, where they are small enough. Without such files a rollout's rows come from the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.rl.batch import RolloutRow
from r1mega.rl.ledger import FOLDER as LEDGER
from r1mega.rl.ledger import History
from r1mega.rl.types import Span

FOLDER = "autopsy"
FORMAT = 1
WEIGHTS = "weights.pt"


@dataclass
class Row:
    """One response as both sides scored it.

    ``place``: its number in the data rank's rollout; ``rank``: of that data rank. ``engine``, ``trainer``: fp32 log-probabilities,
    one a token; ``trainer`` is None where nobody has kept it. ``own_T``: bool, the tokens that the policy drew. ``routed``: the
    engine's experts, int ``[prompt + response - 1, layers, top_k]``. ``support``: ids a token was drawn from, a list a token.
    """

    place: int
    prompt: list[int]
    tokens: list[int]
    engine: torch.Tensor
    trainer: torch.Tensor | None
    own_T: torch.Tensor
    versions: tuple[Span, ...] = ()
    routed: torch.Tensor | None = None
    support: list[list[int]] | None = None
    rank: int = 0

    @classmethod
    def of(cls, place: int, row: RolloutRow) -> Row:
        """From what was trained on."""
        made = row.completion
        own = torch.ones(len(made.token_ids), dtype=torch.bool) if row.own is None else torch.tensor(row.own, dtype=torch.bool)
        trainer = None if row.old is None else row.old.detach().float().cpu()
        logprobs = torch.tensor(made.logprobs, dtype=torch.float32)
        rest = (made.versions, made.routed_experts, made.sampling_mask)
        return cls(place, list(row.prompt), list(made.token_ids), logprobs, trainer, own, *rest)

    def fresh_T(self, version: int) -> torch.Tensor:
        """bool: own tokens that the weights of ``version`` drew."""
        if not self.versions:
            return self.own_T
        fresh = torch.zeros_like(self.own_T)
        for drawn, start, end in self.versions:
            if drawn == version:
                fresh[start:end] = True
        return fresh & self.own_T

    @property
    def name(self) -> str:
        """As a sentence names it."""
        return f"row {self.place}" + (f" of data rank {self.rank}" if self.rank else "")


@dataclass
class Held:
    """What the engine held, where it could be asked. ``wrong``: names whose content is not the trainer's, published names or, of a
    server, its own; ``tensors``: the engine's content of those, where it fits; ``asked``: how many were compared."""

    wrong: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    asked: int = 0


@dataclass
class Evidence:
    """One rollout. ``facts``: what :class:`r1mega.rl.autopsy.watch.Watch` writes beside the rows; ``sums``: published name to
    content hash of the trainer's; ``held``: None where the engine could not be asked; ``weights``: the trainer's, or None."""

    rollout: int
    version: int
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    held: Held | None = None
    weights: dict[str, torch.Tensor] | None = None


def folder_of(run: Path, rollout: int) -> Path:
    """Where a rollout's evidence lies."""
    return run / FOLDER / f"rollout-{rollout:08d}"


def kept(run: Path) -> list[int]:
    """Numbers of the rollouts that have evidence, in order."""
    return sorted(int(path.name.removeprefix("rollout-")) for path in (run / FOLDER).glob("rollout-*") if path.is_dir())


def write(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save(values, aside)
    aside.replace(path)


def read(run: Path, rollout: int) -> Evidence | None:
    """The evidence of a rollout, or None where there is none. Raises UserError for files that are damaged."""
    folder = folder_of(run, rollout)
    paths = sorted(folder.glob("rank-*.pt"))
    if not paths:
        return None
    parts = [_loaded(path) for path in paths]
    first, rows = parts[0], []
    for part in parts:
        rows += [Row(**values, rank=part["rank"]) for values in part["rows"]]
    weights = folder / WEIGHTS
    held = first.get("held")
    return Evidence(
        first["rollout"],
        first["version"],
        rows,
        first["facts"],
        first.get("sums") or {},
        None if held is None else Held(**held),
        _loaded(weights)["tensors"] if weights.is_file() else None,
    )


def _loaded(path: Path) -> dict[str, Any]:
    try:
        values = torch.load(path, weights_only=True, map_location="cpu")
        if values["format"] != FORMAT:
            raise KeyError(f"format {values['format']}")
        return values
    except Exception as error:  # whatever a damaged file makes torch raise
        raise UserError(
            f"{path}: evidence of this version of r1mega; got {type(error).__name__} {error}; remove its folder to go by the ledger"
        ) from error


def from_ledger(run: Path, rollout: int) -> Evidence:
    """Rows of a rollout that left no evidence: as its ``use`` frames say. Raises UserError where it has none."""
    uses = History(run / LEDGER)
    frames = [frame for frame in uses.uses().get(rollout, []) if frame.kind == "use"]
    if not frames:
        known = ", ".join(map(str, kept(run))) or "none"
        raise UserError(
            f"step: a rollout that was trained on, or has evidence; got {rollout}; evidence is there of {known}, give step=NUMBER"
        )
    known, rows = uses.by_id(), []
    for rank, frame in enumerate(frames):
        for place, name in enumerate(frame.values["samples"]):
            values, arrays = known[name].values, known[name].arrays()
            tokens = arrays["tokens"].tolist()
            own = torch.tensor(arrays["own"]) if "own" in arrays else torch.ones(len(tokens), dtype=torch.bool)
            spans = tuple(tuple(span) for span in values["versions"])
            engine = torch.tensor(arrays["logprobs"])
            rows.append(Row(place, arrays["prompt"].tolist(), tokens, engine, None, own, spans, rank=rank))
    before = [frame.values["update"] for number, done in uses.uses().items() if number < rollout for frame in done]
    return Evidence(rollout, max(before, default=0), rows)
