"""Servers that the runtime starts: the engine reads where they are from a file, follows one to another address, and loses no request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.engine import EngineRuntime, SglangEngine
from r1mega.rl.engine.sglang import roster
from tests.rl.engine.fake import FakeServer, serving
from tests.rl.engine.test_sglang_fake import EOS, HF, ask, expected, run


def tell(path: Path, *servers: tuple[str, int, bool], failure: str = "") -> None:
    """Write the table as the runtime does: (URL, start, is it alive) each."""
    entries = [{"url": url, "start": start, "alive": alive} for url, start, alive in servers]
    roster.write(path, {"servers": entries, "failure": failure})


async def until(what) -> None:
    while not what():
        await asyncio.sleep(0.02)


async def engine(path: Path, monkeypatch, **knobs):
    monkeypatch.setenv(roster.VARIABLE, str(path))
    return await asyncio.to_thread(SglangEngine(**knobs).build, EngineRuntime(HF, device="cpu", eos_id=EOS))


@run
async def test_a_server_that_comes_back_elsewhere_gets_its_requests(tmp_path: Path, monkeypatch) -> None:
    """The machine of the first is gone: it closes no connection. Until the second has got a push it serves nothing."""
    path, first, second = tmp_path / "servers", FakeServer(), FakeServer()
    async with serving(first), serving(second):
        tell(path, (first.url, 1, True))
        served = await engine(path, monkeypatch)
        assert roster.read(tmp_path / "servers.wanted") == {"hf_config": HF, "device": "cpu", "dtype": "float32"}
        assert roster.read(tmp_path / "servers.seen") == [1] and served.version == -1
        served.version = 4
        assert (await served.complete(ask())).token_ids == expected(6)
        first.hold = 1 << 30  # it never answers again
        waiting = asyncio.create_task(served.complete(ask(5)))
        await until(lambda: first.paths.count("/generate") == 4)  # two of them looked at the temperature
        generation = served.servers[0].generation
        tell(path, (first.url, 1, False))
        await until(lambda: served.counts["deaths"] == 1)
        assert served.servers == [] and roster.read(tmp_path / "servers.seen") == [0]
        tell(path, (second.url, 2, True))
        await until(lambda: served.stale)
        assert [server.url for server in served.stale] == [second.url] and served.stale[0].generation == generation + 1
        await asyncio.sleep(0.1)
        assert "/generate" not in second.paths and not waiting.done()
        served.version = 6
        done = await waiting
        assert done.token_ids == expected(5) and done.versions == ((6, 0, 5),)
        assert roster.read(tmp_path / "servers.seen") == [2]
        first.hold = 0
        served.close()


@run
async def test_a_start_that_was_missed_counts_as_a_death(tmp_path: Path, monkeypatch) -> None:
    """Between two looks a server has died and come back at the same address: its weights are gone."""
    path, fake = tmp_path / "servers", FakeServer()
    async with serving(fake):
        tell(path, (fake.url, 1, True))
        served = await engine(path, monkeypatch)
        served.version = 4
        tell(path, (fake.url, 2, True))
        await until(lambda: served.stale)
        assert served.counts["deaths"] == 1 and served.version == -1
        served.close()


@run
async def test_the_runtimes_failure_ends_the_wait(tmp_path: Path, monkeypatch) -> None:
    path, fake = tmp_path / "servers", FakeServer()
    tell(path, failure="engine=sglang: server 0 starts; got status 3")
    with pytest.raises(UserError, match="server 0 starts; got status 3"):
        await engine(path, monkeypatch)
    async with serving(fake):
        tell(path, (fake.url, 1, True))
        served = await engine(path, monkeypatch)
        tell(path, (fake.url, 1, False), failure="engine.restarts: at most 0 in a run")
        with pytest.raises(UserError, match="engine.restarts: at most 0"):
            await served.complete(ask())
        served.close()
    path.unlink()
    monkeypatch.setattr(roster, "MARGIN_SECONDS", 0.0)
    with pytest.raises(UserError, match="engine.start_seconds: the runtime starts the servers; got none in 1 s"):
        await engine(path, monkeypatch, start_seconds=1.0)
