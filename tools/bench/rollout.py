"""Rollout tokens/s of the RL loop's own path against a bare asynchronous client, on the same server with the same requests, in
turns.

    python tools/bench/rollout.py url=http://127.0.0.1:30000 requests=256 prompt_tokens=256 new_tokens=512 rounds=3 device=cuda

``url``: a server of this model's shape that has weights; empty: one is started with ``python`` and ``args`` (server arguments as
name:value, apart by commas) and random weights are pushed to it. The bare client is asyncio and sockets alone: it posts the same
bodies and reads the answers. Ours is what ``r1mega rl`` does until a sample is ready: episodes, engine, checks on arrival, ledger.
Prints one JSON object: tokens/s of each round, the medians, and their ratio.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r1mega.config.compose import preset
from r1mega.config.run import SamplingConfig
from r1mega.data.problems import Problem
from r1mega.data.prompts import PromptStream
from r1mega.rl.engine import EngineRuntime, SglangEngine
from r1mega.rl.engine.sglang.engine import sampling_params
from r1mega.rl.environment import Single
from r1mega.rl.ledger import Ledger
from r1mega.rl.rollouts import Plan, Rollouts

DEFAULTS = {
    "device": "cpu", "model": "tiny", "dtype": "", "url": "", "python": "", "args": "", "requests": 16, "prompt_tokens": 32,
    "new_tokens": 32, "rounds": 3, "seed": 1,
}  # fmt: skip
EOS = 1


async def bare(url: str, bodies: list[dict[str, Any]]) -> int:
    """Post every body on a connection of its own, all at once; the number of tokens that came back."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")

    async def one(body: dict[str, Any]) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        status, _, rest = answer.partition(b"\r\n")
        if b" 200 " not in status:
            raise SystemExit(f"rollout.py: the server answers; got {status.decode()}")
        return len(json.loads(rest.partition(b"\r\n\r\n")[2])["output_ids"])

    return sum(await asyncio.gather(*map(one, bodies)))


def main(arguments: list[str]) -> None:
    """``key=value`` arguments over the defaults."""
    options: dict[str, Any] = dict(DEFAULTS)
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key not in options:
            sys.exit(f"rollout.py: one of {', '.join(options)}; got {key}; write key=value")
        options[key] = type(options[key])(value)
    model = preset("model", options["model"])
    draw, sampling = random.Random(options["seed"]), SamplingConfig(temperature=1.0, max_new_tokens=options["new_tokens"])
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as place:
        engine = opened(options, model, place)
        try:
            count, width = options["requests"], options["prompt_tokens"]
            found: dict[str, list[float]] = {"bare": [], "ours": []}
            for round_number in range(options["rounds"]):
                for way in ("bare", "ours") if round_number % 2 else ("ours", "bare"):
                    prompts = [[draw.randrange(8, model.vocab_size) for _ in range(width)] for _ in range(count)]
                    began = time.perf_counter()
                    tokens = measured(way, engine, prompts, sampling, Path(place) / f"ledger{round_number}{way}")
                    found[way].append(tokens / (time.perf_counter() - began))
        finally:
            engine.close()
    medians = {way: statistics.median(values) for way, values in found.items()}
    told = {"options": options, "tokens_per_second": found, **medians, "ours_over_bare": medians["ours"] / medians["bare"]}
    print(json.dumps(told))


def opened(options: dict[str, Any], model, place: str):
    """An engine whose server has weights."""
    from r1mega.device import DTYPES, open_device
    from r1mega.model.published import published_config
    from r1mega.rl.push import AutoPush, PushRuntime
    from tools.bench.push import NAMES, weights

    device = open_device(preset("device", options["device"])).torch_device
    dtype = options["dtype"] or ("fp32" if device.type == "cpu" else "bf16")
    hf_config = published_config(model, bos_id=0, eos_id=EOS, pad_id=2, dtype=NAMES[dtype])
    pairs = (part.split(":", 1) for part in options["args"].split(",") if part)
    args = {key: json.loads(value) if value[:1].isdigit() else value for key, value in pairs}
    choice = SglangEngine(url=options["url"] or None, python=options["python"] or None, args=args)
    engine = choice.build(EngineRuntime(hf_config, str(device), NAMES[dtype], eos_id=EOS, folder=place))
    runtime = PushRuntime(engine, hf_config, lambda: engine.servers, str(device), None, Path(place))
    AutoPush().build(runtime).send(weights(model, DTYPES[dtype], device, options["seed"]), 0)
    engine.version = 0
    return engine


def measured(way: str, engine, prompts: list[list[int]], sampling: SamplingConfig, folder: Path) -> int:
    """Tokens of one round."""
    if way == "bare":
        params = sampling_params(sampling, sampling.max_new_tokens, EOS)
        bodies = [{"input_ids": prompt, "return_logprob": True, "sampling_params": params} for prompt in prompts]
        return asyncio.run(bare(engine.servers[0].url, bodies))
    problems = [Problem(str(number), str(number), "", "bench") for number in range(len(prompts))]
    judge = SimpleNamespace(records=lambda problems, texts: [{} for _ in texts], total=lambda problem, records: 0.0)
    tokenizer = SimpleNamespace(eos_id=EOS, decode=lambda ids, skip_special: "")
    plan = Plan(share=len(prompts), group_size=1, sampling=sampling, seed=1)
    ledger, stream = Ledger(folder, 1, 0, 0, 0), PromptStream(problems, seed=1)
    made = Rollouts(plan, engine, Single().build(), tokenizer, judge, stream, ledger, lambda text: prompts[int(text)])
    try:
        return sum(len(sample.completion.token_ids) for sample in made.take().samples)
    finally:
        made.close()
        ledger.close()


if __name__ == "__main__":
    main(sys.argv[1:])
