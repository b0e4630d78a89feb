"""A small HTTP server in this process that speaks the part of SGLang's contract that the engine uses, and can be told to misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

INFO = {"version": "0.5.16", "tp_size": 1, "dp_size": 1, "pp_size": 1, "random_seed": 7, "skip_tokenizer_init": True}
LETTERS = list(range(10, 60))


class FakeServer:
    """``info``: what /server_info says; ``spoil``: changes an answer of /generate; ``token_seconds``: of one token; ``hold``: requests
    that must be there before any is answered; ``paths``: what was asked for, in order, with ``bodies``; ``fail``: path to
    (status, JSON) answered instead; ``drop``: connections to close before an answer."""

    def __init__(self, **info: Any):
        self.info = INFO | info
        self.spoil: Callable[[dict], dict] = lambda answer: answer
        self.token_seconds = 0.0
        self.hold = 0
        self.label = "default"
        self.paths: list[str] = []
        self.bodies: list[dict] = []
        self.fail: dict[str, tuple[int, Any]] = {}
        self.drop = 0
        self.chunked = False
        self.raw_logprobs = False
        self.running: dict[str, asyncio.Event] = {}
        self.most_running = 0
        self.connections = 0
        self.url = ""
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> FakeServer:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, backlog=2048)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def stop(self) -> None:
        """Stop listening; requests that run are dropped."""
        self.drop = 1 << 30
        for event in self.running.values():
            event.set()
        self._server.close()
        await asyncio.sleep(0.02)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split(" ", 2)
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, value = await self._answer(path, json.loads(body) if body else {})
                if self.drop > 0:
                    self.drop -= 1
                    break
                self._write(writer, status, value)
                await writer.drain()
                if headers.get("connection") == "close":
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _write(self, writer: asyncio.StreamWriter, status: int, value: Any) -> None:
        kind = "text/plain; charset=utf-8" if isinstance(value, str) else "application/json"
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} OK\r\nContent-Type: {kind}\r\n"
        if not self.chunked:
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            return
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for start in range(0, len(data), 7):
            part = data[start : start + 7]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        writer.write(b"0\r\n\r\n")

    async def _answer(self, path: str, body: dict) -> tuple[int, Any]:
        self.paths.append(path)
        self.bodies.append(body)
        if path in self.fail:
            return self.fail[path]
        if path == "/server_info":
            return 200, self.info
        if path == "/model_info":
            return 200, {"weight_version": self.label}
        if path == "/generate":
            return 200, self.spoil(await self._generate(body))
        if path == "/abort_request":
            for name, event in self.running.items():
                if body.get("abort_all") or name == body.get("rid"):
                    event.set()
            return 200, ""
        return 200, {"success": True, "message": "done"}

    async def _generate(self, body: dict) -> dict:
        stopped = self.running[body.get("rid", "probe")] = asyncio.Event()
        self.most_running = max(self.most_running, len(self.running))
        while len(self.running) < self.hold:
            await asyncio.sleep(0.02)
        self.hold = 0
        sampling, tokens = body["sampling_params"], []
        scale = 1.0 if self.raw_logprobs else sampling["temperature"] or 1.0
        while len(tokens) < sampling["max_new_tokens"] and not stopped.is_set():
            if self.token_seconds:
                await asyncio.sleep(self.token_seconds)
            tokens.append(LETTERS[(len(body["input_ids"]) + len(tokens)) % len(LETTERS)])
        self.running.pop(body.get("rid", "probe"), None)
        whole = len(tokens) == sampling["max_new_tokens"]
        top = [[[-0.5 * rank / scale, rank, None] for rank in range(1, 17)]]
        return {
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "length", "length": len(tokens)} if whole else {"type": "abort", "message": "Aborted"},
                "prompt_tokens": len(body["input_ids"]),
                "weight_version": self.label,
                "output_token_logprobs": [[-1.0 / token, token, None] for token in tokens],
                "output_top_logprobs": top if body.get("top_logprobs_num") else None,
            },
        }


@asynccontextmanager
async def serving(*fakes: FakeServer) -> AsyncIterator[None]:
    """All of them listen inside."""
    for fake in fakes:
        await fake.start()
    try:
        yield
    finally:
        for fake in fakes:
            await fake.stop()
