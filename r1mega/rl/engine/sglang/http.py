"""HTTP/1.1 with JSON for thousands of requests side by side: a small client over asyncio, and the same for a plain thread.

In: method, path, body as bytes. Out: status, content type, body. One connection a request under way, kept for the next one while
it is young. Refuses nothing of its own; what the network does comes as OSError, silence as TimeoutError. Knows no SGLang.

Written here because no HTTP library is among the dependencies, and because it is on the way of every token: an answer is parsed
once, when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ssl
import time
import weakref
from dataclasses import dataclass
from urllib.parse import urlsplit

IDLE_SECONDS = 2.0
"""Age at which an idle connection is not used again; SGLang's server closes them after 5."""
CONNECT_SECONDS = 20.0
SENDING_AT_ONCE = 512
"""Connections being opened side by side; a server's queue of unanswered ones is some thousands."""


@dataclass(frozen=True)
class Answer:
    """``status``: of HTTP; ``kind``: content type, lower case; ``body``: as it came, not compressed."""

    status: int
    kind: str
    body: bytes


@dataclass(frozen=True)
class Address:
    """Where a server listens. ``prefix``: path in front of all others; ``headers``: lines sent with every request."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, url: str, headers: tuple[tuple[str, str], ...] = ()) -> Address:
        """From ``http://HOST:PORT`` or https. Raises ValueError for anything else."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(url)
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"), headers)

    def head(self, method: str, path: str, size: int, *, keep: bool) -> bytes:
        """The request's lines in front of a body of ``size`` bytes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", "Accept: application/json"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {size}"]
        if not keep:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def ask(address: Address, method: str, path: str, body: bytes | None, timeout_seconds: float) -> Answer:
    """One request in this thread, on a connection of its own."""
    kind = http.client.HTTPSConnection if address.tls else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=timeout_seconds)
    try:
        headers = dict(address.headers) | {"Accept": "application/json", "Connection": "close"}
        if method == "POST":
            headers["Content-Type"] = "application/json"
        connection.request(method, address.prefix + path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, (answer.headers.get("Content-Type") or "").lower(), answer.read())
    except http.client.HTTPException as error:
        raise ConnectionError(f"no whole answer ({type(error).__name__})") from error
    finally:
        connection.close()


class Pool:
    """Connections to one address, those of each event loop apart. Not for use by several threads at once."""

    def __init__(self, address: Address):
        self.address = address
        self._idle: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[_Connection]] = weakref.WeakKeyDictionary()
        self._gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()
        self._tls = ssl.create_default_context() if address.tls else None
        self._open_ones: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.WeakSet] = weakref.WeakKeyDictionary()

    async def ask(self, method: str, path: str, body: bytes | None, timeout_seconds: float, *, fresh: bool = False) -> Answer:
        """One request. ``fresh``: on a new connection, for what must not be sent twice; others are sent again where a kept
        connection turns out to be closed before a byte has come. Cancelling it closes its connection.
        """
        async with asyncio.timeout(timeout_seconds):
            while True:
                connection, kept = (None if fresh else self._take()), True
                if connection is None:
                    connection, kept = await self._open(), False
                try:
                    answer = await connection.ask(self.address.head(method, path, len(body or b""), keep=not fresh), body)
                except ConnectionError:
                    if kept and connection.silent:
                        continue
                    raise
                finally:
                    connection.finish(None if fresh else self._idle.setdefault(asyncio.get_running_loop(), []))
                return answer

    def _take(self) -> _Connection | None:
        idle = self._idle.get(asyncio.get_running_loop(), [])
        while idle:
            connection = idle.pop()
            if connection.is_young():
                return connection
            connection.close()
        return None

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        gate = self._gates.setdefault(loop, asyncio.Semaphore(SENDING_AT_ONCE))
        async with gate, asyncio.timeout(CONNECT_SECONDS):
            _, connection = await loop.create_connection(_Connection, self.address.host, self.address.port, ssl=self._tls)
            self._open_ones.setdefault(loop, weakref.WeakSet()).add(connection)
            return connection

    def abandon(self) -> None:
        """From any thread: requests under way fail now. A machine that is gone closes no connection."""

        def fail(connections: weakref.WeakSet) -> None:
            for connection in list(connections):
                connection._fail(ConnectionResetError("the server is gone"))

        for loop, connections in list(self._open_ones.items()):
            with contextlib.suppress(RuntimeError):  # closed
                loop.call_soon_threadsafe(fail, connections)

    def close(self) -> None:
        """Close the idle connections of loops that still run."""
        for loop, idle in list(self._idle.items()):
            while idle:
                connection = idle.pop()
                if not loop.is_closed():
                    connection.close()


class _Connection(asyncio.Protocol):
    """One request at a time; keeps its bytes until the answer is whole."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.waiting: asyncio.Future[Answer] | None = None
        self.lost = False
        self.done_at = 0.0
        self._forget()

    def _forget(self) -> None:
        self.data, self.status, self.kind = bytearray(), 0, ""
        self.size: int | None = None  # of the body; -1: until the connection is closed; -2: in chunks
        self.start = self.place = 0  # of the body; of the next chunk
        self.parts: list[bytes] = []
        self.keep = True

    @property
    def silent(self) -> bool:
        """Whether no byte of an answer has come."""
        return not self.data and not self.status

    def is_young(self) -> bool:
        """Whether it may be used again."""
        return not self.lost and not self.transport.is_closing() and time.monotonic() - self.done_at < IDLE_SECONDS

    def connection_made(self, transport) -> None:
        self.transport = transport

    async def ask(self, head: bytes, body: bytes | None) -> Answer:
        self._forget()
        if self.lost:
            raise ConnectionResetError("connection closed")
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(head + body if body and len(body) < 1 << 16 else head)
        if body and len(body) >= 1 << 16:
            self.transport.write(body)
        return await self.waiting

    def finish(self, idle: list[_Connection] | None) -> None:
        """After an answer: keep it in ``idle``; after anything else, or with None, close it."""
        whole = self.waiting is not None and self.waiting.done() and not self.waiting.cancelled() and not self.waiting.exception()
        self.waiting = None
        if idle is None or not whole or not self.keep or self.lost:
            self.close()
        else:
            self.done_at = time.monotonic()
            idle.append(self)

    def close(self) -> None:
        self.lost = True
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.waiting is None or self.waiting.done():
            self.close()  # something that nobody has asked for
            return
        self.data += data
        try:
            self._read()
        except ValueError as error:
            self._fail(ConnectionError(f"no HTTP answer ({error})"))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.waiting is not None and not self.waiting.done() and self.size == -1:
            self._give(bytes(self.data[self.start :]))
        else:
            self._fail(ConnectionResetError("connection closed before a whole answer"))

    def _fail(self, error: Exception) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(error)

    def _give(self, body: bytes) -> None:
        self.waiting.set_result(Answer(self.status, self.kind, body))

    def _read(self) -> None:
        while self.size is None:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(bytes(self.data[:end]).decode("latin-1"))
            self.start = self.place = end + 4
            if 100 <= self.status < 200:  # "100 Continue": the answer comes behind it
                del self.data[: self.start]
                self.size = None
        if self.size >= 0 and len(self.data) - self.start >= self.size:
            self._give(bytes(self.data[self.start : self.start + self.size]))
        elif self.size == -2:
            self._read_chunks()

    def _read_head(self, text: str) -> None:
        first, *lines = text.split("\r\n")
        protocol, status = first.split(" ", 2)[:2]
        if not protocol.startswith("HTTP/1."):
            raise ValueError(first[:40])
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status, self.kind = int(status), fields.get("content-type", "").lower()
        self.keep = protocol == "HTTP/1.1" and fields.get("connection", "").lower() != "close"
        if fields.get("transfer-encoding", "").lower() == "chunked":
            self.size = -2
        elif "content-length" in fields:
            self.size = int(fields["content-length"])
        else:
            self.size = 0 if self.status in (204, 304) else -1

    def _read_chunks(self) -> None:
        while True:
            end = self.data.find(b"\r\n", self.place)
            if end < 0:
                return
            size = int(bytes(self.data[self.place : end]).split(b";")[0], 16)
            if len(self.data) < end + 2 + size + 2:
                return
            if size == 0:
                self._give(b"".join(self.parts))
                return
            self.parts.append(bytes(self.data[end + 2 : end + 2 + size]))
            self.place = end + 2 + size + 2
