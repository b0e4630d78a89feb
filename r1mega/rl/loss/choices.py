"""Registered policy losses and their knobs; the equations are in :mod:`r1mega.rl.loss.objective`. Imports no torch.

Each choice's defaults are its paper's constants. All have the same knobs, so that a correction, a KL or an aggregation of one
method can be had with another's ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from r1mega.config.knob import above, at_least, between, knob, one_of
from r1mega.registry import register

if TYPE_CHECKING:
    import torch

    from r1mega.rl.loss.inputs import LossInput
    from r1mega.rl.loss.stats import PolicyStats

_LOW = "ratio is bound below by 1 - clip_low; from 1 on never"
_HIGH = "ratio is bound above by 1 + clip_high"
_KL = "weight of the KL to the reference; 0: no reference needed"
_MEAN = (
    "sequence: mean over each response, then over responses (R1); token: mean over all tokens of the minibatch (DAPO); "
    "constant: sum over tokens, divided by responses x longest response (Dr. GRPO)"
)
AGGREGATIONS = one_of("sequence", "token", "constant")


@dataclass(frozen=True)
class Objective:
    """Knobs that all our losses share. ``surrogate`` and ``ratio`` are what a choice is; a class of your own may set them too."""

    surrogate: ClassVar[str] = "clipped"
    """"clipped": min(r A, clip(r) A); "weighted": clip(r) A log pi, the gradient through log pi alone."""
    ratio: ClassVar[str] = "token"
    """"token": of each token; "sequence": the geometric mean over the response."""

    clip_low: float = knob(0.2, _LOW, "1", **above(0))
    clip_high: float = knob(0.2, _HIGH, "1", **above(0))
    kl_coef: float = knob(0.0, _KL, "1", **at_least(0))
    aggregation: str = knob("token", _MEAN, "name", **AGGREGATIONS)
    kl_kind: str = knob(
        "k3",
        "estimate of the KL, x = log pi/pi_ref: k1: x; k2: x^2/2; k3: 1/e^x - 1 + x (GRPO); unbiased: k3 times pi over the "
        "sampling policy (DeepSeek-V3.2)",
        "name",
        **one_of("k1", "k2", "k3", "unbiased"),
    )
    dual_clip: float = knob(
        0.0,
        "where A < 0, a token's objective is at least dual_clip x A (usual: 3); 0: no such bound",
        "1",
        rule=lambda value: value == 0 or value > 1,
        says="0 or above 1",
    )
    distill_coef: float = knob(
        0.0,
        "on-policy distillation: each token's advantage is lowered by distill_coef x log pi/pi_teacher (usual: 1); 0: no teacher",
        "1",
        **at_least(0),
    )
    ratio_to: str = knob(
        "trainer",
        "pi_old of the ratio: trainer: scored anew by the weights before the update, the proximal policy of decoupled PPO; "
        "rollout: the engine's own log-probabilities, stale ones included",
        "name",
        **one_of("trainer", "rollout"),
    )
    correction: str = knob(
        "none",
        "weight w = pi_old/pi_rollout on the policy's term: truncate: min(w, correction_high) (TIS); mask: w inside "
        "[correction_low, correction_high], else 0 (IcePop, MIS); decoupled: w as it is (AReaL's decoupled PPO); none: 1",
        "name",
        **one_of("none", "truncate", "mask", "decoupled"),
    )
    correction_level: str = knob(
        "token", "w of each token (little variance), or of the whole response, their product (unbiased)", "name",
        **one_of("token", "sequence"),
    )  # fmt: skip
    correction_low: float = knob(0.5, "with correction=mask: smallest w that is kept", "1", **at_least(0))
    correction_high: float = knob(2.0, "with correction=truncate or mask: largest w", "1", **above(0))
    correction_veto: float = knob(
        0.0, "a response with one token of pi_old/pi_rollout below this is dropped (usual: 1e-4); 0: none", "1", **between(0, 1)
    )
    offpolicy_mask: float = knob(
        0.0,
        "a response with A < 0 whose mean log pi_rollout/pi is above this is dropped (DeepSeek-V3.2; its value is unpublished, "
        "usual: 0.5); 0: none",
        "nats a token",
        **at_least(0),
    )

    def build(self) -> Callable[[LossInput], tuple[torch.Tensor, PolicyStats]]:
        """:func:`r1mega.rl.loss.objective.policy_loss` with this choice's knobs filled in."""
        from r1mega.rl.loss.objective import policy_loss

        return lambda given: policy_loss(given, self)


@register("policy_loss", "grpo")
@dataclass(frozen=True)
class GrpoLoss(Objective):
    """GRPO's clipped objective with the k3 KL inside the loss (arXiv 2402.03300); the defaults are R1's (arXiv 2501.12948)."""

    clip_low: float = knob(10.0, _LOW + " (R1: 10)", "1", **above(0))
    clip_high: float = knob(10.0, _HIGH + " (R1: 10; PPO: 0.2; DAPO: 0.28)", "1", **above(0))
    kl_coef: float = knob(0.001, _KL, "1", **at_least(0))
    aggregation: str = knob("sequence", _MEAN, "name", **AGGREGATIONS)


@register("policy_loss", "dapo")
@dataclass(frozen=True)
class DapoLoss(Objective):
    """DAPO (arXiv 2503.14476): more room above than below, all tokens of a minibatch weigh the same, no KL."""

    clip_low: float = knob(0.2, _LOW, "1", **above(0))
    clip_high: float = knob(0.28, _HIGH, "1", **above(0))


@register("policy_loss", "gspo")
@dataclass(frozen=True)
class GspoLoss(Objective):
    """GSPO (arXiv 2507.18071): ratio and clip of whole responses, s = (pi(o)/pi_old(o))^(1/\\|o\\|)."""

    ratio: ClassVar[str] = "sequence"

    clip_low: float = knob(3e-4, _LOW, "1", **above(0))
    clip_high: float = knob(4e-4, _HIGH, "1", **above(0))
    aggregation: str = knob("sequence", _MEAN, "name", **AGGREGATIONS)


@register("policy_loss", "cispo")
@dataclass(frozen=True)
class CispoLoss(Objective):
    """CISPO (arXiv 2506.13585): the ratio is a bound weight on A log pi, so that no token loses its gradient."""

    surrogate: ClassVar[str] = "weighted"

    clip_low: float = knob(1.0, _LOW + " (MiniMax-M1 binds from above only)", "1", **above(0))
    clip_high: float = knob(4.0, _HIGH + " (MiniMax-M1's is unpublished; ScaleRL: weights up to 5)", "1", **above(0))
