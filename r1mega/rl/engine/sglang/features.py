"""What a server of some SGLang version can do, by name: from its /server_info, once. Imports the standard library alone.

In: the JSON object of ``/server_info``. Out: :class:`Features`. Refuses servers older than the contract that this package speaks,
and, by :meth:`Features.require`, servers that lack what a config asks for; the message names all of it and the server.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from r1mega.config.errors import UserError, either

OLDEST = (0, 5, 16)
"""First version whose fields these are."""
NEWEST = (0, 5, 23)
"""Last version whose contract was read; newer ones are served as this one."""

NEED_VERSION = {
    "sampling_mask": (0, 5, 16),
    "live_model_info": (0, 5, 18),
    "version_spans": (0, 5, 19),
    "update_sessions": (0, 5, 21),
    "selector": (0, 5, 21),
    "draft_over_group": (0, 5, 21),
    "safe_flush": (0, 5, 22),
}
"""Feature to the first version that has it."""

NEED_ARGUMENT = {
    "routed_experts": ("enable_return_routed_experts", "routing replay"),
    "memory_saver": ("enable_memory_saver", "sleep and wake"),
    "weights_backup": ("enable_weights_cpu_backup", "weights that survive sleep"),
    "deterministic": ("enable_deterministic_inference", "the same tokens for the same seed"),
}
"""Feature to the server argument that switches it on, and what it is for."""


@dataclass(frozen=True)
class Features:
    """Named abilities of one server.

    ``version``: as the server says it; ``number``: its three numbers. ``sampling_mask``: /generate takes return_sampling_mask.
    ``version_spans``: answers carry meta_info.weight_versions. ``update_sessions``: begin and end are mandatory around updates by
    tensor and by group, never sent to one without. ``selector``: updates name target, draft or all; before it, by tensor,
    ``disable_draft_model``. ``draft_over_group``: updates by group reach the draft model. ``checksum``: /weights_checker hashes
    what is served. ``safe_flush``: a refused flush is an answer, not the server's end. ``live_model_info``: live values are in
    /model_info. ``routed_experts``, ``memory_saver``, ``weights_backup`` and
    ``deterministic`` (sampling_seed is honoured): switched on by arguments. ``draft``: serves a draft model. ``no_tokenizer``:
    started with skip_tokenizer_init.
    """

    version: str
    number: tuple[int, int, int]
    sampling_mask: bool
    live_model_info: bool
    version_spans: bool
    update_sessions: bool
    selector: bool
    draft_over_group: bool
    safe_flush: bool
    routed_experts: bool
    memory_saver: bool
    weights_backup: bool
    deterministic: bool
    draft: bool
    no_tokenizer: bool
    checksum: bool = True

    @classmethod
    def of(cls, info: dict[str, Any], where: str) -> Features:
        """From ``/server_info``; ``where`` names the server in errors. Raises UserError for one too old, or without a version."""
        version = info.get("version")
        found = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
        if not found:
            raise UserError(f"{where}: /server_info gives SGLang's version; got {version!r}; give the URL of an SGLang server")
        number = tuple(int(part) for part in found.groups())
        if number < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise UserError(f"{where}: SGLang from {oldest} on; got {version}; install sglang>={oldest} for the server")
        return cls(
            version=version,
            number=number,
            draft=bool(info.get("speculative_algorithm")),
            no_tokenizer=bool(info.get("skip_tokenizer_init")),
            **{name: number >= first for name, first in NEED_VERSION.items()},
            **{name: bool(info.get(argument)) for name, (argument, _) in NEED_ARGUMENT.items()},
        )

    def table(self) -> dict[str, bool]:
        """Every ability by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type == "bool"}

    def missing(self, names: Iterable[str]) -> list[str]:
        """Of ``names``, what this server lacks, each with what would bring it."""
        return [f"{name} ({self._way(name)})" for name in names if not getattr(self, name)]

    def require(self, names: Iterable[str], where: str) -> None:
        """Raise UserError that names every one of ``names`` that this server lacks."""
        lacks = self.missing(names)
        if lacks:
            raise UserError(
                f"{where}: the config asks for {either(names)}; got SGLang {self.version} without {', '.join(lacks)}; "
                "start the server so, or ask for less"
            )

    @staticmethod
    def _way(name: str) -> str:
        if name in NEED_VERSION:
            return f"SGLang {'.'.join(map(str, NEED_VERSION[name]))}"
        if name in NEED_ARGUMENT:
            argument, use = NEED_ARGUMENT[name]
            return f"--{argument.replace('_', '-')}, for {use}"
        return "another server"
