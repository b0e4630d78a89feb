"""The policy losses once more, written from the papers' equations over single numbers; gradients by central differences.

Plain Python in double precision, a response at a time. What an equation holds fixed (stop-gradient) is taken of ``at``, the point
where the gradient is asked for; what it differentiates of ``lp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Numbers = list[float]


@dataclass
class Response:
    """One response: log-probabilities a token by the policy, before the update, of the engine, reference and teacher."""

    lp: Numbers
    old: Numbers
    rollout: Numbers
    ref: Numbers
    teacher: Numbers
    advantage: float


def _clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def _kl(kind: str, log_pi: float, log_ref: float, log_drawn: float) -> float:
    x = log_pi - log_ref
    k3 = math.exp(log_ref - log_pi) - (log_ref - log_pi) - 1
    return {"k1": x, "k2": 0.5 * x * x, "k3": k3, "unbiased": math.exp(log_pi - log_drawn) * k3}[kind]


@dataclass
class Rule:
    """A method: how long responses are averaged, what bounds the ratio, what weighs the policy's term."""

    clip: tuple[float, float]
    surrogate: str = "clipped"  # or sequence (GSPO), weighted (CISPO)
    mean: str = "token"
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    dual: float = 0.0
    distill: float = 0.0
    stale: bool = False  # the ratio is to the engine's log-probabilities
    weight: Callable[[list[float]], list[float]] | None = None  # of the tokens' log(pi_old / pi_rollout)
    delta: float = 0.0
    max_tokens: int = 0

    def loss(self, batch: Sequence[Response], at: Sequence[Numbers], lps: Sequence[Numbers]) -> float:
        total_tokens = sum(len(r.lp) for r in batch)
        total = 0.0
        for response, fixed, lp in zip(batch, at, lps, strict=True):
            length = len(lp)
            divisor = {"sequence": length * len(batch), "token": total_tokens, "constant": len(batch) * self.max_tokens}[self.mean]
            total += self._response(response, fixed, lp) / divisor
        return total

    def _response(self, r: Response, fixed: Numbers, lp: Numbers) -> float:
        """Sum over the tokens of one response, to be divided."""
        old = r.rollout if self.stale else r.old
        n, low, high = len(lp), 1 - self.clip[0], 1 + self.clip[1]
        w = self.weight([o - e for o, e in zip(old, r.rollout, strict=True)]) if self.weight else [1.0] * n
        if self.delta and r.advantage < 0 and sum(e - f for e, f in zip(r.rollout, fixed, strict=True)) / n > self.delta:
            w = [0.0] * n
        kl = sum(self.kl_coef * _kl(self.kl_kind, lp[t], r.ref[t], r.rollout[t]) for t in range(n))
        if self.surrogate == "sequence":
            s = math.exp(sum(lp[t] - old[t] for t in range(n)) / n)
            assert len(set(w)) == 1 and not self.distill, "as a sequence's own it is one number"
            return -n * w[0] * min(s * r.advantage, _clip(s, low, high) * r.advantage) + kl
        total = kl
        for t in range(n):
            advantage = r.advantage - self.distill * (fixed[t] - r.teacher[t])
            if self.surrogate == "weighted":
                gain = _clip(math.exp(fixed[t] - old[t]), low, high) * advantage * lp[t]
            else:
                ratio = math.exp(lp[t] - old[t])
                gain = min(ratio * advantage, _clip(ratio, low, high) * advantage)
                if self.dual and advantage < 0:
                    gain = max(gain, self.dual * advantage)
            total -= w[t] * gain
        return total

    def gradient(self, batch: Sequence[Response], step: float = 1e-5) -> list[Numbers]:
        """d loss / d lp of every token."""
        at = [r.lp for r in batch]

        def moved(i: int, t: int, by: float) -> float:
            return self.loss(batch, at, [[v + by * (j == i and k == t) for k, v in enumerate(lp)] for j, lp in enumerate(at)])

        return [[(moved(i, t, step) - moved(i, t, -step)) / (2 * step) for t in range(len(r.lp))] for i, r in enumerate(batch)]


def truncated(cap: float) -> Callable[[list[float]], list[float]]:
    return lambda logs: [min(math.exp(v), cap) for v in logs]


def truncated_sequence(cap: float) -> Callable[[list[float]], list[float]]:
    return lambda logs: [min(math.prod(math.exp(v) for v in logs), cap)] * len(logs)


def masked(low: float, high: float) -> Callable[[list[float]], list[float]]:
    return lambda logs: [math.exp(v) if low <= math.exp(v) <= high else 0.0 for v in logs]


def masked_sequence(low: float, high: float) -> Callable[[list[float]], list[float]]:
    def of(logs: list[float]) -> list[float]:
        product = math.prod(math.exp(v) for v in logs)
        return [product if low <= product <= high else 0.0] * len(logs)

    return of


def vetoed(bound: float, rest: Callable[[list[float]], list[float]]) -> Callable[[list[float]], list[float]]:
    return lambda logs: [0.0] * len(logs) if any(math.exp(v) < bound for v in logs) else rest(logs)
