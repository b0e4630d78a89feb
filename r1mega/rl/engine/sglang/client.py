"""One SGLang server as the trainer sees it: requests by HTTP, in asyncio and in a plain thread; every failure names the server.

In: paths and JSON objects. Out: JSON values or text, or :class:`EngineError`. Knows what /server_info says and which version
speaks how (:mod:`features`); knows neither sampling nor weights. Imports the standard library alone.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from r1mega.config.errors import UserError, shown
from r1mega.rl.engine.sglang import http
from r1mega.rl.engine.sglang.features import Features

PROBE_SECONDS = 20.0


class EngineError(UserError):
    """A request that a server did not do. ``server``: its URL; ``path``; ``status``: of HTTP, 0 where no answer came; ``message``:
    what the server or the network said."""

    def __init__(self, server: str, path: str, status: int, message: str, way_out: str = "see the server's log"):
        self.server, self.path, self.status, self.message = server, path, status, message
        said = f"status {status}: {shown(message)}" if status else shown(message)
        super().__init__(f"engine=sglang: {server}{path} does what it is asked; got {said}; {way_out}")

    @property
    def is_lost(self) -> bool:
        """Whether the server did not answer at all."""
        return self.status == 0


class Server:
    """A server that answers at ``url``.

    ``info``: of /server_info, read by :meth:`open`; ``version``: SGLang's; ``features``; ``tp_size``, ``dp_size`` and ``pp_size``.
    ``post`` and ``get`` block the thread that calls and may be called from any; ``apost``, ``aget`` and ``generate`` belong to the
    event loop that runs.
    """

    def __init__(self, url: str, api_key: str = ""):
        self._headers = (("Authorization", f"Bearer {api_key}"),) if api_key else ()
        try:
            self.address = http.Address.of(url, self._headers)
        except ValueError:
            raise UserError(
                f"engine.url: http://HOST:PORT of a server; got {url!r}; write engine.url=http://127.0.0.1:30000"
            ) from None
        self.url = url.rstrip("/")
        self.pool = http.Pool(self.address)
        self.info: dict[str, Any] = {}
        self.features: Features | None = None
        self.generation = 0  # of the process behind the address: one more after each restart

    @classmethod
    def open(cls, url: str, api_key: str = "", timeout_seconds: float = PROBE_SECONDS) -> Server:
        """The server at ``url`` with what it says of itself."""
        server = cls(url, api_key)
        server.read_info(timeout_seconds)
        return server

    def read_info(self, timeout_seconds: float = PROBE_SECONDS) -> None:
        """Read /server_info (again: after a restart)."""
        info = self.get("/server_info", timeout_seconds)
        if not isinstance(info, dict):
            raise EngineError(self.url, "/server_info", 200, f"no JSON object: {shown(info)}", "give the URL of an SGLang server")
        self.info, self.features = info, Features.of(info, f"engine.url {self.url}")

    def move(self, url: str) -> None:
        """Another process at another address takes this one's place; requests under way fail. From any thread."""
        old, address = self.pool, http.Address.of(url, self._headers)
        self.url, self.address, self.pool = url.rstrip("/"), address, http.Pool(address)
        old.abandon()

    @property
    def version(self) -> str:
        """SGLang's version."""
        return self.features.version

    @property
    def tp_size(self) -> int:
        """Tensor parallel ranks: entries of an update by tensor."""
        return int(self.info.get("tp_size", 1))

    @property
    def dp_size(self) -> int:
        """Data parallel ranks."""
        return int(self.info.get("dp_size", 1))

    @property
    def pp_size(self) -> int:
        """Pipeline parallel ranks."""
        return int(self.info.get("pp_size", 1))

    def post(self, path: str, body: dict[str, Any] | None = None, timeout_seconds: float = 600) -> Any:
        """The answer as JSON, or as text where it is none. Raises EngineError where the status is not 200 or success is false."""
        return self._sync("POST", path, body if body is not None else {}, timeout_seconds)

    def get(self, path: str, timeout_seconds: float = PROBE_SECONDS) -> Any:
        """As :meth:`post`, without a body."""
        return self._sync("GET", path, None, timeout_seconds)

    async def apost(self, path: str, body: dict[str, Any] | None = None, timeout_seconds: float = 600) -> Any:
        """As :meth:`post`, in asyncio; never sent twice."""
        return await self._async("POST", path, body if body is not None else {}, timeout_seconds, fresh=True)

    async def aget(self, path: str, timeout_seconds: float = PROBE_SECONDS) -> Any:
        """As :meth:`get`, in asyncio."""
        return await self._async("GET", path, None, timeout_seconds, fresh=True)

    async def generate(self, body: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """One /generate, on a kept connection. Cancelling it closes the connection, and the server then ends the request."""
        answer = await self._async("POST", "/generate", body, timeout_seconds, fresh=False)
        if not isinstance(answer, dict):
            raise EngineError(self.url, "/generate", 200, f"no JSON object: {shown(answer)}")
        return answer

    def drain(self, timeout_seconds: float = 60) -> None:
        """Wait until nothing runs or waits, and forget the cached prefixes. Before any update: a server below 0.5.22 dies of an
        update whose flush meets a request, and the last answer may be out before its request is put away."""
        self.post(f"/flush_cache?timeout={timeout_seconds:g}", None, timeout_seconds + PROBE_SECONDS)

    def is_healthy(self, timeout_seconds: float = 2.0) -> bool:
        """Whether it answers, without a request to the model."""
        try:
            self.get("/model_info", timeout_seconds)
        except UserError:
            return False
        return True

    def close(self) -> None:
        """Give back the idle connections."""
        self.pool.close()

    def _sync(self, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float) -> Any:
        try:
            return self._open_answer(path, http.ask(self.address, method, path, _bytes(body), timeout_seconds))
        except OSError as error:
            raise self._lost(path, error, timeout_seconds) from error

    async def _async(self, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float, *, fresh: bool) -> Any:
        try:
            return self._open_answer(path, await self.pool.ask(method, path, _bytes(body), timeout_seconds, fresh=fresh))
        except OSError as error:
            raise self._lost(path, error, timeout_seconds) from error

    def _open_answer(self, path: str, answer: http.Answer) -> Any:
        text = answer.body
        value: Any = None
        try:
            value = json.loads(text) if "json" in answer.kind else text.decode("utf-8", "replace")
        except ValueError:
            raise EngineError(self.url, path, answer.status, f"JSON that cannot be read: {text[:80]!r}") from None
        if answer.status != 200:
            raise EngineError(self.url, path, answer.status, _said(value) or "an empty answer")
        if isinstance(value, dict) and value.get("success") is False:
            raise EngineError(self.url, path, answer.status, _said(value) or "success is false")
        return value

    def _lost(self, path: str, error: OSError, timeout_seconds: float) -> EngineError:
        if isinstance(error, TimeoutError | asyncio.TimeoutError | socket.timeout):
            return EngineError(
                self.url, path, 0, f"no answer in {timeout_seconds:g} s", "raise the time limit or see the server's log"
            )
        said = str(error) or type(error).__name__
        return EngineError(self.url, path, 0, f"no answer ({said})", "see that it runs, and its log")


def _bytes(body: dict[str, Any] | None) -> bytes | None:
    return None if body is None else json.dumps(body, separators=(",", ":")).encode()


def _said(value: Any) -> str:
    """What a failed answer says, in its several forms."""
    if isinstance(value, dict):
        inner = value.get("error", value)
        if isinstance(inner, dict):
            return str(inner.get("message") or inner.get("detail") or inner)
        return str(inner)
    return str(value or "").strip()
