"""Pushes to the session's SGLang server, and to one of two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from r1mega.rl.engine.contract import EngineRuntime
from r1mega.rl.engine.sglang import SglangEngine
from r1mega.rl.push import PushRuntime
from tests.rl.home import Home
from tests.rl.push.cases import CONFIG, SETS


@dataclass
class Served:
    """A server, what a push to it is built from, and pushes' numbers."""

    engine: Any
    runtime: PushRuntime
    number: int = 0

    @property
    def server(self):
        return self.engine.servers[0]

    @property
    def label(self) -> str:
        return self.server.get("/model_info")["weight_version"]

    def next(self) -> tuple[list, int]:
        """Weights that are not those of the last time, and a version for them."""
        self.number += 1
        return SETS[self.number % 2], self.number


def over(engine: Any, folder: Path) -> Served:
    """Pushes to the servers of ``engine``."""
    return Served(engine, PushRuntime(engine, CONFIG, lambda: engine.servers, folder=folder / "versions"))


@pytest.fixture(scope="session")
def served(home: Home, tmp_path_factory) -> Served:
    return over(home.engine, tmp_path_factory.mktemp("push"))


@pytest.fixture
def cut_in_two(sglang_python: str, tmp_path) -> Iterator[Served]:
    """A server of two tensor parallel ranks."""
    cut = {"args": {"tp_size": 2}, "environment": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}}
    engine = SglangEngine(python=sglang_python, **cut).build(EngineRuntime(CONFIG, folder=str(tmp_path)))
    try:
        yield over(engine, tmp_path)
    finally:
        engine.close()
