"""One real SGLang server a session, on a CPU with a small model, and two sets of weights for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
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


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Served:
    folder = tmp_path_factory.mktemp("push")
    try:
        engine = SglangEngine().build(EngineRuntime(CONFIG, folder=str(folder)))
    except UserError as error:
        if "make sglang" in str(error) and not os.environ.get("R1MEGA_CI"):
            pytest.skip("no .venv-sglang: make sglang")
        raise
    try:
        yield Served(engine, PushRuntime(engine, CONFIG, lambda: engine.servers, folder=folder / "versions"))
    finally:
        engine.close()
