"""engine=sglang on a real server: log-probabilities against transformers and the local engine, ends, pauses, updates, deaths, doctor."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1mega.compat import sglang_server
from r1mega.config.errors import UserError
from r1mega.config.run import SamplingConfig
from r1mega.model.names import from_hf
from r1mega.model.published import model_of
from r1mega.rl.batch import RolloutRow, microbatches
from r1mega.rl.engine import LocalEngine, Request, SglangEngine
from r1mega.rl.engine.sglang import launch, probe
from r1mega.rl.engine.sglang.client import EngineError
from r1mega.rl.engine.sglang.features import NEED_VERSION
from r1mega.rl.routing import RoutingShape, Scoring
from r1mega.rl.types import Completion
from r1mega.testing.contracts import checkpoint_tensors
from r1mega.train.policy import Policy
from tests.rl.home import EOS, Home
from tests.train.cases import one_rank

PROMPTS = [[5, 9, 11], [7], [5, 9, 11], [8, 8, 2, 40, 41, 42, 43, 44, 45], [300, 60], [5, 9, 11]]


def rescored(model, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    tokens = torch.tensor(completion.token_ids)[:, None]
    return torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, tokens)[:, 0]


def complete(home: Home, prompts: list[list[int]], **sampling) -> list[Completion]:
    async def go():
        asked = SamplingConfig(**sampling)
        return await asyncio.gather(*(home.engine.complete(Request(prompt, asked, 1)) for prompt in prompts))

    return asyncio.run(asyncio.wait_for(go(), 120))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models(home: Home, temperature: float) -> None:
    home.load(0, version=3)
    done = complete(home, PROMPTS, temperature=temperature, max_new_tokens=24)
    for prompt, one in zip(PROMPTS, done, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logprobs), rescored(home.models[0], prompt, one, temperature), atol=1e-3, rtol=0
        )
        assert one.versions == ((3, 0, len(one.token_ids)),)
        assert one.finish_reason == ("stop" if one.token_ids[-1] == EOS else "length")
        assert len(one.token_ids) == 24 or one.token_ids[-1] == EOS
        assert EOS not in one.token_ids[:-1]
    assert len({tuple(one.token_ids) for one in done}) == len(done), "each is drawn by itself"


def test_the_local_engine_agrees(home: Home) -> None:
    home.load(0, version=4)
    local = LocalEngine().build(home.runtime)
    local.load_weights(checkpoint_tensors(home.models[0]), version=4)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
    done = complete(home, PROMPTS, temperature=0.0, max_new_tokens=12)
    expected = local.generate(PROMPTS, sampling, seed=1)
    assert [one.token_ids for one in done] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in done] == [one.finish_reason for one in expected]
    for prompt, one in zip(PROMPTS, done, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), rescored(local.model, prompt, one, 0.0), atol=1e-3, rtol=0)


def test_the_end_of_sequence_is_a_stop_and_kept(home: Home) -> None:
    """The likeliest tokens of a prompt, with one of them made the end of sequence."""
    home.load(0, version=5)
    (plain,) = complete(home, [[7]], temperature=0.0, max_new_tokens=8)
    other = next(token for token in plain.token_ids if token != plain.token_ids[0])
    engine, runtime = home.engine, home.runtime
    engine.runtime = type(runtime)(**{**vars(runtime), "eos_id": other})
    try:
        (done,) = complete(home, [[7]], temperature=0.0, max_new_tokens=8)
    finally:
        engine.runtime = runtime
    assert done.finish_reason == "stop" and done.token_ids == plain.token_ids[: plain.token_ids.index(other) + 1]


def test_a_pause_with_other_weights_gives_spans_that_each_are_their_weights(home: Home) -> None:
    home.load(0, version=6)
    prompts = [[5, 9, 11], [7, 7], [300, 60, 61]]

    async def go():
        sampling = SamplingConfig(temperature=1.0, max_new_tokens=160)
        tasks = [asyncio.create_task(home.engine.complete(Request(prompt, sampling, 1))) for prompt in prompts]
        while not all(seat.flights for seat in home.engine.seats):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        began = time.monotonic()
        await home.engine.pause()
        assert time.monotonic() - began < 5
        assert (await home.engine.seats[0].server.aget("/v1/loads"))["loads"][0]["num_running_reqs"] == 0
        await asyncio.to_thread(home.load, 1, 7)
        await home.engine.resume()
        return await asyncio.gather(*tasks)

    done = asyncio.run(asyncio.wait_for(go(), 120))
    split = [one for one in done if [span[0] for span in one.versions] == [6, 7]]
    assert split, "some were under way"
    for prompt, one in zip(prompts, done, strict=True):
        got = torch.tensor(one.logprobs)
        scores = {6: rescored(home.models[0], prompt, one, 1.0), 7: rescored(home.models[1], prompt, one, 1.0)}
        for version, start, end in one.versions:
            torch.testing.assert_close(got[start:end], scores[version][start:end], atol=1e-3, rtol=0)
            assert (got[start:end] - scores[13 - version][start:end]).abs().max() > 0.1, "the other weights would show"
        assert one.versions[-1][2] == len(one.token_ids) == len(one.logprobs)


def test_routed_experts_are_those_that_the_trainer_would_choose(home: Home) -> None:
    """Prompts that the server's cache has, as a whole and in part, among them: a cached token's experts are told all the same."""
    home.load(0, version=11)
    first = complete(home, PROMPTS, temperature=1.0, max_new_tokens=24)
    longer = [prompt + one.token_ids[:-1] for prompt, one in zip(PROMPTS, first, strict=True) if one.finish_reason == "length"]
    assert longer
    second = complete(home, longer, temperature=1.0, max_new_tokens=24)
    model = replace(model_of(home.hf_config, "here"), num_mtp_layers=0)
    shape, policy = RoutingShape.of(model), Policy(model, None, one_rank(), "fp32")
    native = from_hf(model, checkpoint_tensors(home.models[0]))
    for name, tensor in policy.trainee.named_tensors():
        tensor.copy_(native[name])
    rows = []
    for prompt, one in zip(PROMPTS + longer, first + second, strict=True):
        experts = one.routed_experts
        assert (experts[:, : shape.num_dense] == 0).all(), "dense layers have rows of zeros"
        record = shape.checked(experts, len(prompt), [True] * len(one.token_ids))
        assert (record[:, shape.num_dense :] < shape.num_experts).all(), "every token of prompt and response"
        rows.append(RolloutRow(prompt, replace(one, routed_experts=record)))
    batches = microbatches(rows, 4, 2, torch.device("cpu"), record=lambda row: row.completion.routed_experts)
    for mode in ("none", "r3"):
        routes = Scoring(mode, shape.layers, torch.device("cpu"))
        policy.score(batches, lambda output, batch: None, routes)
        agreement = routes.agreement(policy.mesh)
        assert len(agreement) == shape.layers - shape.num_dense and min(agreement) > 0.99, agreement


def test_probe_features_and_refusals(home: Home) -> None:
    server = home.engine.seats[0].server
    assert asyncio.run(probe.check_scaling(server)) and server.features.no_tokenizer
    assert server.version == sglang_server.installed(home.engine.fleet.owned[0].command[0])["sglang"]
    assert (server.tp_size, server.dp_size, server.pp_size) == (1, 1, 1)
    with pytest.raises(UserError, match="memory_saver .--enable-memory-saver"):
        SglangEngine(url=server.url, memory_saver=True).build(home.runtime)
    with pytest.raises(EngineError, match="longer than the model's context length"):
        complete(home, [[5] * 3000], max_new_tokens=4)
    with pytest.raises(EngineError, match="/update_weights_from_disk does what it is asked; got status 400"):
        server.post("/update_weights_from_disk", {"model_path": "/no/such/folder"})
    assert server.post("/weights_checker", {"action": "checksum"})["ranks"][0]["checksums"], "the stand-in lets a CPU hash"
    home.load(0, version=8)


def test_doctor_finds_it_fit(home: Home, capsys) -> None:
    from r1mega.doctor.report import main

    home.load(1, version=9)  # not the folder that it was started with
    server = home.engine.seats[0].server
    url, held = server.url, server.post("/weights_checker", {"action": "checksum"})["ranks"]
    assert main(["engine=sglang", f"engine.url={url}", "engine.may_update=true", "json=true"]) == 0
    said = json.loads(capsys.readouterr().out)
    states = {one["name"]: one["state"] for one in said["checks"]}
    assert said["usable"] and [name for name, state in states.items() if state == "fault"] == []
    for name in (
        "token ids in and out",
        "logprobs are a rescoring's",
        "abort keeps tokens",
        "pause and continue",
        "update by tensor",
    ):
        assert states[name] == "ok", said
    assert states["update from disk"] == "ok"
    assert server.post("/weights_checker", {"action": "checksum"})["ranks"] == held, "the weights are those of before"
    has = [name for name in NEED_VERSION if getattr(server.features, name)]
    assert has == [name for name in NEED_VERSION if states[name.replace("_", " ")] == "ok"]
    with pytest.raises(EngineError) as refused:  # it wants a POST
        server.get("/begin_weight_update")
    assert (refused.value.status == 404) == (not server.features.update_sessions), "the server itself says which"
    home.load(0, version=10)


@pytest.mark.slow
def test_a_scheduler_that_is_killed_comes_back_and_requests_are_answered(home: Home, sglang_python: str, tmp_path: Path) -> None:
    engine = SglangEngine(python=sglang_python).build(type(home.runtime)(**{**vars(home.runtime), "folder": str(tmp_path)}))
    other = Home(engine, home.runtime, home.hf_config, home.models, home.folders, tmp_path)
    try:
        other.load(0, version=0)

        async def go():
            sampling = SamplingConfig(temperature=1.0, max_new_tokens=200)
            tasks = [asyncio.create_task(engine.complete(Request([5, 9, number], sampling, 1))) for number in range(6)]
            await asyncio.sleep(2.0)
            os.kill(scheduler_of(engine.fleet.owned[0]), signal.SIGKILL)
            (server,) = await engine.wait_for_stale()
            assert server.generation == 1 and engine.version == -1 and not any(task.done() for task in tasks)
            await asyncio.to_thread(other.load, 1, 1)
            return await asyncio.gather(*tasks)

        done = asyncio.run(asyncio.wait_for(go(), 400))
        assert {one.versions for one in done} <= {((1, 0, len(one.token_ids)),) for one in done} and engine.counts["deaths"] == 1
        for number, one in enumerate(done):
            got = rescored(home.models[1], [5, 9, number], one, 1.0)
            torch.testing.assert_close(torch.tensor(one.logprobs), got, atol=1e-3, rtol=0)
    finally:
        engine.close()


def scheduler_of(owned: launch.Owned) -> int:
    """The process below the keeper and the server that holds the model."""
    for pid in below(owned.process.pid):
        if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("a scheduler runs")


def below(pid: int) -> list[int]:
    direct = [int(text) for task in Path(f"/proc/{pid}/task").iterdir() for text in (task / "children").read_text().split()]
    return direct + [deeper for one in direct for deeper in below(one)]
