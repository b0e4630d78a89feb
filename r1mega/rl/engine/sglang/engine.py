"""The engine over SGLang servers at work: many requests side by side, interrupted and gone on with, through pushes and deaths.

In: requests of token ids. Out: completions whose ``versions`` say which weights drew which tokens. No torch is imported here.

A pause stops the requests and keeps their tokens; after it they are sent again, prompt and tokens together, for the rest: SGLang's
cache has the prefix where the weights are the same. So no request spans an update, and the version of a span is the one that this
engine was told (``version = N`` after a whole push) when it was sent. A server that dies gives its requests back to the queue. It
serves again when ``version`` is set after a push to it: until then it is in :attr:`ServedEngine.stale`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from r1mega.compat import sglang_server
from r1mega.config.errors import UserError
from r1mega.rl.engine.sglang import answers, probe, roster
from r1mega.rl.engine.sglang.client import EngineError, Server
from r1mega.rl.engine.sglang.launch import Fleet
from r1mega.rl.engine.sglang.made import Made, sampling_params
from r1mega.rl.push.contract import INCOMPLETE
from r1mega.rl.types import Completion

if TYPE_CHECKING:
    from r1mega.rl.engine.contract import EngineRuntime, Request
    from r1mega.rl.engine.sglang import SglangEngine

RETRIED = (0, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is sent again; 0: no answer."""
LOOK_SECONDS = 0.1
REVIVE_SECONDS = 2.0
NOTICE_SECONDS = 10.0  # within which whoever keeps a server has noticed that it is dead
ABORT_SECONDS = 0.1  # between two calls that abort: a request that was on its way to the scheduler is met by the next one
REMEMBERED_PROMPTS = 4096
SLACK = 8
"""A prompt's server may have so many requests more than the least loaded one."""


@dataclass
class Seat:
    """One server's place. ``version``: of its weights, -1 where they are not whole; ``alive``: it answers; ``flights``: its
    requests; ``asleep``: memory tags that it has given back; ``label``: weight_version of its last answer under these weights."""

    server: Server
    version: int = -1
    alive: bool = True
    flights: set[str] = field(default_factory=set)
    asleep: list[str] = field(default_factory=list)
    label: str = ""


class ServedEngine:
    """See :class:`r1mega.rl.engine.contract.Engine`. ``counts``: of requests, pieces, tokens, resent, deaths."""

    def __init__(self, choice: SglangEngine, runtime: EngineRuntime):
        self.choice, self.runtime = choice, runtime
        _raise_open_files(choice.concurrency)
        self.fleet = roster.given(choice, runtime) or (None if choice.url else Fleet(choice, runtime))
        try:
            found = [one.server for one in self.fleet.owned] if self.fleet else [*map(self._open, choice.urls())]
            self.router = Server(choice.router, choice.api_key()) if choice.router else None
            for server in found:
                where = f"engine=sglang {server.url}"
                server.features.require(choice.wanted(), where)
                sglang_server.check_widths(server.info.get("device"), runtime.hf_config, server.tp_size, where)
        except BaseException:
            if self.fleet:
                self.fleet.close()
            raise
        self.seats = [Seat(server) for server in found]
        self.counts = {"requests": 0, "pieces": 0, "tokens": 0, "resent": 0, "deaths": 0}
        if self.fleet:
            self.fleet.on_death, self.fleet.on_ready = self._died, self._revived
        config = runtime.hf_config
        self._routing = (
            answers.Routing(config["num_hidden_layers"], config["num_experts_per_tok"], config["n_routed_experts"])
            if choice.routed_experts
            else None
        )
        self._names = (f"{uuid.uuid4().hex[:12]}-{number}" for number in itertools.count())
        self._places: OrderedDict[int, Seat] = OrderedDict()
        self._paused = False
        self._probed = False
        self._pushed: dict[str, int] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def _open(self, url: str) -> Server:
        return Server.open(url, self.choice.api_key())

    @property
    def version(self) -> int:
        """Of the weights that are served; -1 before the first whole push and after one that failed.

        Setting it says that a push of that version is whole: to the servers of :meth:`begin_push`, or, where none was begun, to
        those that answer; -1 that none may serve.
        """
        return max((seat.version for seat in self.seats if seat.alive), default=-1)

    @version.setter
    def version(self, version: int) -> None:
        for seat in self.seats:
            server = seat.server
            is_whole = seat.alive and (self._pushed is None or self._pushed.get(server.url) == server.generation)
            if is_whole or version < 0:
                seat.version, seat.label = version, ""
        self._tell_waiting()

    def begin_push(self, urls: Collection[str] | None = None) -> None:
        """The next push goes to these servers (None: all that answer) as they are now; one that starts anew stays stale."""
        found = [seat.server for seat in self.seats if seat.alive]
        self._pushed = {server.url: server.generation for server in found if urls is None or server.url in urls}

    @property
    def sleeps(self) -> bool:
        """Does :meth:`sleep` give memory back?"""
        return self.choice.memory_saver

    @property
    def servers(self) -> list[Server]:
        """Those that answer; a push goes to all of them."""
        return [seat.server for seat in self.seats if seat.alive]

    @property
    def stale(self) -> list[Server]:
        """Those that answer and have no whole weights, or older ones: each must get a push before it serves."""
        newest = self.version
        return [seat.server for seat in self.seats if seat.alive and (seat.version < 0 or seat.version < newest)]

    async def wait_for_stale(self) -> list[Server]:
        """Return when a server wants a push: a loop that waits for responses looks at this beside them."""
        while not (found := self.stale):
            await asyncio.sleep(LOOK_SECONDS)
        return found

    async def wait_for_all(self) -> None:
        """Return when every server answers again, asked now: a death may not have been noticed yet.

        Raises UserError where one does not come back within ``start_seconds``.
        """
        self._enter_loop()
        until = asyncio.get_running_loop().time() + self.choice.start_seconds
        while not (all(await asyncio.gather(*map(self._answers, self.seats))) and all(seat.alive for seat in self.seats)):
            if self.fleet and self.fleet.failure:
                raise self.fleet.failure
            if asyncio.get_running_loop().time() > until:
                gone = ", ".join(seat.server.url for seat in self.seats if not seat.alive)
                raise UserError(
                    f"engine.start_seconds: a server that was lost answers again within {self.choice.start_seconds:g} s; "
                    f"got nothing of {gone}; see its log, or raise it"
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def _answers(self, seat: Seat) -> bool:
        try:
            await seat.server.aget("/model_info", 5)
        except EngineError:
            if seat.alive and not self.fleet:
                await self._look_at(seat)
            return False
        return True

    async def complete(self, request: Request) -> Completion:
        """One response. Many run side by side; deaths of servers and pauses are not seen.

        Raises EngineError that names the server for what it refuses or for an answer that is wrong, UserError where no server may
        serve in time.
        """
        self._enter_loop()
        self.counts["requests"] += 1
        limit = request.sampling.max_new_tokens
        made = Made(list(request.prompt))
        failures = 0
        async with self._gate:
            while True:
                before, seat = len(made.token_ids), None
                try:
                    seat = await self._seat(request.prompt)
                    reason = await self._piece(seat, request, made, limit - before)
                except EngineError as error:
                    failures += 1
                    if error.status not in RETRIED or failures >= self.choice.attempts:
                        raise
                    self.counts["resent"] += 1
                    if error.is_lost and seat is not None and not self.fleet:
                        await self._look_at(seat)
                    await asyncio.sleep(min(0.05 * 2**failures, 5.0))
                    continue
                failures = 0 if len(made.token_ids) > before else failures
                if reason != "abort":
                    self.counts["tokens"] += len(made.token_ids)
                    return made.completion(reason)
                if len(made.token_ids) == limit:  # aborted in the moment of its last token
                    return made.completion("length")

    async def _piece(self, seat: Seat, request: Request, made: Made, limit: int) -> str:
        """Ask ``seat`` for the rest of a response, and add what comes. Returns how it ended."""
        name, choice, version = next(self._names), self.choice, seat.version
        sent = made.prompt + made.token_ids
        routed_from = max(len(sent) - 1, 0) if made.token_ids else 0
        body = {
            "rid": name,
            "input_ids": sent,
            "return_logprob": True,
            "sampling_params": sampling_params(request.sampling, limit, self.runtime.eos_id),
        }
        if choice.deterministic:
            body["sampling_params"]["sampling_seed"] = request.seed & 0x7FFFFFFF
        if choice.routed_experts:
            body |= {"return_routed_experts": True, "routed_experts_start_len": routed_from}
        if choice.sampling_mask:
            body["return_sampling_mask"] = True
        seat.flights.add(name)
        try:
            answer = await (self.router or seat.server).generate(body, choice.request_seconds)
        finally:
            seat.flights.discard(name)
        piece = answers.read(
            seat.server,
            answer,
            prompt_size=len(sent),
            limit=limit,
            eos_id=self.runtime.eos_id,
            routing=self._routing,
            routed_from=routed_from,
            masked=choice.sampling_mask,
        )
        self.counts["pieces"] += 1
        if not self.router:
            if piece.label.startswith(INCOMPLETE) or (piece.label.isdigit() and piece.label != str(version)):
                # it started anew, or somebody else has pushed to it, and nobody here has noticed
                self._died(self.seats.index(seat))
                self._revived(self.seats.index(seat))
                raise EngineError(seat.server.url, "/generate", 0, f"an answer from weights {piece.label} for version {version}")
            seat.label = piece.label
        made.add(piece, version)
        return piece.reason

    async def _seat(self, prompt: list[int]) -> Seat:
        """The server for a prompt, when nothing is paused: the one that had this prompt last, unless it is busier than others."""
        until = asyncio.get_running_loop().time() + self.choice.request_seconds
        while True:
            if self._closed:
                raise UserError("engine=sglang: an engine that is open; got one that was closed; build another")
            newest = self.version
            ready = [seat for seat in self.seats if seat.alive and seat.version >= 0 and seat.version == newest and not seat.asleep]
            if self.router and len(ready) < len(self.seats):
                ready = []  # it would send to the others too
            if ready and not self._paused:
                if not self._probed:
                    await self._probe(ready)
                    continue
                least = min(ready, key=lambda seat: len(seat.flights))
                key = hash(tuple(prompt))
                held = self._places.pop(key, None)
                if held not in ready or len(held.flights) > len(least.flights) + SLACK:
                    held = least
                self._places[key] = held
                if len(self._places) > REMEMBERED_PROMPTS:
                    self._places.popitem(last=False)
                return held
            if not ready and self.fleet and self.fleet.failure:
                raise self.fleet.failure
            if asyncio.get_running_loop().time() > until:
                what = "paused servers" if ready else "none with complete weights"
                raise UserError(
                    f"engine.request_seconds: a server may serve within {self.choice.request_seconds:g} s; got {what}; push to "
                    "them, resume, or raise it"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REVIVE_SECONDS):
                    await self._change.wait()

    async def _probe(self, ready: list[Seat]) -> None:
        async with self._probing:
            if self._probed:
                return
            for seat in ready:
                await probe.check_scaling(seat.server)
            self._probed = True

    async def pause(self) -> None:
        """Stop all requests of this run; they keep their tokens. From its return on nothing is sampled for it.

        Raises EngineError that names the server whose requests do not stop within ``pause_seconds``.
        """
        self._enter_loop()
        self._paused = True
        until = asyncio.get_running_loop().time() + self.choice.pause_seconds
        while busy := [seat for seat in self.seats if seat.flights]:
            if asyncio.get_running_loop().time() > until:
                raise EngineError(
                    busy[0].server.url, "/abort_request", 0, f"{len(busy[0].flights)} requests run on", "end the server"
                )
            await asyncio.gather(*(self._abort(seat) for seat in (self.seats if self.router else busy) if seat.alive))
            for _ in range(20):
                if not any(seat.flights for seat in self.seats):
                    break
                await asyncio.sleep(ABORT_SECONDS / 20)

    async def _abort(self, seat: Seat) -> None:
        calls = [{"rid": name} for name in seat.flights] if self.choice.shared else [{"abort_all": True}]
        for start in range(0, len(calls), 64):
            with contextlib.suppress(EngineError):  # dead: its requests come back by themselves
                await asyncio.gather(*(seat.server.apost("/abort_request", body, 10) for body in calls[start : start + 64]))

    async def resume(self) -> None:
        """Stopped requests go on, under the weights that are served now."""
        self._paused = False
        self._tell_waiting()

    async def sleep(self, tags: tuple[str, ...] = sglang_server.TAGS) -> None:
        """Give device memory back by tags; nothing where ``engine.memory_saver`` is off. Paused first.

        Weights that are given back are lost, and the servers stale, unless they keep a copy (``enable_weights_cpu_backup``). A
        server of ours that dies asleep starts again when the others wake; with runtime=ray, at once.
        """
        if not self.choice.memory_saver:
            return
        await self.pause()

        async def one(seat: Seat) -> None:
            freed = [tag for tag in tags if tag not in seat.asleep]
            await seat.server.apost("/flush_cache?timeout=60", None, 90)
            await seat.server.apost("/release_memory_occupation", {"tags": freed})
            seat.asleep += freed
            if sglang_server.WEIGHTS in freed and not seat.server.features.weights_backup:
                seat.version = -1

        await self.wait_for_all()  # one that starts would take the memory that the others give back
        if self.fleet:
            self.fleet.is_held = True
        await asyncio.gather(*(self._unless_lost(seat, one(seat)) for seat in self.seats if seat.alive))

    async def wake(self, tags: tuple[str, ...] = sglang_server.TAGS) -> None:
        """Take memory back; for a push: the weights' tag first, the others after it. A server serves when it has all."""

        async def one(seat: Seat) -> None:
            taken = [tag for tag in seat.asleep if tag in tags]
            if taken:
                await seat.server.apost("/resume_memory_occupation", {"tags": taken})
                seat.asleep = [tag for tag in seat.asleep if tag not in taken]

        if self.fleet:
            self.fleet.is_held = False
        await asyncio.gather(*(self._unless_lost(seat, one(seat)) for seat in self.seats if seat.alive))
        self._tell_waiting()

    async def wake_weights(self) -> None:
        """Take the weights' memory back, for a push."""
        await self.wake((sglang_server.WEIGHTS,))

    async def _unless_lost(self, seat: Seat, call: Awaitable[None]) -> None:
        """A server that has died needs no answer. Raises what ``call`` raises for one that is there and does not do it."""
        try:
            await call
        except EngineError as error:
            until = asyncio.get_running_loop().time() + NOTICE_SECONDS
            while error.is_lost and seat.alive and asyncio.get_running_loop().time() < until:
                if not self.fleet:
                    await self._look_at(seat)
                await asyncio.sleep(LOOK_SECONDS)
            if seat.alive:
                raise

    def close(self) -> None:
        """End our servers; leave others' as they are."""
        self._closed = True
        self._tell_waiting()
        for seat in self.seats:
            seat.server.close()
        if self.fleet:
            self.fleet.close()

    async def _look_at(self, seat: Seat) -> None:
        """After a lost answer of a server that is not ours: the same process, another one, or none?"""
        was = _identity(seat.server.info)
        try:
            info = await seat.server.aget("/server_info", 10)
            label = (await seat.server.aget("/model_info", 10)).get("weight_version")
        except EngineError:
            if seat.alive:
                self._died(self.seats.index(seat))
                self._revivals.add(task := asyncio.ensure_future(self._await_revival(seat)))
                task.add_done_callback(self._revivals.discard)
            return
        if seat.alive and (_identity(info) != was or (seat.label and label != seat.label)):
            self._died(self.seats.index(seat))
            await asyncio.to_thread(seat.server.read_info)
            self._revived(self.seats.index(seat))

    async def _await_revival(self, seat: Seat) -> None:
        while not self._closed:
            await asyncio.sleep(REVIVE_SECONDS)
            with contextlib.suppress(UserError):
                await asyncio.to_thread(seat.server.read_info)
                self._revived(self.seats.index(seat))
                return

    def _died(self, index: int) -> None:
        """From any thread."""
        seat = self.seats[index]
        seat.alive, seat.version, seat.asleep = False, -1, []
        self.counts["deaths"] += 1

    def _revived(self, index: int) -> None:
        """From any thread. ``generation`` tells a push that groups of ranks with this server are gone."""
        seat = self.seats[index]
        seat.server.generation += 1
        seat.alive = True
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        """Requests that wait for a server look again; from any thread."""

        def tell() -> None:
            self._change.set()
            self._change = asyncio.Event()

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)

    def _enter_loop(self) -> None:
        """What belongs to an event loop is made in it."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._gate, self._probing, self._change = asyncio.Semaphore(self.choice.concurrency), asyncio.Lock(), asyncio.Event()
            self._loop = loop
            self._revivals: set[asyncio.Future] = set()


def _identity(info: dict[str, Any]) -> tuple[Any, ...]:
    """What another process at the same address would say otherwise."""
    return tuple(info.get(name) for name in ("version", "random_seed", "startup_time"))


def _raise_open_files(wanted: int) -> None:
    """A connection a request: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted + 1024 if hard == resource.RLIM_INFINITY else min(hard, wanted + 1024)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
