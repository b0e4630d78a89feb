"""engine=sglang against a server that misbehaves: what is retried, what is refused and with which words, pauses, deaths, choices."""

from __future__ import annotations

import asyncio
import base64
from functools import wraps

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.config.run import SamplingConfig
from r1mega.rl.engine import EngineRuntime, Request, SglangEngine
from r1mega.rl.engine.sglang.answers import RoutingError
from r1mega.rl.engine.sglang.client import EngineError, Server
from r1mega.rl.engine.sglang.features import Features
from tests.rl.engine.fake import LETTERS, FakeServer, serving

HF = {"num_hidden_layers": 3, "num_experts_per_tok": 2, "n_routed_experts": 8}
EOS = 3
PROMPT = [5, 6, 7]


def run(test):
    """A coroutine as a test, with a time limit of its own."""

    @wraps(test)
    def made(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return made


async def engine(*fakes: FakeServer, version: int = 4, **knobs):
    choice = SglangEngine(url=" ".join(fake.url for fake in fakes), **knobs)
    made = await asyncio.to_thread(choice.build, EngineRuntime(HF, eos_id=EOS))
    made.version = version
    return made


def ask(size: int = 6, prompt: list[int] = PROMPT, **sampling) -> Request:
    return Request(prompt, SamplingConfig(max_new_tokens=size, **sampling), seed=1)


def expected(size: int, prompt: list[int] = PROMPT) -> list[int]:
    return [LETTERS[(len(prompt) + place) % len(LETTERS)] for place in range(size)]


@run
async def test_one_response_in_plain_and_in_chunks():
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake)
        for fake.chunked in (False, True):
            done = await served.complete(ask())
            assert done.token_ids == expected(6) and done.finish_reason == "length" and done.versions == ((4, 0, 6),)
            assert done.logprobs == [-1.0 / token for token in done.token_ids]
        sent = fake.bodies[-1]
        assert sent["input_ids"] == PROMPT and sent["return_logprob"] and sent["sampling_params"]["stop_token_ids"] == [EOS]
        assert "text" not in sent and "sampling_seed" not in sent["sampling_params"]
        served.close()


@run
async def test_a_thousand_requests_side_by_side_on_kept_connections():
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake)
        await served.complete(ask())
        fake.hold = 1000
        done = await asyncio.gather(*(served.complete(ask(3, [5] * (1 + number % 7))) for number in range(1000)))
        assert [one.token_ids for one in done] == [expected(3, [5] * (1 + number % 7)) for number in range(1000)]
        assert fake.most_running == 1000 and fake.connections < 1100
        before = fake.connections
        await served.complete(ask())
        assert fake.connections == before, "a young connection is used again"
        fake.token_seconds = 0.002
        small = await engine(fake, concurrency=5)
        fake.most_running = 0
        await asyncio.gather(*(small.complete(ask(2)) for _ in range(40)))
        assert fake.most_running <= 5


BROKEN = {
    "each token has its log-probability": lambda a: a["meta_info"]["output_token_logprobs"].pop(),
    "log-probabilities are those of the tokens": lambda a: a["output_ids"].reverse(),
    "finite": lambda a: a["meta_info"]["output_token_logprobs"][2].__setitem__(0, None),
    "at most 0": lambda a: a["meta_info"]["output_token_logprobs"][2].__setitem__(0, 0.5),
    "stop means the end of sequence 3": lambda a: a["meta_info"].__setitem__("finish_reason", {"type": "stop", "matched": 9}),
    "it read 3 tokens": lambda a: a["meta_info"].__setitem__("prompt_tokens", 4),
    "a response ends by": lambda a: a["meta_info"].__setitem__("finish_reason", {"type": "tired"}),
    "out of memory": lambda a: a["meta_info"].__setitem__(
        "finish_reason", {"type": "abort", "status_code": 400, "message": "out of memory"}
    ),
    "meta_info": lambda a: a.pop("meta_info"),
    "a response ends at the end of sequence 3": lambda a: (
        a["output_ids"].__setitem__(2, EOS), a["meta_info"]["output_token_logprobs"][2].__setitem__(1, EOS)
    ),
    "at most 6 tokens": lambda a: (
        a["output_ids"].append(9), a["meta_info"]["output_token_logprobs"].append([-1.0, 9, None])
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", BROKEN)
@run
async def test_a_wrong_answer_is_refused_by_server_and_promise(said: str):
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake)
        await served.complete(ask())  # the probe is done

        def spoil(answer):
            BROKEN[said](answer)
            return answer

        fake.spoil = spoil
        with pytest.raises(EngineError, match=said) as caught:
            await served.complete(ask())
        assert caught.value.server == fake.url and caught.value.path == "/generate"


@run
async def test_the_end_of_sequence_as_the_last_token_that_may_come_is_a_stop():
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake)
        await served.complete(ask())

        def ends(answer):
            answer["output_ids"][-1] = answer["meta_info"]["output_token_logprobs"][-1][1] = EOS
            return answer

        fake.spoil = ends
        assert (await served.complete(ask())).finish_reason == "stop"


@run
async def test_lost_and_busy_answers_are_asked_for_again_and_a_refusal_is_not():
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake, attempts=4)
        await served.complete(ask())
        fake.drop = 2  # a kept connection that is closed before a byte is sent again at once; the second is a failure
        assert (await served.complete(ask())).token_ids == expected(6)
        fake.drop = 0
        fake.fail["/generate"] = (503, {"error": {"message": "the queue is full"}})
        with pytest.raises(EngineError, match="status 503: the queue is full"):
            await served.complete(ask())
        assert fake.paths[-4:] == ["/generate"] * 4
        fake.fail["/generate"] = (400, {"error": {"message": "longer than the context"}})
        count = len(fake.paths)
        with pytest.raises(EngineError, match="longer than the context"):
            await served.complete(ask())
        assert len(fake.paths) == count + 1


@pytest.mark.parametrize("shared", [False, True])
@run
async def test_a_pause_keeps_tokens_and_their_versions(shared: bool):
    fake = FakeServer()
    fake.token_seconds = 0.01
    async with serving(fake):
        served = await engine(fake, shared=shared)
        await served.complete(ask(1))
        tasks = [asyncio.create_task(served.complete(ask(60, [5] * size))) for size in (1, 2, 3)]
        for version in (5, 6):
            await asyncio.sleep(0.15)
            await served.pause()
            assert not fake.running, "nothing is sampled after a pause"
            count = len(fake.paths)
            late = asyncio.create_task(served.complete(ask(2)))
            await asyncio.sleep(0.05)
            assert "/generate" not in fake.paths[count:]
            served.version = version
            await served.resume()
            assert (await late).versions == ((version, 0, 2),)
        for size, task in zip((1, 2, 3), tasks, strict=True):
            done = await task
            assert done.token_ids == expected(60, [5] * size) and len(done.logprobs) == 60
            assert [span[0] for span in done.versions] == [4, 5, 6] and done.versions[-1][2] == 60
            assert all(one[2] == two[1] for one, two in zip(done.versions, done.versions[1:], strict=False))
        aborts = [body for path, body in zip(fake.paths, fake.bodies, strict=True) if path == "/abort_request"]
        assert all(("rid" in body) == shared for body in aborts)


@run
async def test_a_pause_without_new_weights_is_one_span():
    fake = FakeServer()
    fake.token_seconds = 0.01
    async with serving(fake):
        served = await engine(fake)
        task = asyncio.create_task(served.complete(ask(30)))
        await asyncio.sleep(0.15)
        await served.pause()
        await served.resume()
        assert (await task).versions == ((4, 0, 30),) and served.counts["pieces"] >= 2


@run
async def test_nothing_serves_before_a_push_and_after_a_failed_one():
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake, version=-1, request_seconds=1.0)
        assert served.version == -1 and [one.url for one in served.stale] == [fake.url]
        with pytest.raises(UserError, match="none with complete weights"):
            await served.complete(ask())
        served.version = 2
        assert served.stale == [] and (await served.complete(ask())).versions == ((2, 0, 6),)
        served.version = -1
        waiting = asyncio.create_task(served.complete(ask()))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await asyncio.to_thread(setattr, served, "version", 3)  # pushed from a thread
        assert (await waiting).versions == ((3, 0, 6),)


@run
async def test_requests_of_a_dead_server_go_to_the_other_and_it_wants_a_push_when_it_is_back():
    first, second = FakeServer(), FakeServer()
    first.token_seconds = second.token_seconds = 0.005
    async with serving(first, second):
        served = await engine(first, second)
        tasks = [asyncio.create_task(served.complete(ask(40, [5] * (1 + number)))) for number in range(20)]
        await asyncio.sleep(0.1)
        assert first.running and second.running, "both have work"
        port = int(first.url.rpartition(":")[2])
        await first.stop()
        done = await asyncio.gather(*tasks)
        assert [one.token_ids for one in done] == [expected(40, [5] * (1 + number)) for number in range(20)]
        assert served.counts["deaths"] == 1 and served.counts["resent"] > 0 and [one.url for one in served.servers] == [second.url]
        again = await FakeServer(random_seed=8).start(port)
        (back,) = await asyncio.wait_for(served.wait_for_stale(), 10)
        assert back.url == first.url and back.generation == 1 and served.version == 4
        await asyncio.gather(*(served.complete(ask(2)) for _ in range(10)))
        assert "/generate" not in again.paths, "it does not serve before a push"
        served.version = 5
        await asyncio.gather(*(served.complete(ask(2, [9] * number)) for number in range(1, 30)))
        assert "/generate" in again.paths
        await again.stop()


@run
async def test_a_lost_answer_is_no_death_and_a_server_that_lost_its_weights_is_one():
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake)
        fake.label = "4"
        await served.complete(ask())
        fake.drop = 2
        fake.label = "4"
        done = await served.complete(ask())
        assert done.versions == ((4, 0, 6),) and served.counts["deaths"] == 0 and served.counts["resent"] >= 1
        task = asyncio.create_task(served.complete(ask()))
        fake.drop, fake.label = 2, "default"  # as after a restart with the same seed
        (back,) = await asyncio.wait_for(served.wait_for_stale(), 10)
        assert back.generation == 1 and served.counts["deaths"] == 1 and not task.done()
        fake.label = "5"
        served.version = 5
        assert (await task).versions == ((5, 0, 6),)


@run
async def test_a_prompt_stays_with_its_server_and_load_is_shared():
    fakes = [FakeServer(), FakeServer(), FakeServer()]
    for fake in fakes:
        fake.token_seconds = 0.02
    async with serving(*fakes):
        served = await engine(*fakes)
        await served.complete(ask(1))
        for fake in fakes:
            fake.bodies.clear()
        await asyncio.gather(*(served.complete(ask(2, [group] * 4)) for group in range(12) for _ in range(4)))
        homes = [
            {index for index, fake in enumerate(fakes) for body in fake.bodies if body.get("input_ids") == [group] * 4}
            for group in range(12)
        ]
        assert all(len(home) == 1 for home in homes), "a group's prompt is read once"
        assert [sum(home == {index} for home in homes) for index in range(3)] == [4, 4, 4]


@run
async def test_raw_logprobs_are_found_and_named():
    fake = FakeServer()
    fake.raw_logprobs = True
    async with serving(fake):
        served = await engine(fake)
        with pytest.raises(UserError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
            await served.complete(ask())


@run
async def test_features_that_a_server_lacks_are_refused_by_name():
    fake = FakeServer()
    async with serving(fake):
        with pytest.raises(UserError, match="routed_experts .--enable-return-routed-experts, for routing replay"):
            await engine(fake, routed_experts=True)
        fake.info["version"] = "0.5.15.post1"
        with pytest.raises(UserError, match=r"SGLang from 0\.5\.16 on; got 0\.5\.15\.post1"):
            await engine(fake)
    with pytest.raises(EngineError, match="no answer"):
        Server.open(fake.url)
    with pytest.raises(UserError, match="engine.url: http://HOST:PORT"):
        Server("localhost:30000")


@run
async def test_routed_experts_are_checked_and_join_over_a_pause():
    fake = FakeServer(enable_return_routed_experts=True)
    fake.token_seconds = 0.01

    def routed(answer):
        about, asked = answer["meta_info"], fake.bodies[fake.paths.index("/generate") :]
        body = next(one for one in reversed(asked) if one.get("rid") and len(one["input_ids"]) == about["prompt_tokens"])
        start = body["routed_experts_start_len"]
        rows = about["prompt_tokens"] + len(answer["output_ids"]) - 1
        experts = torch.arange(start, rows).view(-1, 1, 1).expand(-1, 3, 2).remainder(8).int().contiguous()
        about["routed_experts"] = base64.b64encode(experts.numpy().tobytes()).decode()
        return answer

    async with serving(fake):
        served = await engine(fake, routed_experts=True)
        served._probed = True
        fake.spoil = routed
        task = asyncio.create_task(served.complete(ask(40)))
        await asyncio.sleep(0.2)
        await served.pause()
        await served.resume()
        experts = (await task).routed_experts
        assert experts.shape == (3 + 40 - 1, 3, 2) and experts.dtype == torch.int16
        assert experts[:, 0, 0].tolist() == [place % 8 for place in range(42)], "each position once, in order"

        def short(answer):
            answer["meta_info"]["routed_experts"] = base64.b64encode(b"\0" * 20).decode()
            return answer

        fake.spoil = short
        with pytest.raises(RoutingError, match=r"routed experts are int32 \[5, 3, 2\]"):
            await served.complete(ask(3))


@run
async def test_sleep_and_wake_by_tags():
    fake = FakeServer(enable_memory_saver=True)
    async with serving(fake):
        served = await engine(fake, memory_saver=True)
        await served.sleep()
        assert served.version == -1, "weights that are given back are lost"
        await served.wake(("weights",))
        served.version = 5
        waiting = asyncio.create_task(served.complete(ask()))
        await served.wake()
        await served.resume()
        assert (await waiting).versions == ((5, 0, 6),)
        tags = [body["tags"] for path, body in zip(fake.paths, fake.bodies, strict=True) if path.endswith("memory_occupation")]
        assert [sorted(one) for one in tags] == [["cuda_graph", "kv_cache", "weights"], ["weights"], ["cuda_graph", "kv_cache"]]
        await served.sleep()
        fake.drop = 20  # it dies asleep
        await served.wake()
        assert not served.seats[0].alive and served.seats[0].asleep == []
        fake.drop, fake.fail["/release_memory_occupation"] = 0, (400, {"message": "no"})
        with pytest.raises(EngineError, match="release_memory_occupation"):
            await served.sleep()


@run
async def test_posts_say_what_failed():
    fake = FakeServer()
    async with serving(fake):
        server = await asyncio.to_thread(Server.open, fake.url)
        assert (await asyncio.to_thread(server.post, "/flush_cache"))["success"]
        fake.fail["/update_weights_from_tensor"] = (400, {"success": False, "message": "no such tensor"})
        fake.fail["/end_weight_update"] = (200, {"success": False, "message": "nothing begun"})
        for path, status, said in (
            ("/update_weights_from_tensor", 400, "no such tensor"),
            ("/end_weight_update", 200, "nothing begun"),
        ):
            with pytest.raises(EngineError) as caught:
                await asyncio.to_thread(server.post, path, {})
            with pytest.raises(EngineError):
                await server.apost(path, {})
            assert (caught.value.status, caught.value.message, caught.value.path) == (status, said, path)
            assert fake.url in str(caught.value)


@pytest.mark.parametrize(
    ("version", "has"),
    [
        ("0.5.16", {"sampling_mask"}),
        ("0.5.17", {"sampling_mask"}),
        ("0.5.18", {"sampling_mask", "live_model_info"}),
        ("0.5.19", {"sampling_mask", "live_model_info", "version_spans"}),
        ("0.5.21.post2", {"sampling_mask", "live_model_info", "version_spans", "update_sessions", "selector", "draft_over_group"}),
        ("0.5.23", {"sampling_mask", "version_spans", "update_sessions", "selector", "draft_over_group", "safe_flush", "live_model_info"}),
        ("0.6.0rc1", {"sampling_mask", "version_spans", "update_sessions", "selector", "draft_over_group", "safe_flush", "live_model_info"}),
    ],
)  # fmt: skip
def test_features_by_version(version: str, has: set[str]):
    assert {name for name, value in Features.of({"version": version}, "here").table().items() if value} == has | {"checksum"}


@run
async def test_a_server_that_starts_anew_during_a_push_stays_stale():
    fakes = [FakeServer(), FakeServer()]
    async with serving(*fakes):
        served = await engine(*fakes)
        served.begin_push([served.servers[0].url, served.servers[1].url])
        served._died(1)
        served._revived(1)
        served.version = 5
        assert [server.url for server in served.stale] == [fakes[1].url] and served.version == 5
        served.begin_push([fakes[1].url])
        served.version = 6
        assert [server.url for server in served.stale] == [fakes[0].url], "this push did not go there"
        served.begin_push()
        served.version = 7
        assert served.stale == [] and served.version == 7
        served.close()


@run
async def test_a_lost_server_is_waited_for_before_its_death_is_noticed():
    fake = FakeServer()
    async with serving(fake):
        served = await engine(fake, start_seconds=1.0)
        await served.wait_for_all()
    with pytest.raises(UserError, match="engine.start_seconds: a server that was lost answers again within 1 s"):
        await served.wait_for_all()
    served.close()
