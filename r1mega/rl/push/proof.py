"""Proof that servers hold what was sent: a hash of each of their parameters, computed here from published tensors, name by name.

``Expected`` takes the published tensors as they go by, in any layout that the trainer has, and knows afterwards what each rank of a
server must report at ``/weights_checker``. ``Checksums`` asks servers and compares. A parameter that no published tensor makes, or
that a server lacks, is a fault like a wrong one: nothing stays unproven without being named.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from r1mega import device as devices
from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig
from r1mega.model.names import LISTED, Part
from r1mega.rl.push.hashing import Sha, Tiles
from r1mega.rl.push.layout import Held, Layout, Piece, held_tensors
from r1mega.rl.push.plan import Pair
from r1mega.rl.push.wire import Format

if TYPE_CHECKING:
    from r1mega.rl.engine.sglang.client import Server


@dataclass(frozen=True)
class Fault:
    """A parameter of a server that is not what was sent. ``sources``: the published tensors that it is made of."""

    server: str
    rank: int
    name: str
    expected: str
    got: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        listed = ", ".join(self.sources[:LISTED]) + (
            f" and {len(self.sources) - LISTED} more" if len(self.sources) > LISTED else ""
        )
        made = f", made of {listed}" if self.sources and self.sources != (self.name,) else ""
        rank = f" of rank {self.rank}" if self.rank else ""
        return f"{self.name}{rank} at {self.server} ({self.got or 'nothing'} where {self.expected or 'nothing'} is due{made})"


class Expected:
    """What each rank of a server must report. ``hashes``: Sha of servers on a CPU, Tiles on a GPU."""

    def __init__(self, model: ModelConfig, table: list[Part], layout: Layout, form: Format, on_gpu: bool, device: torch.device):
        self.form = form
        self.held: dict[tuple[int, str], Held] = {}
        self._taken: dict[tuple[int, str], Sha | Tiles] = {}
        self._of: dict[str, list[tuple[tuple[int, str], Piece, int]]] = {}
        for held in held_tensors(model, table, layout):
            key, size = (held.rank, held.name), form.hashed_itemsize(held.role)
            self.held[key] = held
            self._taken[key] = (Tiles if on_gpu else Sha)(held.numel * size, device)
            for piece in held.pieces:
                self._of.setdefault(piece.name, []).append((key, piece, size))
            for start, number in held.zeros:
                self._taken[key].zeros(start * size, number * size)
        self._done: dict[tuple[int, str], str] = {}
        self._lock = threading.Lock()  # servers are compared side by side

    def take(self, part: Part, pairs: list[Pair]) -> None:
        """A published tensor as it travels; see :meth:`r1mega.rl.push.wire.Format.pack`."""
        places = self._of.get(part.name)
        if not places:
            return
        tensor = self.form.hashed(pairs)
        for key, piece, size in places:
            self._taken[key].put(piece.start * size, tensor[piece.slices])

    @property
    def hashes(self) -> dict[tuple[int, str], str]:
        """(rank, parameter) to its hash, once all tensors have come."""
        with self._lock:
            if not self._done:
                self._done = {key: taken.hex() for key, taken in self._taken.items()}
                self._taken.clear()
            return self._done

    def faults(self, server: str, reported: dict[int, dict[str, str]]) -> list[Fault]:
        """What differs. ``reported``: rank to parameter to hash."""
        found = []
        for (rank, name), expected in self.hashes.items():
            got = reported.get(rank, {}).get(name, "")
            if got != expected:
                found.append(Fault(server, rank, name, expected, got, tuple(self.held[rank, name].sources)))
        for rank, names in reported.items():
            found += [Fault(server, rank, name, "", got, ()) for name, got in names.items() if (rank, name) not in self.hashes]
        return found


def report_of(answer: Any, server: str) -> dict[int, dict[str, str]]:
    """Rank to parameter to hash, of an answer of /weights_checker. Raises UserError for one without them."""
    reported: dict[int, dict[str, str]] = {}
    try:
        for rank in answer["ranks"]:
            place = rank["parallelism_info"]
            place = place[0] if isinstance(place, list) else place
            reported.setdefault(int(place["tp_rank"]), {}).update(rank["checksums"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"push.proof: /weights_checker of {server} gives checksums by rank; got none ({type(error).__name__} {error}); "
            "use push.proof=probe"
        ) from error
    return reported


class Checksums:
    """The proof by hashes: which parameters servers have is asked once a server, what they hold after every push."""

    name = "checksum"

    def __init__(self, model: ModelConfig, table: list[Part], device: str, timeout_seconds: float):
        self.model, self.table, self.device, self.timeout = model, table, torch.device(device), timeout_seconds
        self._layouts: dict[int, tuple[Any, Layout]] = {}
        self._expected: dict[tuple[Layout, Format, bool], Expected] = {}

    def ask(self, server: Server) -> dict[int, dict[str, str]]:
        """What ``server`` holds now. Raises UserError where it does not say."""
        body = {"action": "checksum"} | ({"selector": "all"} if server.features.selector else {})
        return report_of(server.post("/weights_checker", body, self.timeout), server.url)

    def begin(self, servers: list[Server], forms: list[Format]) -> None:
        """Before the first tensor of a push. Raises UserError for a server whose parameters are not understood."""
        self._expected = {}
        for server, form in zip(servers, forms, strict=True):
            layout = self._layout(server)
            key = (layout, form, devices.is_shared_by_handle(str(server.info.get("device") or "cpu")))
            if key not in self._expected:
                self._expected[key] = Expected(self.model, self.table, *key, self.device)
        self._of = {id(server): form for server, form in zip(servers, forms, strict=True)}

    def _layout(self, server: Server) -> Layout:
        known = self._layouts.get(id(server))
        if known is None or known[0] is not server.info:
            names = {name for rank in self.ask(server).values() for name in rank}
            layout = Layout.of(server.info, names)
            made = {held.name for held in held_tensors(self.model, self.table, layout)}
            for what, odd in (("no other than published ones make", sorted(names - made)), ("all", sorted(made - names))):
                if odd:
                    listed = ", ".join(odd[:LISTED])
                    raise UserError(
                        f"push.proof: {server.url} holds the parameters of config.json, {what}; "
                        f"{'got' if what != 'all' else 'missing'} {listed}; serve this model, or use push.proof=probe"
                    )
            known = self._layouts[id(server)] = (server.info, layout)
        return known[1]

    def take(self, part: Part, form: Format, pairs: list[Pair]) -> None:
        """A published tensor as it travels in ``form``."""
        for (_, theirs, _), expected in self._expected.items():
            if theirs == form:
                expected.take(part, pairs)

    def faults(self, server: Server) -> list[Fault]:
        """Of one server, after the last tensor."""
        key = (self._layout(server), self._of[id(server)], devices.is_shared_by_handle(str(server.info.get("device") or "cpu")))
        return self._expected[key].faults(server.url, self.ask(server))


def locate(
    faults: list[Fault], resend: Callable[[str], None], ask: Callable[[], list[Fault]], atoms: Iterable[tuple[str, set[str]]]
) -> list[str]:
    """The published tensors that were wrong: sent again one atom after the other, until a parameter is right.

    ``atoms``: (key, its tensors) of what the wrong parameters are made of, in order; ``resend`` sends one, ``ask`` gives the faults
    that are left. Of several wrong tensors in one parameter the last one is found: with it the parameter becomes right.
    """
    left = {(fault.server, fault.rank, fault.name): set(fault.sources) for fault in faults if fault.sources}
    found: list[str] = []
    for key, names in atoms:
        if not any(names & sources for sources in left.values()):
            continue
        resend(key)
        still = {(fault.server, fault.rank, fault.name) for fault in ask()}
        for right in [parameter for parameter in left if parameter not in still]:
            found += sorted(names & left.pop(right))
        if not left:
            break
    return list(dict.fromkeys(found))
