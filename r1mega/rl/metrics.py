"""A rollout in numbers, over all data ranks. Pure but for the sums over the mesh, and the clock of :class:`Pace`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from r1mega.rl.batch import RolloutRow
from r1mega.rl.loss.stats import MAXIMA, summary
from r1mega.rl.rollouts import Rollouts, Taken
from r1mega.rl.types import Sample
from r1mega.train.trainee import StepResult


def rollout_line(
    mesh,
    rows: list[RolloutRow],
    taken: Taken,
    judged: dict[str, list[float]],
    results: list[StepResult],
    group_size: int,
    update: int,
) -> dict[str, Any]:
    """Means over all responses: rewards by name, lengths, the train/rollout difference; over the updates: loss and what
    :func:`r1mega.rl.loss.stats.summary` says.

    ``rollout_diff_mean`` and ``rollout_diff_max``: absolute difference between the engine's and the trainer's log-probability of
    the same token, over the response tokens that the policy drew. ``flat_groups``: share of groups whose rewards are all equal.
    ``dropped_groups``: groups judged and left out, for one that is trained on. ``staleness``, ``staleness_max``: updates between
    the weights that a token was drawn from and those before this rollout's first update, ``update``. ``turns``: of an episode.
    ``slowest_reward_seconds``: of one call. ``response_length_max``: of one response; ``responses``: how many there are.
    """
    differences = torch.cat([_differences(row) for row in rows] or [torch.zeros(0)])
    samples = taken.samples
    stale = [(update - version) * (end - start) for sample in samples for version, start, end in sample.completion.versions]
    oldest = max((update - version for sample in samples for version in sample.versions), default=0)
    slowest = max((record.seconds for sample in samples for record in sample.records.values()), default=0.0)
    lengths = [len(row.completion.token_ids) for row in rows]
    groups = torch.tensor(judged["reward"]).view(-1, group_size)
    sums = {
        "responses": float(len(rows)),
        "response_length": float(sum(lengths)),
        "truncated": float(sum(row.completion.finish_reason == "length" for row in rows)),
        "difference": float(differences.double().sum()),
        "response_tokens": float(len(differences)),
        "groups": float(len(groups)),
        "dropped": float(len(taken.dropped)),
        "stale": float(sum(stale)),
        "turns": float(sum(sample.turns for sample in samples)),
        "flat_groups": float((groups == groups[:, :1]).all(dim=1).sum()),
        "reward_square": float(torch.tensor(judged["reward"]).double().square().sum()),
        **{name: float(sum(values)) for name, values in judged.items()},
    }
    device = mesh.device.torch_device
    reduced = mesh.sum(torch.tensor(list(sums.values()), dtype=torch.float64, device=device)).tolist()
    value = dict(zip(sums, reduced, strict=True))
    largest = [float(differences.max()) if len(differences) else 0.0, float(oldest), slowest, float(max(lengths, default=0))]
    largest = mesh.max(torch.tensor(largest, dtype=torch.float64, device=device)).tolist()
    count = value["responses"]
    line = {name: value[name] / count for name in (*judged, "response_length", "truncated", "turns")}
    line["dropped_groups"] = value["dropped"] / value["groups"]
    line["staleness"] = value["stale"] / max(value["response_tokens"], 1)
    line["staleness_max"], line["slowest_reward_seconds"], line["response_length_max"] = largest[1:]
    line["responses"] = round(count)
    line["reward_std"] = max(0.0, value["reward_square"] / count - line["reward"] ** 2) ** 0.5
    line["flat_groups"] = value["flat_groups"] / value["groups"]
    line["rollout_diff_mean"] = value["difference"] / max(value["response_tokens"], 1)
    line["rollout_diff_max"] = largest[0]
    applied = [result for result in results if not result.trouble]
    if applied:
        reduce = {name: max if name in MAXIMA else sum for name in applied[0].stats}
        totals = {name: over(result.stats[name] for result in applied) for name, over in reduce.items()}
        line |= summary(totals)
        line["entropy"] = totals["entropy_sum"] / max(totals["num_tokens"], 1.0)
        line["loss"] = sum(result.loss for result in applied) / len(applied)
        line["grad_norm"] = sum(result.grad_norm for result in applied) / len(applied)
    return line


def source_line(gather: Callable[[Any], list[Any]], samples: Sequence[Sample], rewards: Sequence[float]) -> dict[str, float]:
    """``reward/SOURCE``: the mean reward of the responses to problems of one source, in the order of their names.

    ``rewards``: one a sample; ``gather``: an object of this data rank to those of all.
    """
    mine: dict[str, tuple[float, int]] = {}
    for sample, reward in zip(samples, rewards, strict=True):
        total, count = mine.get(sample.problem.source, (0.0, 0))
        mine[sample.problem.source] = total + reward, count + 1
    parts = gather(mine)
    sums = {name: [sum(part[name][place] for part in parts if name in part) for place in (0, 1)] for part in parts for name in part}
    return {f"reward/{name}": sums[name][0] / sums[name][1] for name in sorted(sums)}


class Pace:
    """How fast a turn was, over all ranks: what the running totals of engine and judges have grown by since the line before."""

    def __init__(self, mesh, rollouts: Rollouts | None):
        self._mesh, self._rollouts = mesh, rollouts
        self._before, self._began = self._totals(), time.perf_counter()

    def line(self, seconds: dict[str, float], trained_tokens: int) -> dict[str, float]:
        """Called by all ranks, once a turn. ``seconds``: of the turn's phases; ``trained_tokens``: of all ranks.

        ``generated_tokens_per_second``: tokens that engines handed out, over the seconds in which at least one response was being
        generated (pauses left out; of the rank where these are most). ``engine_idle_share``: the rest of the turn's time.
        ``tokens_per_second``: prompts' and responses' tokens over the seconds of rescoring and training. ``reward_seconds``: that
        judges were at work, beside the generation, on the rank where these are most. ``engine_requests``, ``engine_pieces``,
        ``engine_tokens``, ``engine_resent``, ``engine_deaths``: where the engine counts them.
        """
        totals, ended = self._totals(), time.perf_counter()
        grown = {name: value - self._before.get(name, 0) for name, value in totals.items()}
        wall = ended - self._began
        self._before, self._began = totals, ended
        everyone = self._mesh.gather_everywhere(grown)

        def over(name: str, way: Callable[[list[float]], float]) -> float:
            return way([part[name] for part in everyone if name in part] or [0.0])

        busy = over("busy_seconds", max)
        trained = seconds.get("score", 0.0) + seconds.get("train", 0.0)
        counts = sorted({name for part in everyone for name in part if name.startswith("engine_")})
        return {
            "generated_tokens_per_second": over("tokens", sum) / busy if busy > 0 else 0.0,
            "engine_idle_share": min(max(1.0 - busy / max(wall, 1e-9), 0.0), 1.0),
            "tokens_per_second": trained_tokens / max(trained, 1e-9),
            "reward_seconds": over("reward_seconds", max),
            # every rank that talks to a server sees its death
            **{name: over(name, max if name == "engine_deaths" else sum) for name in counts},
        }

    def _totals(self) -> dict[str, float]:
        made = self._rollouts
        if made is None:
            return {}
        counts = getattr(made.engine, "counts", {})
        totals = {"tokens": made.tokens, "busy_seconds": made.busy.seconds, "reward_seconds": made.judge.seconds}
        return totals | {f"engine_{name}": value for name, value in counts.items()}


def _differences(row: RolloutRow) -> torch.Tensor:
    """Absolute difference of engine and trainer at each token that the policy drew."""
    found = (torch.tensor(row.completion.logprobs, dtype=torch.float32) - row.old.cpu()).abs()
    return found if row.own is None else found[torch.tensor(row.own)]


def mean_load(results: list[StepResult]) -> list[list[float]]:
    """Expert load of a rollout's updates, averaged; empty where nothing is counted."""
    loads = [torch.tensor(result.expert_load) for result in results if result.expert_load]
    return torch.stack(loads).mean(0).tolist() if loads else []
