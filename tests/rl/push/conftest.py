"""One real SGLang server a session, on a CPU with a small model, and two sets of weights for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.engine.contract import EngineRuntime
from r1mega.rl.engine.sglang import SglangEngine
from r1mega.rl.push import PushRuntime
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


@contextlib.contextmanager
def serving(folder: Path, **knobs: Any) -> Iterator[Served]:
    """A server of our own; skips where there is no environment for it."""
    try:
        engine = SglangEngine(**knobs).build(EngineRuntime(CONFIG, folder=str(folder)))
    except UserError as error:
        if "make sglang" in str(error) and not os.environ.get("R1MEGA_CI"):
            pytest.skip("no .venv-sglang: make sglang")
        raise
    try:
        yield Served(engine, PushRuntime(engine, CONFIG, lambda: engine.servers, folder=folder / "versions"))
    finally:
        engine.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("push")) as made:
        yield made


@pytest.fixture
def cut_in_two(tmp_path) -> Iterator[Served]:
    """A server of two tensor parallel ranks."""
    with serving(tmp_path, args={"tp_size": 2}, environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}) as made:
        yield made
