"""A push to servers, in order: poison, buckets, proof, version. What is the same whatever way the bytes go.

    drain -> version "r1mega:incomplete:N" -> [session] -> bucket after bucket -> [end of session] -> flush -> proof -> version "N"

Until the proof has passed, a server reports the poison version and the engine's version is -1, so that a push that broke off is
seen by the next trainer too. A bucket is filled while the one before it travels: memories in turn, none touched again before the
servers have answered. No update flushes the cache itself: old servers die of a flush that meets a request, so the end drains.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import torch

from r1mega import device as devices
from r1mega.config.errors import UserError
from r1mega.model.names import parts
from r1mega.model.published import model_of
from r1mega.rl.push.choices import ServerWay
from r1mega.rl.push.contract import INCOMPLETE, PushReport, PushRuntime
from r1mega.rl.push.hashing import content_hash
from r1mega.rl.push.plan import Coverage, Pair, atom_of, atoms, buckets
from r1mega.rl.push.probe import Probe
from r1mega.rl.push.proof import Checksums, Fault, locate
from r1mega.rl.push.wire import Bucket, Format, fill, room

if TYPE_CHECKING:
    from r1mega.rl.engine.sglang.client import Server

MEMORIES, AHEAD = 3, 2
"""Memories in turn, and buckets under way at most. A server may answer while its GPU still copies out of a handle's memory: it has
answered for the bucket after that too before the memory is written again."""


SEARCH_SECONDS = 120.0
"""For the tensor that is wrong in a stack, at most."""


class Way(Protocol):
    """How buckets come to servers."""

    tight: bool
    """Whether tensors lie in a bucket without gaps."""
    needs_session: bool
    """Whether servers want begin and end around it."""

    def device(self, servers: list[Server]) -> torch.device:
        """Where buckets are filled."""

    def open(self, fleet: Fleet, form: Format, version: int) -> None:
        """Before the first bucket."""

    def deliver(self, bucket: Bucket) -> None:
        """Return once every server has taken it; the bucket's memory is free again then."""

    def finish(self) -> None:
        """After the last bucket: what was delivered is in the servers when this returns."""

    def abandon(self) -> None:
        """After a failure: leave nothing that the next push meets."""

    def close(self) -> None:
        """For good."""


class Fleet:
    """The servers of one push, asked side by side; what each one's answers took is kept."""

    def __init__(self, servers: list[Server], pool: ThreadPoolExecutor, timeout_seconds: float):
        self.servers, self.pool, self.timeout = servers, pool, timeout_seconds
        self.seconds = {server.url: 0.0 for server in servers}

    def ask(self, call: Callable[[Server], object]) -> list[object]:
        """``call`` of every server, in order. Raises the first error after all have answered or failed."""
        futures = self.start(call)
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def start(self, call: Callable[[Server], object]) -> list[Future]:
        """As :meth:`ask`, not waited for."""

        def timed(server: Server) -> object:
            began = time.perf_counter()
            try:
                return call(server)
            finally:
                self.seconds[server.url] += time.perf_counter() - began

        return [self.pool.submit(timed, server) for server in self.servers]

    def post(self, path: str, body: dict) -> list[object]:
        """The same request to all."""
        return self.ask(lambda server: server.post(path, body, self.timeout))


class ToServers:
    """The push of every choice that goes to servers; see :class:`r1mega.rl.push.contract.Push`."""

    def __init__(self, choice: ServerWay, runtime: PushRuntime, way: Way):
        self.choice, self.runtime, self.way = choice, runtime, way
        plain = {key: value for key, value in runtime.hf_config.items() if key != "quantization_config"}
        self.model = model_of(plain, "push: config.json")
        self.table = parts(self.model)
        self.checksums = Checksums(self.model, self.table, runtime.device, choice.request_seconds)
        self._memories: list[torch.Tensor] = []

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> PushReport:
        """See :class:`r1mega.rl.push.contract.Push`."""
        servers = list(self.runtime.servers())
        if not servers:
            raise UserError("push: servers that are there; got none; start them, or use push=memory with engine=local")
        self.runtime.engine.version = -1
        with ThreadPoolExecutor(len(servers), thread_name_prefix="push") as pool:
            try:
                report = _Sending(self, Fleet(servers, pool, self.choice.request_seconds), version).run(tensors)
            except BaseException:
                self.way.abandon()
                raise
        self.runtime.engine.version = version
        return report

    def wrong_now(self) -> tuple[list[str], dict[str, torch.Tensor], int] | None:
        """Published tensors that idle servers no longer hold as the last push sent them, what they hold instead (nobody says), and
        how many parameters were compared; None where that push was not proven by hashes, or a server does not answer."""
        try:
            faults = [fault for server in self.runtime.servers() for fault in self.checksums.faults(server)]
        except (UserError, KeyError, AttributeError):  # no proof by hashes so far, or not of this server
            return None
        names = dict.fromkeys(name for fault in faults for name in fault.sources or (fault.name,))
        return list(names), {}, len(self.table)

    def close(self) -> None:
        """See :class:`r1mega.rl.push.contract.Push`."""
        self._memories.clear()
        self.way.close()

    def memory(self, turn: int, nbytes: int, device: torch.device) -> torch.Tensor:
        """The memory whose turn it is, kept between pushes and made anew where it is too small."""
        while len(self._memories) < MEMORIES:
            self._memories.append(torch.empty(0, dtype=torch.uint8, device=device))
        held = self._memories[turn % MEMORIES]
        if held.numel() < nbytes or held.device != device:
            size = max(nbytes, self.choice.bucket_bytes) if nbytes > self.choice.bucket_bytes // 2 else nbytes
            held = self._memories[turn % MEMORIES] = torch.empty(size, dtype=torch.uint8, device=device)
        return held

    def proof(self, servers: list[Server], forms: list[Format]) -> Checksums | Probe | None:
        """The wanted proof, or the strongest that all servers offer. Raises UserError where there is none."""
        wanted = self.choice.proof
        if wanted == "none":
            return None
        said = "it was not asked for"
        if wanted in ("auto", "checksum"):
            try:
                self.checksums.begin(servers, forms)
                return self.checksums
            except UserError as error:
                if wanted == "checksum":
                    raise
                said = str(error)
        if self.runtime.score is None:
            raise UserError(
                f"push.proof: checksums of the servers, or log-probabilities of the trainer; got neither ({said}); "
                "use push.proof=none to go on unproven"
            )
        return Probe(self.runtime.score, self.model.vocab_size, self.choice.probe_tolerance, self.choice.request_seconds)


class _Sending:
    """One push under way."""

    def __init__(self, owner: ToServers, fleet: Fleet, version: int):
        self.owner, self.fleet, self.version = owner, fleet, version
        self.choice, self.way, self.servers = owner.choice, owner.way, fleet.servers
        forms = [Format.of(server, self.choice.format, owner.runtime.hf_config) for server in self.servers]
        if len(set(forms)) > 1:
            raise UserError(
                f"push: all servers hold one number format; got {', '.join(map(str, dict.fromkeys(forms)))}; start them alike"
            )
        self.form = forms[0]
        self.drafts = [server.features.draft for server in self.servers]
        if any(self.drafts) and not all(self.drafts):
            raise UserError("push: all servers have a draft model, or none; got both; start them alike")
        self.device = self.way.device(self.servers)
        self.proof_seconds, self.num_bytes, self.num_buckets = 0.0, 0, 0
        began = time.perf_counter()
        self.proof = owner.proof(self.servers, forms)
        self.proof_seconds += time.perf_counter() - began

    def run(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> PushReport:
        began = time.perf_counter()
        self.drain()
        if hasattr(self.way, "knows"):
            self.way.knows(self.fleet.ask(_label_of))
        self.label(f"{INCOMPLETE}{self.version}")
        with self.session():
            coverage = Coverage(self.owner.table)
            self.stream(self.packed(tensors, coverage))
            coverage.finish()
            self.way.finish()
        self.drain()
        self.prove(tensors)
        self.label(str(self.version))
        return PushReport(
            version=self.version,
            seconds=time.perf_counter() - began,
            num_bytes=self.num_bytes,
            buckets=self.num_buckets,
            proof=self.proof.name if self.proof else "none",
            proof_seconds=self.proof_seconds,
            server_seconds=dict(self.fleet.seconds),
        )

    def drain(self) -> None:
        """Wait for idle servers, and forget what they have cached."""
        self.fleet.ask(lambda server: server.drain(self.choice.drain_seconds))

    def label(self, name: str) -> None:
        """The version that servers report."""
        self.fleet.post("/update_weight_version", {"new_version": name, "abort_all_requests": False})

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Begin and end, where servers want them and the way does; ended after a failure too, or the next one could not begin."""
        self.way.open(self.fleet, self.form, self.version)
        wanted = [server.features.update_sessions and self.way.needs_session for server in self.servers]

        def at(path: str, body: dict) -> None:
            self.fleet.ask(
                lambda server: server.post(path, body, self.choice.request_seconds) if wanted[self.servers.index(server)] else None
            )

        try:
            at("/begin_weight_update", {"selector": "all"})
            yield
        except BaseException:
            with contextlib.suppress(UserError):
                at("/end_weight_update", {})
            raise
        at("/end_weight_update", {})

    def packed(
        self, tensors: Iterable[tuple[str, torch.Tensor]], coverage: Coverage | None, only: set[str] | None = None
    ) -> Iterator[Pair]:
        """What travels, in order; hashed on the way. ``only``: of some tensors, again."""
        layers, draft = self.owner.model.num_layers, all(self.drafts)
        for name, tensor in tensors:
            if only is not None and name not in only:
                continue
            part = coverage.take(name, tensor) if coverage else next(part for part in self.owner.table if part.name == name)
            if not draft and _layer_of(name) >= layers:
                continue  # servers without a draft model pass the MTP layer over
            with torch.no_grad():
                pairs = self.form.pack(part, tensor.detach())
                if isinstance(self.proof, Checksums) and only is None:
                    began = time.perf_counter()
                    self.proof.take(part, self.form, pairs)
                    self.proof_seconds += time.perf_counter() - began
            if not part.copy:  # servers take the owner's numbers
                yield from pairs

    def stream(self, pairs: Iterator[Pair]) -> None:
        """Fill and deliver side by side, in order."""
        waiting: list[Future] = []
        with ThreadPoolExecutor(1, thread_name_prefix="push-bucket") as carrier:
            try:
                for bucket in buckets(pairs, self.choice.bucket_bytes):
                    if len(waiting) == AHEAD:
                        waiting.pop(0).result()
                    waiting.append(carrier.submit(self._deliver, self.filled(bucket), self.num_buckets))
                    self.num_buckets += 1
                while waiting:
                    waiting.pop(0).result()
            finally:
                for late in waiting:
                    late.cancel()

    def filled(self, pairs: list[Pair]) -> Bucket:
        """A bucket in the memory whose turn it is, and there to stay until it has been delivered."""
        memory = self.owner.memory(self.num_buckets, room(pairs), self.device)
        bucket = fill(memory, pairs, tight=self.way.tight)
        for device in {self.device, *(tensor.device for _, tensor in pairs)}:
            devices.fence(device)
        self.num_bytes += bucket.memory.numel()
        return bucket

    def _deliver(self, bucket: Bucket, number: int) -> None:
        try:
            self.way.deliver(bucket)
        except UserError as error:
            names = bucket.names
            raise UserError(
                f"push: every server takes bucket {number}, {names[0]} to {names[-1]}; got ({error}); "
                "the servers hold parts of two versions and stay paused: push again"
            ) from error

    def prove(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raise UserError unless every server holds what was sent."""
        began = time.perf_counter()
        if isinstance(self.proof, Probe):
            self.proof.check(self.servers)
        elif self.proof is not None:
            faults = self.faults()
            if faults:
                raise self.told(faults, tensors)
        self.proof_seconds += time.perf_counter() - began

    def faults(self) -> list[Fault]:
        """Of all servers."""
        return [fault for found in self.fleet.ask(self.proof.faults) for fault in found]

    def told(self, faults: list[Fault], tensors: Iterable[tuple[str, torch.Tensor]]) -> UserError:
        """The error, with the published tensor's name where it can be found out."""
        wrong: list[str] = []
        unclear: list[Fault] = []
        for fault in faults:
            if len({atom_of(name) for name in fault.sources}) == 1:
                wrong += fault.sources
            elif fault.sources:
                unclear.append(fault)
        note = ""
        if unclear and not isinstance(tensors, Iterator):
            sources = list(dict.fromkeys(name for fault in unclear for name in fault.sources))
            try:
                wrong += self.reread(sources, tensors) if hasattr(self.way, "reread") else self.located(unclear, sources, tensors)
            except UserError as error:
                note = f"; which one of a stack could not be found out ({error})"
        wrong = list(dict.fromkeys(wrong))
        names = ", ".join(wrong[:8]) or "one of those that make it"
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        return UserError(
            f"push.proof: servers hold the weights of version {self.version} as sent; got wrong {names}: "
            f"{'; '.join(map(str, faults[:3]))}{more}{note}; the servers stay paused: push again, and see their logs"
        )

    def reread(self, sources: list[str], tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Of ``sources``, what was not written as it was given."""
        given = {name: content_hash(tensor.cpu()) for name, tensor in self.packed(tensors, None, only=set(sources))}
        written = self.way.reread(list(given))
        return [name for name, made in given.items() if written.get(name) != made]

    def located(self, faults: list[Fault], sources: list[str], tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Send what the wrong parameters are made of once more, an atom at a time, and see when they become right.

        Raises UserError where that takes longer than :data:`SEARCH_SECONDS`: other ranks of the trainer wait meanwhile.
        """
        until = time.monotonic() + SEARCH_SECONDS
        again = atoms(self.packed(tensors, None, only=_whole_atoms(sources, self.owner.table)))
        held: dict[str, list[Pair]] = {}

        def keys() -> Iterator[tuple[str, set[str]]]:
            for pairs in again:
                if time.monotonic() > until:
                    raise UserError(f"a search of {SEARCH_SECONDS:g} s was too short")
                key = atom_of(pairs[0][0])
                held.clear()
                held[key] = pairs
                yield key, {name for name, _ in pairs}

        with self.session():
            return locate(faults, lambda key: self.way.deliver(self.filled(held[key])), self.faults, keys())


def _whole_atoms(names: Iterable[str], table) -> set[str]:
    keys = {atom_of(name) for name in names}
    return {part.name for part in table if atom_of(part.name) in keys}


def _label_of(server: Server) -> str:
    """The weight version that a server reports."""
    return str(server.get("/model_info").get("weight_version"))


def _layer_of(name: str) -> int:
    found = name.split(".")
    return int(found[2]) if name.startswith("model.layers.") else -1
