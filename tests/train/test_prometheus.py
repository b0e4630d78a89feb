"""The endpoint for Prometheus: scraped in this process over HTTP, its text read back as a scraper reads it."""

from __future__ import annotations

import http.client
import math
import re
import socket

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.config.run import LogConfig
from r1mega.config.train import PretrainConfig, TokenDataConfig
from r1mega.train.metrics import Metrics
from r1mega.train.prometheus import CONTENT_TYPE, COUNTERS, Exporter

ROW = re.compile(r'([a-z_A-Z][a-zA-Z0-9_]*)\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (\S+)')


def scrape(port: int, path: str = "/metrics") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.text = answer.read().decode()
    connection.close()
    return answer


def parsed(text: str) -> dict[tuple[str, str], float]:
    """(name, labels) to value. Each family has its HELP and TYPE lines first and stands in one piece."""
    found, kind_of, family = {}, {}, ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert len(line.split(maxsplit=3)) == 4 and family not in kind_of
            kind_of[family] = next(lines).removeprefix(f"# TYPE {family} ")
            assert kind_of[family] in ("gauge", "counter") and (kind_of[family] == "counter") == family.endswith("_total")
            continue
        name, labels, value = ROW.fullmatch(line).groups()
        assert name == family and name.startswith("r1mega_") and (name, labels) not in found
        found[name, labels] = float(value)
    return found


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture
def exporter():
    made = Exporter("127.0.0.1", free_port(), 'a "run"\\here')
    yield made
    made.close()


def test_the_newest_line_and_the_counters(exporter) -> None:
    run = r'run="a \"run\"\\here"'
    first = scrape(exporter.port)
    assert first.status == 200 and first.getheader("Content-Type") == CONTENT_TYPE
    assert parsed(first.text) == {(f"r1mega_{name}_total", run): 0.0 for name in COUNTERS}, "no line yet"
    exporter.line({"loss": 3.0, "gone": 1})
    exporter.line(
        {
            "rollout": 4, "loss": float("nan"), "top": math.inf, "low": -math.inf, "reward": 0.1 + 0.2, "push_proof": "checksum",
            "expert_load": [[1.0]], "flag": True, "reward/gsm8k": 0.5, "reward/a\nb": 1.0, "odd key-1": 2,
        }
    )  # fmt: skip
    exporter.count(rollouts=1, samples=8)
    exporter.count(samples=8, engine_deaths=1)
    found = parsed(scrape(exporter.port).text)
    assert math.isnan(found.pop(("r1mega_loss", run))) and found.pop(("r1mega_line_timestamp_seconds", run)) > 1.7e9
    assert found == {
        ("r1mega_rollouts_total", run): 1.0,
        ("r1mega_samples_total", run): 16.0,
        ("r1mega_reward_failures_total", run): 0.0,
        ("r1mega_engine_deaths_total", run): 1.0,
        ("r1mega_events_total", run): 0.0,
        ("r1mega_rollout", run): 4.0,
        ("r1mega_top", run): math.inf,
        ("r1mega_low", run): -math.inf,
        ("r1mega_reward", run): 0.1 + 0.2,
        ("r1mega_reward_by_source", f'{run},source="gsm8k"'): 0.5,
        ("r1mega_reward_by_source", f'{run},source="a\\nb"'): 1.0,
        ("r1mega_odd_key_1", run): 2.0,
    }


def test_other_paths_and_a_port_that_is_free_again(exporter) -> None:
    assert scrape(exporter.port, "/metrics?name=x").status == 200
    other = scrape(exporter.port, "/")
    assert other.status == 404 and "/metrics" in other.text
    exporter.close()
    exporter.close()
    with pytest.raises(OSError):
        scrape(exporter.port)
    again = Exporter("127.0.0.1", exporter.port, "next")
    assert 'run="next"' in scrape(again.port).text
    again.close()


def test_a_taken_port_is_refused_by_name(exporter) -> None:
    got = f"127.0.0.1:{exporter.port}, which cannot be opened (Address already in use)"
    with pytest.raises(UserError) as told:
        Exporter("127.0.0.1", exporter.port, "second")
    assert str(told.value) == f"log.prometheus_port: a free port; got {got}; give another one, or 0 for none"


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="log.prometheus_port: from 0 to 65535; got 70000; "):
        compose("pretrain", ["log.prometheus_port=70000", "data.train={x: 1}", "data.sequence_length=64", "trainer.steps=3000"])


def test_every_training_command_serves_its_metrics(tmp_path) -> None:
    port = free_port()
    config = PretrainConfig(name="mine", data=TokenDataConfig(train={"x": 1.0}), log=LogConfig(prometheus_port=port))
    quiet = Metrics(tmp_path / "quiet", "step", 3, 0, active=False, config=config)
    quiet.count(events=1)  # another rank's
    quiet.close()
    (tmp_path / "run").mkdir()
    metrics = Metrics(tmp_path / "run", "step", 3, 0, active=True, config=config)
    metrics.log({"step": 1, "loss": 2.5})
    metrics.event("step skipped", 2, "loss nan")
    found = parsed(scrape(port).text)
    assert (found["r1mega_step", 'run="mine"'], found["r1mega_loss", 'run="mine"']) == (1.0, 2.5)
    assert found["r1mega_events_total", 'run="mine"'] == 1.0
    metrics.close()
    with pytest.raises(OSError):
        scrape(port)
