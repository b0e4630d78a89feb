"""Names the rank that a collective waits for in vain, and ends this process then. Needs no process group and no device.

Each rank counts the collectives and messages that it enters (:mod:`r1mega.mesh.operations`). A thread publishes the counts over a
connection of its own to the ranks' store, every second or oftener. A rank that has entered nothing new for
``launch.stall_timeout_seconds`` reads what the others have published: one whose count on a common line is lower has not reached an
operation that this rank has entered. The first rank that sees this leaves the verdict in the store; every rank prints it and ends.

What is no stall: a rank that works by itself, however long, while nobody waits for it. A rank whose process is seen to be gone
needs no timeout. A host that vanishes is known by its silence; the host that keeps the store, by the store's silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from r1mega.mesh import operations
from r1mega.mesh.operations import Record
from r1mega.mesh.rendezvous import Meeting, fresh_store

SILENT_BEATS = 4
"""Beats without a sign of life after which a rank counts as gone where an operation has failed."""

NETWORK_WORDS = ("closed by peer", "reset by peer", "Broken pipe", "refused", "timed out", "Timed out", "unreachable")
EXIT_STATUS = 1
MOST_NAMED = 4
"""Ranks that a verdict names."""

MOST_MEMBERS = 8
"""Ranks of a group that it names."""

Behind = dict[int, dict[int, tuple[str, int]]]


class Watch:
    """One rank's watcher. ``timeout``: seconds; 0 makes one that only explains failed operations."""

    def __init__(self, meeting: Meeting, timeout: float):
        self.meeting, self.timeout = meeting, timeout
        self.interval = min(1.0, timeout / 10) if timeout else 1.0
        self.record = Record(meeting.rank)
        self.lines = self.record.lines
        self.store = fresh_store(dataclasses.replace(meeting, store=meeting.store.clone()), "watch")
        self.heard = self.changed = time.monotonic()
        self.members: dict[str, tuple[int, ...]] = {}
        # rank to its last beat and when it was first seen; a rank that has not published counts from now on
        self.seen = {other: (0, time.monotonic()) for other in range(meeting.world_size) if other != meeting.rank}
        self.verdict, self.someone_left, self.told = "", False, False
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.threads = [threading.Thread(target=run, daemon=True, name=run.__name__) for run in (self._exchange, self._judge)]
        for thread in self.threads:
            thread.start()

    # The two threads: one may hang in the store, the other never waits.

    def _exchange(self) -> None:
        """Publish and listen, until the store is gone."""
        rank, beats = self.meeting.rank, itertools.count(1)
        published: set[str] = set()
        with contextlib.suppress(RuntimeError):  # its owner has gone: silence, which the other thread judges
            while not self.stopped.wait(self.interval):
                for key in set(self.lines) - published:
                    self.store.set(f"members {key}", json.dumps(self.lines[key].members))
                    published.add(key)
                self.store.set(f"state {rank}", json.dumps({"beat": next(beats), **self._state()}))
                if self.store.check(["verdict"]):
                    self.verdict = self.store.get("verdict").decode()
                self.someone_left = self.store.check(["left"])
                self.heard = time.monotonic()

    def _judge(self) -> None:
        """Once a beat: has this rank moved, has anybody left a verdict, is it time to look at the others?"""
        total, quiet, looked = -1, max(2 * self.interval, self.timeout / 3), 0.0
        patience = self.timeout - 3 * self.interval
        while not self.stopped.wait(self.interval):
            now = time.monotonic()
            if self.record.total != total:
                total, self.changed = self.record.total, now
            if self.verdict:
                self._end(self.verdict)
            if not self.timeout or not self.lines:
                continue
            idle = now - self.changed
            if idle > patience and now - self.heard > quiet:
                self._end(self._store_silent())
            # the more ranks read everything, the more rarely
            rest = self.interval * max(1.0, self.meeting.world_size / 64)
            someone_ended = idle > 2 * self.interval and (self.someone_left or self._gone_here())
            if (idle > quiet or someone_ended) and now - looked > rest:
                looked = now
                text = self._in_time(functools.partial(self._stalled, idle > patience))
                if text:
                    self._end(self._declare(text))

    def _in_time(self, act: Callable[[], Any]) -> Any:
        """``act`` in a thread that may hang; an empty text where it does not answer within some beats."""
        box: list[Any] = []

        def run() -> None:
            with contextlib.suppress(RuntimeError):
                box.append(act())

        helper = threading.Thread(target=run, daemon=True)
        helper.start()
        helper.join(4 * self.interval)
        return box[0] if box else ""

    # What the others say.

    def _states(self) -> dict[int, dict[str, Any]]:
        """Rank to its last published state, of those that have published; notes when each was seen to beat."""
        ranks = [rank for rank in range(self.meeting.world_size) if self.store.check([f"state {rank}"])]
        texts = self.store.multi_get([f"state {rank}" for rank in ranks]) if ranks else []
        states = {rank: json.loads(text) for rank, text in zip(ranks, texts, strict=True)}
        now = time.monotonic()
        for rank, state in states.items():
            if rank in self.seen and self.seen[rank][0] != state["beat"]:
                self.seen[rank] = (state["beat"], now)
        return states

    def _state(self) -> dict[str, Any]:
        """What this rank publishes: its counts, its last operation and since when it has entered no other."""
        counts = {key: line.count for key, line in list(self.lines.items())}
        record, idle = self.record, time.monotonic() - self.changed
        return {"idle": idle, "latest": record.latest, "line": record.latest_key, "counts": counts}

    def _gone_here(self) -> list[int]:
        """Ranks of this machine whose process is no more."""
        peers = self.meeting.peers
        mine = peers[self.meeting.rank]
        return [rank for rank, peer in enumerate(peers) if mine.place and peer.place == mine.place and not is_alive(peer.pid)]

    def _behind(self, states: dict[int, dict[str, Any]], lost: Iterable[int]) -> Behind:
        """Rank to the ranks that it is ahead of, each with the line and the number of the operation that is not reached.

        ``lost``: ranks whose last words may be a beat old, and that may have got further: what they do not reach is the last
        operation of who waits for them.
        """
        states[self.meeting.rank] = {"beat": 0, **self._state()}
        self.members |= {key: line.members for key, line in list(self.lines.items())}
        found: Behind = {}
        for rank, state in states.items():
            for key, count in state["counts"].items():
                if key not in self.members:
                    self.members[key] = tuple(json.loads(self.store.get(f"members {key}")))
                for other in self.members[key]:
                    reached = states[other]["counts"].get(key, 0) if other in states else 0
                    if other == rank or reached >= count:
                        continue
                    number = count if other in lost else reached + 1
                    if key == state["line"] or other not in found.get(rank, {}):
                        found.setdefault(rank, {})[other] = (key, number)
        return found

    def _stalled(self, is_late: bool) -> str:
        """Who is waited for in vain; empty where nobody is, or not for long enough (``is_late``) and nobody has ended."""
        states, left, gone = self._states(), self._left(), self._gone_here()
        rank, lost = self.meeting.rank, {*left, *gone, *self._silent()}
        behind = self._behind(states, lost)
        mine = behind.get(rank, {})
        if not mine or not (is_late or any(other in left or other in gone for other in mine)):
            return ""
        # who is waited for and waits for nobody is the cause; where all wait for each other, all are
        roots = [other for other in sorted(self._reachable(behind, rank)) if other not in behind or other in lost]
        return self._sentences(roots or sorted(mine), behind, states, left)

    @staticmethod
    def _reachable(behind: Mapping[int, Mapping[int, Any]], start: int) -> set[int]:
        found, todo = set(), [start]
        while todo:
            for other in behind.get(todo.pop(), {}):
                if other not in found:
                    found.add(other)
                    todo.append(other)
        return found

    def _sentences(self, ranks: Sequence[int], behind: Behind, states, left: Mapping[int, int]) -> str:
        """``rank 3 on host b did not reach all_reduce #12 of ranks 0, 3, which rank 0 on host a has entered; ...``, a few ranks."""
        return "; ".join(self._sentence(other, behind, states, left) for other in ranks[:MOST_NAMED])

    def _sentence(self, other: int, behind: Behind, states, left: Mapping[int, int]) -> str:
        waiting = next((rank for rank in sorted(behind) if other in behind[rank]), None)
        if waiting is None:  # it has entered what the others have entered, and ended inside
            key = self.record.latest_key
            what = self._what(key, self.lines[key].count) if key else "the first collective"
            return f"{self._who(other)} did not finish {what}; {self._why(other, states, left)}"
        key, number = behind[waiting][other]
        what = self._what(key, number, states[waiting]["latest"])
        return f"{self._who(other)} did not reach {what}, which {self._who(waiting)} has entered; {self._why(other, states, left)}"

    def _why(self, other: int, states: Mapping[int, Mapping[str, Any]], left: Mapping[int, int]) -> str:
        if other in left:
            return f"it has ended with status {left[other]}"
        if other in self._gone_here():
            return "its process is gone"
        if other in self._silent() or other not in states:
            return f"there is no sign of life of it since {time.monotonic() - self.seen[other][1]:.0f} s"
        idle = states[other]["idle"]
        return f"its process runs, and has entered no operation since {idle:.0f} s; its last one was {states[other]['latest']}"

    def _who(self, rank: int) -> str:
        return f"rank {rank} on host {self.meeting.peers[rank].host}"

    def _what(self, key: str, number: int, latest: str = "an operation") -> str:
        """``all_reduce #12 of ranks 0, 3``. ``latest``: what somebody does there, for a line that this rank is not part of."""
        name = self.lines[key].name_of(number) if key in self.lines else latest
        if ">" in key:
            return f"{name}, #{number} on its way"
        ranks = self.members.get(key) or self.lines[key].members
        shown = ", ".join(map(str, ranks[:MOST_MEMBERS])) + (", ..." if len(ranks) > MOST_MEMBERS else "")
        return f"{name} #{number} of ranks {shown}"

    def _left(self) -> dict[int, int]:
        """Rank to exit status, of those that have said that they end."""
        if not self.store.check(["left"]):
            return {}
        ranks = [rank for rank in range(self.meeting.world_size) if self.store.check([f"left {rank}"])]
        return {rank: int(self.store.get(f"left {rank}")) for rank in ranks}

    def _store_silent(self) -> str:
        what = self._what(self.record.latest_key, self.lines[self.record.latest_key].count)
        silent = time.monotonic() - self.heard
        return (
            f"{self._who(0)} did not reach {what}, which {self._who(self.meeting.rank)} has entered; the ranks' store at "
            f"{self.meeting.address} gives no answer since {silent:.0f} s: its host is gone, or the network to it"
        )

    # Ends.

    def _declare(self, text: str) -> str:
        """Leave ``text`` for all; the first one counts and comes back."""
        return self._in_time(lambda: self.store.compare_set("verdict", "", text).decode()) or text

    def _end(self, text: str) -> None:
        """Print the verdict and end this process, whatever its main thread hangs in."""
        with self.lock:
            if self.told:  # the main thread has found it, and ends by itself
                return
            print(message(text), file=sys.stderr, flush=True)
            sys.stdout.flush()
            time.sleep(2 * self.interval if self.meeting.rank == 0 else 0.0)  # others still read, and rank 0 may keep the store
            os._exit(EXIT_STATUS)

    def explain(self, error: BaseException) -> str | None:
        """Why an operation has failed: a verdict, or a rank that is gone. None for an error of this rank's own."""
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in NETWORK_WORDS):
            return None
        deadline = time.monotonic() + (SILENT_BEATS + 4) * self.interval
        while time.monotonic() < deadline:
            text = self.verdict or self._in_time(self._lost)
            if not text and self.record.latest_key and time.monotonic() - self.heard > SILENT_BEATS * self.interval:
                text = self._store_silent()
            if text:
                with self.lock:
                    self.told = True
                return message(self._declare(text))
            time.sleep(self.interval / 2)
        return None

    def _lost(self) -> str:
        """The sentence of the ranks that are gone, of those that this rank waits for if there are such."""
        states, left, gone = self._states(), self._left(), self._gone_here()
        ended = [other for other in left if other != self.meeting.rank]
        behind = self._behind(states, {*gone, *ended, *self._silent()})
        for lost in (gone, ended, self._silent()):
            waited = [other for other in lost if other in behind.get(self.meeting.rank, {})]
            if waited or lost:
                return self._sentences(waited or lost, {self.meeting.rank: behind.get(self.meeting.rank, {})}, states, left)
        return ""

    def _silent(self) -> list[int]:
        """Other ranks whose last sign of life is some beats old, as far as this rank has looked."""
        now, longest = time.monotonic(), SILENT_BEATS * self.interval
        return [rank for rank, (_, seen) in self.seen.items() if now - seen > longest]

    def leave(self, status: int) -> None:
        """Say that this process ends, so that nobody waits for it, and stop watching.

        Rank 0, which may keep the store, waits some beats for the others: they still read there why, and torch would tell them at
        length that it is gone.
        """
        self.stopped.set()

        def say() -> None:
            self.store.set(f"left {self.meeting.rank}", str(status))
            deadline = time.monotonic() + 3 * self.interval
            ended = self.store.add("left", 1)
            while self.meeting.rank == 0 and ended < self.meeting.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                ended = self.store.add("left", 0)

        self._in_time(say)


def message(text: str) -> str:
    """The line that a rank prints before it ends."""
    return f"launch: every rank reaches each collective; got {text}; the same command goes on from the last checkpoint"


def is_alive(pid: int) -> bool:
    """False for a process that is no more, or that has ended and waits to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True


_watch: Watch | None = None


def start(meeting: Meeting, timeout: float) -> None:
    """Watch the ranks of ``meeting`` from now on. All ranks call it equally often; alone there is nothing to watch."""
    global _watch
    stop()
    if meeting.world_size > 1:
        _watch = Watch(meeting, timeout)
        operations.install(_watch.record)


def stop() -> None:
    """End the watch; the process goes on."""
    global _watch
    if _watch is not None:
        _watch.stopped.set()
        for thread in _watch.threads:
            thread.join(timeout=2 * _watch.interval)
        operations.uninstall()
        _watch = None


def explain(error: BaseException) -> str | None:
    """The line that names the rank because of which ``error`` was raised, or None."""
    return None if _watch is None else _watch.explain(error)


def leave(status: int) -> None:
    """This process ends with ``status``."""
    if _watch is not None:
        _watch.leave(status)
