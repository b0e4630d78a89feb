"""engine.router: two real SGLang servers behind a real sglang-router, which chooses among them; runs ahead, pushes to both."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from r1mega.launch.local import free_port
from r1mega.rl.engine import EngineRuntime, SglangEngine
from r1mega.rl.engine.sglang.engine import ServedEngine
from r1mega.rl.engine.sglang.launch import LOOPBACK
from r1mega.rl.ledger import History
from r1mega.rl.loop import rl
from tests.rl.engine.test_sglang_grpo import config, place  # noqa: F401
from tests.rl.home import EOS, tiny_config
from tests.train.cases import lines

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Behind:
    """Two servers behind a router, all three running. ``choice``: the config's; ``engine``: it owns the servers; ``logs``: theirs."""

    choice: SglangEngine
    engine: ServedEngine
    logs: list[Path]


@pytest.fixture(scope="module")
def behind(sglang_python: str, tmp_path_factory) -> Iterator[Behind]:
    folder = tmp_path_factory.mktemp("router")
    choice = SglangEngine(python=sglang_python, servers=2, start_seconds=600)
    engine = choice.build(EngineRuntime(tiny_config(), eos_id=EOS, folder=str(folder)))
    urls, port = [server.url for server in engine.servers], free_port()
    command = [sglang_python, "-m", "sglang_router.launch_router", "--host", LOOPBACK, "--port", str(port)]
    command += ["--worker-urls", *urls, "--policy", "round_robin", "--prometheus-port", str(free_port())]
    log = open(folder / "router.log", "w")
    router = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        url, until = f"http://{LOOPBACK}:{port}", time.monotonic() + 120
        while not is_well(url):
            assert router.poll() is None and time.monotonic() < until, (folder / "router.log").read_text()[-2000:]
            time.sleep(0.5)
        yield Behind(SglangEngine(url=" ".join(urls), router=url), engine, [one.log for one in engine.fleet.owned])
    finally:
        router.kill()
        router.wait()
        log.close()
        engine.close()


def is_well(url: str) -> bool:
    """Whether a router has servers that answer."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.parametrize("lag", [0, 1])
def test_grpo_behind_a_router(place: Path, behind: Behind, tmp_path: Path, lag: int) -> None:  # noqa: F811
    settings = config(place, behind, tmp_path / "run", "tensor", rollouts=3 - lag, lag=lag)
    settings.engine = behind.choice
    before = [asked(log) for log in behind.logs]
    rl(settings)
    told = [line for line in lines(tmp_path / "run") if "event" not in line]
    assert [line["rollout"] for line in told] == [*range(1, 4 - lag)] and all(line["push_proof"] == "checksum" for line in told)
    if not lag:
        assert all(line["rollout_diff_max"] < 1e-3 and line["staleness_max"] == 0 for line in told)
    assert [server.get("/model_info")["weight_version"] for server in behind.engine.servers] == [str(4 * (3 - lag))] * 2, (
        "both have the last push"
    )
    assert all(asked(log) >= was + 25 for log, was in zip(behind.logs, before, strict=True)), "of 96 or 64 responses"
    history = History(tmp_path / "run/ledger")
    assert history.audit() == [] and sorted(history.uses()) == [*range(1, 4 - lag)]


def asked(log: Path) -> int:
    """Requests that a server has answered."""
    return log.read_text(encoding="utf-8", errors="replace").count("POST /generate")
