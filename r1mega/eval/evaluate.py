"""``r1mega eval``: pass@1 over k samples a problem, with its standard error; also keeps correct responses (rejection sampling).

A sample is an episode; ``verifier`` says whether it is correct: of a conversation with a tool it sees what the model wrote, and the
answer is that of the last turn. pass@1 is the mean over problems of the share of correct samples (R1 3.7); the standard error is
that of this mean over problems. Ranks share the problems. What is drawn depends on the seed, on ``batch_prompts`` and on how many
ranks there are, on nothing else.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1mega.config.rl import EvalConfig
from r1mega.data.problems import Problem, load_problems
from r1mega.rl.environment.play import Played, Player, play_all
from r1mega.rl.reward.mix import weights_of
from r1mega.rl.reward.runner import RewardRunner
from r1mega.rl.setup import (
    encode_prompts,
    open_environment,
    open_policy,
    open_rewards,
    open_run_mesh,
    open_tokenizer,
    serving,
)
from r1mega.rl.types import RewardRecord
from r1mega.train import checkpoint

EXAMPLES = 20
"""Problems whose responses are kept in ``eval.json`` to be read."""


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Write ``eval.json`` into ``config.out`` and return it without the examples."""
    mesh = open_run_mesh(config)
    began = time.perf_counter()
    init = checkpoint.resolve(config.checkpoint)
    tokenizer = open_tokenizer(init)
    environment, name = open_environment(config.environment)
    problems = load_problems(config.data.problems, limit=config.data.limit)
    policy = open_policy(config, init, mesh, None, {})
    context = policy.model_config.max_position_embeddings
    encode_prompts(tokenizer, problems, config.sampling.max_new_tokens, context)  # refuses before anything is generated
    numbered = list(enumerate(problems))[mesh.data_rank :: mesh.data_size]
    weights, by_source = verifiers(config)
    results: list[dict[str, Any]] = []
    with (
        serving(config.engine, config.push, policy, tokenizer, Path(config.out)) as engine,
        Player(environment, engine, tokenizer, config.sampling, context, config.step_seconds, name) as player,
        open_rewards(config.reward, weights, by_source) as rewards,
        tqdm(total=len(numbered), unit="problem", desc=Path(config.out).name, disable=not mesh.is_first, mininterval=1.0) as bar,
    ):
        for start in range(0, len(numbered), config.batch_prompts):
            part = numbered[start : start + config.batch_prompts]
            results += _answer(config, part, player, rewards)
            bar.update(len(part))
    merged = sorted((entry for part in mesh.gather_objects(results) for entry in part), key=lambda entry: entry["index"])
    summary = summarise(merged, config)
    summary["seconds"] = time.perf_counter() - began
    if mesh.is_first:
        if summary["reward_failed"]:
            print(f"eval: {summary['reward_failed']:.1%} of the verifier's calls failed, counted wrong; see reward.timeout_seconds")
        if summary["environment_failed"]:
            why = next(r["environment_failure"] for entry in merged for r in entry["responses"] if r.get("environment_failure"))
            print(f"eval: the environment failed in {summary['environment_failed']:.1%} of the episodes: {why}", file=sys.stderr)
        if config.keep:
            summary["kept"] = keep_correct(merged, problems, Path(config.keep), config.keep_per_problem, config.seed)
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        examples = [{key: entry[key] for key in ("question", "answer", "responses")} for entry in merged[:EXAMPLES]]
        aside = folder / ".eval.json.tmp"
        aside.write_text(json.dumps({**summary, "examples": examples}, indent=1))
        aside.replace(folder / "eval.json")
    return mesh.broadcast_object(summary)


def verifiers(config: EvalConfig) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Weights and weights by source of the rewards that are asked: the verifier's 1, and the format's 0."""
    weights = {name: {"format": 0.0, name: 1.0} for name in (config.verifier, *config.verifier_by_source.values())}
    return weights[config.verifier], {pattern: weights[name] for pattern, name in config.verifier_by_source.items()}


def _answer(config: EvalConfig, part: list[tuple[int, Problem]], player: Player, rewards: RewardRunner) -> list[dict[str, Any]]:
    """All samples of a few problems, judged. The draw of a batch depends on the seed and its first problem alone."""
    asked = [problem for _, problem in part for _ in range(config.samples)]
    draw = random.Random(f"{config.seed}:eval:{part[0][0]}")
    episodes = play_all(player, asked, [draw.getrandbits(62) for _ in asked])
    records = rewards.score(asked, [played.said for played in episodes])
    judged = [_response(config, *each) for each in zip(asked, episodes, records, strict=True)]
    return [
        {
            "index": index,
            "question": problem.question,
            "answer": problem.answer,
            "responses": judged[start : start + config.samples],
        }
        for (index, problem), start in zip(part, range(0, len(judged), config.samples), strict=True)
    ]


def _response(config: EvalConfig, problem: Problem, played: Played, records: Mapping[str, RewardRecord]) -> dict[str, Any]:
    """A sample as it is counted and kept."""
    weights, by_source = verifiers(config)
    (verifier,) = (name for name, weight in weights_of(problem.source, weights, by_source).items() if weight)
    found = {
        "text": played.said,
        "correct": records[verifier].value >= 1.0,
        "well_formed": records["format"].value >= 1.0,
        "tokens": len(played.completion.token_ids),
        "truncated": played.completion.finish_reason == "length",
        "failed": any(record.failure for record in records.values()),
    }
    if played.turns > 1 or played.failure:
        found |= {"turns": played.texts, "environment_failure": played.failure}
    return found


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
        "verifier": config.verifier,
        "turns": statistics.fmean(len(response.get("turns", "1")[::2]) for response in responses),
        "environment_failed": statistics.fmean(bool(response.get("environment_failure")) for response in responses),
        "num_problems": len(entries),
        "samples": config.samples,
        "temperature": config.sampling.temperature,
        "tokens": sum(response["tokens"] for response in responses),
    }


def keep_correct(entries: list[dict[str, Any]], problems: list[Problem], target: Path, per_problem: int, seed: int) -> int:
    """Rejection sampling (R1 2.3.3): distinct correct, well-formed responses as JSONL for ``prepare sft_from``; their number.

    One with a tool has its ``turns`` beside the text.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = 0
    with target.open("w") as file:
        for entry in entries:
            problem = problems[entry["index"]]
            good = [r for r in entry["responses"] if r["correct"] and r["well_formed"] and not r.get("environment_failure")]
            turns = {r["text"]: {"turns": r["turns"]} if "turns" in r else {} for r in good}
            texts = sorted(turns)
            for text in random.Random(f"{seed}:keep:{entry['index']}").sample(texts, min(per_problem, len(texts))):
                record = {"id": problem.id, "question": problem.question, "answer": problem.answer, "source": problem.source}
                file.write(json.dumps({**record, "response": text, **turns[text]}) + "\n")
                kept += 1
    return kept
