"""One real SGLang server for a session, of the ``tiny`` model in fp32: what the tests of the engine and those of pushes share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.engine import EngineRuntime, SglangEngine
from r1mega.rl.engine.sglang import launch
from tests.rl.home import EOS, Home, tiny_config, write_model


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """The interpreter of ``make sglang``, or of another SGLang by R1MEGA_TEST_SGLANG. CI must have one; elsewhere tests are
    skipped without it."""
    try:
        return launch.interpreter(os.environ.get("R1MEGA_TEST_SGLANG"))
    except UserError as error:
        if "R1MEGA_CI" in os.environ:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def home(sglang_python: str, tmp_path_factory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("sglang")
    config = tiny_config()
    runtime = EngineRuntime(config, eos_id=EOS, folder=str(folder))
    engine = SglangEngine(python=sglang_python, start_seconds=400, routed_experts=True).build(runtime)
    try:
        models = [write_model(config, seed, folder / f"model{seed}") for seed in range(2)]
        made = Home(engine, runtime, config, models, [folder / "model0", folder / "model1"], folder)
        made.load(0, version=0)
        yield made
    finally:
        engine.close()
