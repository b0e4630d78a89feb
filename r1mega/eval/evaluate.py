"""``r1mega eval``: pass@1 over k samples a problem, with its standard error; also keeps correct responses (rejection sampling).

pass@1 is the mean over problems of the share of correct samples (R1 3.7); the standard error is that of this mean over problems.
Ranks share the problems. What is drawn depends on the seed, on ``batch_prompts`` and on how many ranks there are, on nothing else.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1mega.config.rl import EvalConfig
from r1mega.data.problems import Problem, load_problems
from r1mega.rl.engine import Request, generate
from r1mega.rl.reward.runner import RewardRunner
from r1mega.rl.setup import (
    encode_prompts,
    open_policy,
    open_rewards,
    open_run_mesh,
    open_tokenizer,
    response_text,
    serving,
)
from r1mega.train import checkpoint

EXAMPLES = 20
"""Problems whose responses are kept in ``eval.json`` to be read."""


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Write ``eval.json`` into ``config.out`` and return it without the examples."""
    mesh = open_run_mesh(config)
    began = time.perf_counter()
    init = checkpoint.resolve(config.checkpoint)
    tokenizer = open_tokenizer(init)
    problems = load_problems(config.data.problems, limit=config.data.limit)
    policy = open_policy(config, init, mesh, None, {})
    encoded = encode_prompts(tokenizer, problems, config.sampling.max_new_tokens, policy.model_config.max_position_embeddings)
    numbered = list(zip(range(len(problems)), problems, encoded, strict=True))[mesh.data_rank :: mesh.data_size]
    results: list[dict[str, Any]] = []
    with (
        serving(config.engine, policy, tokenizer, Path(config.out)) as engine,
        open_rewards(config.reward, {"accuracy": 1.0, "format": 1.0}, by_source={}) as rewards,
        tqdm(total=len(numbered), unit="problem", desc=Path(config.out).name, disable=not mesh.is_first, mininterval=1.0) as bar,
    ):
        for start in range(0, len(numbered), config.batch_prompts):
            part = numbered[start : start + config.batch_prompts]
            results += _answer(config, part, tokenizer, engine, rewards)
            bar.update(len(part))
    merged = sorted((entry for part in mesh.gather_objects(results) for entry in part), key=lambda entry: entry["index"])
    summary = summarise(merged, config)
    summary["seconds"] = time.perf_counter() - began
    if mesh.is_first:
        if summary["reward_failed"]:
            print(f"eval: {summary['reward_failed']:.1%} of the verifier's calls failed, counted wrong; see reward.timeout_seconds")
        if config.keep:
            summary["kept"] = keep_correct(merged, problems, Path(config.keep), config.keep_per_problem, config.seed)
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        examples = [{key: entry[key] for key in ("question", "answer", "responses")} for entry in merged[:EXAMPLES]]
        aside = folder / ".eval.json.tmp"
        aside.write_text(json.dumps({**summary, "examples": examples}, indent=1))
        aside.replace(folder / "eval.json")
    return mesh.broadcast_object(summary)


def _answer(config: EvalConfig, part: list[tuple[int, Problem]], tokenizer, engine, rewards: RewardRunner) -> list[dict[str, Any]]:
    """All samples of a few problems, judged. The draw of a batch depends on the seed and its first problem alone."""
    prompts = [prompt for *_, prompt in part for _ in range(config.samples)]
    draw = random.Random(f"{config.seed}:eval:{part[0][0]}")
    completions = generate(engine, [Request(prompt, config.sampling, draw.getrandbits(62)) for prompt in prompts])
    texts = [response_text(tokenizer, completion) for completion in completions]
    records = rewards.score([problem for _, problem, _ in part for _ in range(config.samples)], texts)
    entries = []
    for slot, (index, problem, _) in enumerate(part):
        mine = range(slot * config.samples, (slot + 1) * config.samples)
        responses = [
            {
                "text": texts[n],
                "correct": records[n]["accuracy"].value >= 1.0,
                "well_formed": records[n]["format"].value >= 1.0,
                "tokens": len(completions[n].token_ids),
                "truncated": completions[n].finish_reason == "length",
                "failed": any(record.failure for record in records[n].values()),
            }
            for n in mine
        ]
        entries.append({"index": index, "question": problem.question, "answer": problem.answer, "responses": responses})
    return entries


def summarise(entries: list[dict[str, Any]], config: EvalConfig) -> dict[str, Any]:
    """pass@1, its standard error, format rate, mean length and truncated share over all samples."""
    shares = [statistics.fmean(response["correct"] for response in entry["responses"]) for entry in entries]
    responses = [response for entry in entries for response in entry["responses"]]
    error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return {
        "pass_at_1": statistics.fmean(shares),
        "standard_error": error,
        "format_rate": statistics.fmean(response["well_formed"] for response in responses),
        "response_length": statistics.fmean(response["tokens"] for response in responses),
        "truncated": statistics.fmean(response["truncated"] for response in responses),
        "reward_failed": statistics.fmean(response["failed"] for response in responses),
        "num_problems": len(entries),
        "samples": config.samples,
        "temperature": config.sampling.temperature,
        "tokens": sum(response["tokens"] for response in responses),
    }


def keep_correct(entries: list[dict[str, Any]], problems: list[Problem], target: Path, per_problem: int, seed: int) -> int:
    """Rejection sampling (R1 2.3.3): distinct correct, well-formed responses as JSONL for ``prepare sft_from``; their number."""
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = 0
    with target.open("w") as file:
        for entry in entries:
            problem = problems[entry["index"]]
            texts = sorted({r["text"] for r in entry["responses"] if r["correct"] and r["well_formed"]})
            for text in random.Random(f"{seed}:keep:{entry['index']}").sample(texts, min(per_problem, len(texts))):
                record = {"id": problem.id, "question": problem.question, "answer": problem.answer, "source": problem.source}
                file.write(json.dumps({**record, "response": text}) + "\n")
                kept += 1
    return kept
