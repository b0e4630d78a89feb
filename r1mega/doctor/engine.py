"""``r1mega doctor engine=sglang engine.url=URL``: a server that somebody runs against the contract that engine=sglang relies on.

In: the engine's choice. Out: one dict a check, as :mod:`r1mega.doctor.checks` has them. Black box: by HTTP alone, nothing is known
of the model. What would disturb others (pause, flush, updates) waits for ``engine.may_update=true``; the weights stay the same.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from r1mega.config.errors import UserError
from r1mega.rl.engine.sglang import SglangEngine, probe
from r1mega.rl.engine.sglang.client import EngineError, Server
from r1mega.rl.engine.sglang.features import NEED_ARGUMENT, NEED_VERSION, NEWEST

PROMPT = [5, 6, 7, 8, 9, 10]
SIDE_BY_SIDE = 64
LONG = 4000
CLOSE = {"float32": 1e-3}
CLOSE_OTHERS = 0.2
"""Of log-probabilities, in bf16: a rescoring is a prefill, whose sums are in another order than a decode's."""
PERMISSION = "engine.may_update=true"


class Absent(Exception):
    """The server does not have it, and needs not."""


class Broken(Exception):
    """A promise that does not hold."""


def examine_servers(choice: SglangEngine) -> Iterator[dict[str, Any]]:
    """All checks of each server. Raises UserError without engine.url."""
    if not choice.urls():
        raise UserError("engine.url: the server to look at; got none; write engine.url=http://127.0.0.1:30000")
    for url in choice.urls():
        yield from _examine(Server(url, choice.api_key()), choice)


CHECKS: list[tuple[str, str, Callable[[Server], Awaitable[str]]]] = []
"""Name, what is off where it fails, and the check: returns a detail, or raises."""


def check(name: str, off: str, *, disturbs: bool = False):
    """Decorator: one line of the table."""

    def add(function: Callable[[Server], Awaitable[str]]):
        async def allowed(server: Server, choice: SglangEngine) -> str:
            if disturbs and not choice.may_update:
                raise Absent(f"not tried: {PERMISSION} allows it")
            return await function(server)

        CHECKS.append((name, off, allowed))
        return function

    return add


def names() -> list[str]:
    """Of all lines, in order."""
    features = [name.replace("_", " ") for name in (*NEED_VERSION, *NEED_ARGUMENT)]
    return ["server", *(name for name, _, _ in CHECKS), *features]


def _examine(server: Server, choice: SglangEngine) -> Iterator[dict[str, Any]]:
    try:
        server.read_info()
    except UserError as error:
        yield _result("server", "fault", server.url, str(error), "everything", "see that it runs")
        return
    newest = ".".join(map(str, NEWEST))
    note = f"newer than {newest}, whose contract this is" if server.features.number > NEWEST else ""
    yield _result("server", "ok", server.version, "; ".join(filter(None, [server.url, note])))
    for name, off, function in CHECKS:
        began = time.monotonic()
        try:
            detail = asyncio.run(function(server, choice))
            yield _result(name, "ok", f"{time.monotonic() - began:.2f} s", detail)
        except Absent as error:
            yield _result(name, "missing", "", str(error))
        except (Broken, UserError) as error:
            yield _result(name, "fault", "", str(error), off, "another version of SGLang, or its arguments")
    for name, has in server.features.table().items():
        if name in NEED_VERSION or name in NEED_ARGUMENT:
            way = "" if has else server.features.missing([name])[0]
            yield _result(name.replace("_", " "), "ok" if has else "missing", "", way)


def _result(name: str, state: str, found: str, detail: str, off: str = "", add: str = "") -> dict[str, Any]:
    return {"name": name, "required": True, "state": state, "found": found, "detail": detail, "off": off, "add": add}


async def _generate(
    server: Server, prompt: list[int] = PROMPT, size: int = 16, **other: Any
) -> tuple[list[int], list[float], dict]:
    """Tokens, log-probabilities and meta_info. Greedy, and on through the end of sequence, unless ``other`` says more."""
    sampling = {"max_new_tokens": size, "temperature": 0.0, "ignore_eos": True} | other.pop("sampling", {})
    body = {"input_ids": prompt, "return_logprob": True, "rid": uuid.uuid4().hex, "sampling_params": sampling} | other
    answer = await server.generate(body, 300)
    about = answer.get("meta_info")
    if not isinstance(answer.get("output_ids"), list) or not isinstance(about, dict):
        raise Broken(f"/generate gives output_ids and meta_info; got {sorted(answer)}")
    triples = about.get("output_token_logprobs") or []
    if [triple[1] for triple in triples] != answer["output_ids"]:
        raise Broken("output_token_logprobs are those of output_ids; got others")
    return answer["output_ids"], [triple[0] for triple in triples], about


@check("token ids in and out", "engine=sglang: it sends and takes token ids only")
async def _ids(server: Server) -> str:
    tokens, logprobs, about = await _generate(server)
    if not tokens or not all(isinstance(token, int) for token in tokens):
        raise Broken(f"output_ids are token ids; got {str(tokens)[:80]}")
    if about.get("prompt_tokens") != len(PROMPT):
        raise Broken(f"a prompt of {len(PROMPT)} ids is read as it is; got prompt_tokens {about.get('prompt_tokens')}")
    if not all(value <= 1e-3 for value in logprobs):
        raise Broken(f"log-probabilities are at most 0; got {max(logprobs)}")
    return f"{len(tokens)} tokens for {len(PROMPT)}"


@check("length honoured", "responses of the length that was asked for")
async def _length(server: Server) -> str:
    for size in (1, 7):
        tokens, _, about = await _generate(server, size=size)
        if len(tokens) != size or about["finish_reason"].get("type") != "length":
            raise Broken(f"{size} tokens and length; got {len(tokens)} and {about['finish_reason']}")
    return "1 and 7 tokens"


@check("stop token honoured", "responses that end where they do")
async def _stop(server: Server) -> str:
    tokens, _, _ = await _generate(server)
    wanted = tokens[4]
    until = tokens.index(wanted) + 1
    got, _, about = await _generate(server, sampling={"stop_token_ids": [wanted], "ignore_eos": False})
    if got != tokens[: len(got)] or got[-1:] != [wanted] and about["finish_reason"].get("type") != "stop":
        raise Broken(f"the response ends with the stop token {wanted}, which it keeps; got {got} of {tokens}")
    return f"kept as the last of {min(until, len(got))}"


@check("greedy is repeatable", "runs that can be told apart by their seeds")
async def _greedy(server: Server) -> str:
    first, _, _ = await _generate(server, size=24)
    again, _, _ = await _generate(server, size=24)
    if first != again:
        place = next(place for place, (one, two) in enumerate(zip(first, again, strict=True)) if one != two)
        raise Broken(f"the likeliest tokens twice; got another one from token {place} on")
    return "24 tokens twice"


@check("logprobs are a rescoring's", "importance weights: they compare these with the trainer's")
async def _rescored(server: Server) -> str:
    tokens, logprobs, _ = await _generate(server, size=24, sampling={"temperature": 1.0})
    _, _, about = await _generate(server, PROMPT + tokens, size=1, logprob_start_len=0)
    rows = about.get("input_token_logprobs") or []
    if len(rows) != len(PROMPT) + len(tokens):
        raise Broken(f"logprob_start_len 0 scores the whole prompt of {len(PROMPT) + len(tokens)}; got {len(rows)}")
    scored = [row[0] for row in rows[len(PROMPT) :]]
    worst = max(abs(one - two) for one, two in zip(logprobs, scored, strict=True))
    close = CLOSE.get(str(server.info.get("dtype")), CLOSE_OTHERS)
    if worst > close:
        raise Broken(f"within {close:g} of the same tokens as a prompt; got {worst:.2e}")
    return f"within {worst:.1e}"


@check("logprobs at the temperature", "the loss: log-probabilities are of softmax(logits / temperature)")
async def _scaled(server: Server) -> str:
    return "halved gaps at temperature 2" if await probe.check_scaling(server) else "the model is too even to tell"


@check("many side by side", "rollouts of more than a few responses")
async def _many(server: Server) -> str:
    began = time.monotonic()
    made = await asyncio.gather(
        *(_generate(server, [*PROMPT, number], sampling={"temperature": 1.0}) for number in range(SIDE_BY_SIDE))
    )
    return f"{sum(len(tokens) for tokens, _, _ in made) / (time.monotonic() - began):.0f} tokens/s of {SIDE_BY_SIDE} requests"


@check("abort keeps tokens", "partial rollouts: what was sampled before a pause")
async def _abort(server: Server) -> str:
    name = uuid.uuid4().hex
    size = min(LONG, int(server.info.get("max_req_input_len") or LONG) // 2)
    task = asyncio.create_task(_generate(server, size=size, rid=name))
    for _ in range(100):
        await asyncio.sleep(0.1)
        await server.apost("/abort_request", {"rid": name}, 10)
        if task.done():
            break
    tokens, _, about = await asyncio.wait_for(task, 30)
    if about["finish_reason"].get("type") != "abort":
        raise Absent(f"the {size} tokens were there before the abort")
    return f"{len(tokens)} of {size}"


@check("a bad request is refused", "errors that name the request, and a server that lives on")
async def _bad(server: Server) -> str:
    try:
        await server.generate({"input_ids": [], "sampling_params": {}}, 60)
    except EngineError as error:
        if error.status == 400 and server.is_healthy(10):
            return f"status 400: {error.message[:60]}"
        raise Broken(
            f"status 400 for an empty prompt, and a server that answers; got {error.status} {error.message[:80]}"
        ) from None
    raise Broken("status 400 for an empty prompt; got an answer")


@check("checksum of the weights", "the proof of a push by hashes: a probe's log-probabilities prove it instead")
async def _checksum(server: Server) -> str:
    try:
        answer = await server.apost("/weights_checker", {"action": "checksum"}, 300)
    except EngineError as error:
        raise Absent(error.message) from None
    ranks = answer.get("ranks") or []
    if not ranks or not ranks[0].get("checksums"):
        raise Broken(f"ranks with checksums by tensor; got {sorted(answer)}")
    return f"{len(ranks[0]['checksums'])} tensors, {len(ranks)} ranks"


@check("pause and continue", "pushes while requests wait", disturbs=True)
async def _pause(server: Server) -> str:
    await server.apost("/pause_generation", {"mode": "abort"}, 60)
    task = asyncio.create_task(_generate(server, size=4))
    await asyncio.sleep(0.5)
    early = task.done()
    await server.apost("/continue_generation", {}, 60)
    tokens, _, _ = await asyncio.wait_for(task, 60)
    if early or len(tokens) != 4:
        raise Broken("a request waits while the server is paused, and is answered then; got an answer before")
    return "a request waited"


@check("flush waits for idleness", "pushes that do not meet a request", disturbs=True)
async def _flush(server: Server) -> str:
    await asyncio.to_thread(server.drain, 30)
    _, _, about = await _generate(server, size=1)
    if about.get("cached_tokens"):
        raise Broken(f"no cached prefix after a flush; got {about['cached_tokens']} tokens")
    return "nothing cached"


@check("version of the weights", "spans of versions: samples say which weights drew them", disturbs=True)
async def _version(server: Server) -> str:
    before = (await server.aget("/model_info")).get("weight_version")
    mark = f"doctor-{uuid.uuid4().hex[:8]}"
    await server.apost("/update_weight_version", {"new_version": mark, "abort_all_requests": False}, 60)
    _, _, about = await _generate(server, size=1)
    shown = (await server.aget("/model_info")).get("weight_version")
    await server.apost("/update_weight_version", {"new_version": str(before), "abort_all_requests": False}, 60)
    if about.get("weight_version") != mark or shown != mark:
        raise Broken(f"the version that was set, in answers and in /model_info; got {about.get('weight_version')} and {shown}")
    return f"set and put back to {before}"


@check("update by tensor", "push=tensor", disturbs=True)
async def _tensor(server: Server) -> str:
    tokens, _, _ = await _generate(server)
    await asyncio.to_thread(server.drain, 30)
    entry = base64.b64encode(pickle.dumps([])).decode()
    if server.features.update_sessions:
        await server.apost("/begin_weight_update", {"selector": "all"}, 60)
    try:
        body = {"serialized_named_tensors": [entry] * server.tp_size, "flush_cache": False}
        await server.apost("/update_weights_from_tensor", body, 60)
    finally:
        if server.features.update_sessions:
            await server.apost("/end_weight_update", {}, 60)
    if (await _generate(server))[0] != tokens:
        raise Broken("an update of no tensor changes nothing; got other tokens")
    return "none sent, none changed"


@check("update from disk", "push=disk", disturbs=True)
async def _disk(server: Server) -> str:
    live = server.info | await server.aget("/model_info")  # from 0.5.17 on /server_info tells of the start alone
    if live.get("load_format") == "dummy":
        raise Absent("not tried: it was started with random weights, which are on no disk")
    tokens, _, _ = await _generate(server)
    await asyncio.to_thread(server.drain, 30)
    await server.apost("/update_weights_from_disk", {"model_path": live["model_path"]}, 600)
    if (await _generate(server))[0] != tokens:
        raise Broken("its own folder holds the weights that it serves; got other tokens after loading it, which it now serves")
    return "its own folder, again"
