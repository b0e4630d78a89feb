"""Rules of checkpoints and of the exports that are made of them. In: a section; out: Violations."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.config.errors import Violation
from r1mega.config.model_rules import multiples
from r1mega.config.rl import RolloutConfig
from r1mega.config.train import TrainerConfig


def export_violations(where: str, section: TrainerConfig | RolloutConfig) -> Iterator[Violation]:
    """Exports are made of checkpoints. ``where``: the section's key, trainer or rl."""
    saves, exports = section.save_every, section.export_every
    if exports and (not saves or exports % saves):
        fixes = ((f"{where}.export_every", multiples(saves, exports)),) if saves else ()
        rule = f"a multiple of {where}.save_every {saves}" if saves else f"0 where {where}.save_every is 0"
        hint = "" if saves else f"give {where}.save_every={exports}"
        yield Violation(f"{where}.export_every", rule, exports, fixes, hint)
