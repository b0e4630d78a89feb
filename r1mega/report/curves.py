"""What a metric line's numbers are called: titles, axis labels with units, how they are drawn. One table for every page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STEP, UPDATE, STAGE = "optimizer step (count)", "optimizer update (count)", "stage (name)"


@dataclass(frozen=True)
class Curve:
    """One key of ``metrics.jsonl``. ``factor``: from the line's value to the axis's unit; ``more``: arguments of ``line_plot``."""

    key: str
    title: str
    y_label: str
    factor: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The unit as the axis has it, in parentheses."""
        return self.y_label[self.y_label.rindex("(") :]


_SHARE, _RARE = {"y_range": (0.0, 100.0)}, {"y_range": (0.0, 5.0)}
_GAP = {"log_y": True, "note": "Trainer's against generator's log probability of the same token; logarithmic axis."}

LOSS = Curve("lm_loss", "Loss", "loss (nats per token)")
VALID_LOSS = Curve("valid_loss", "Loss on held-out data", "loss (nats per token)")
MTP_LOSS = Curve("mtp_loss", "Multi-token prediction loss", "loss (nats per token)")
GRAD_NORM = Curve("grad_norm", "Gradient norm", "gradient norm (no unit)", more={"y_range": (0.0, 0.0)})
SPEED = Curve("tokens_per_second", "Throughput", "throughput (tokens / second)", more={"y_range": (0.0, 1.0)})
RATE = Curve("lr", "Learning rate", "learning rate (no unit)", more={"y_range": (0.0, 0.0)})
REWARD = Curve("reward", "Reward", "mean reward (points)")

REWARDS = (
    REWARD,
    Curve("accuracy", "Accuracy on training problems", "correct (% of responses)", 100.0, _SHARE),
    Curve("valid_pass_at_1", "Held-out problems: pass@1", "correct (% of responses)", 100.0, _SHARE),
    Curve("valid_response_length", "Held-out problems: response length", "response length (tokens)", more={"y_range": (0.0, 1.0)}),
    Curve("format", "Format", "right format (% of responses)", 100.0, _SHARE),
    Curve("response_length", "Response length", "response length (tokens)", more={"y_range": (0.0, 1.0)}),
    Curve("response_length_max", "Longest response", "response length (tokens)", more={"y_range": (0.0, 1.0)}),
    Curve("truncated", "Truncated responses", "cut off (% of responses)", 100.0, _RARE),
    Curve("flat_groups", "Groups without a signal", "equal rewards (% of groups)", 100.0, _RARE),
    Curve("dropped_groups", "Groups left out", "dropped / trained on (ratio)", more={"y_range": (0.0, 0.0)}),
)
HEALTH = (
    Curve("kl", "KL to the reference", "KL (nats per token)"),
    Curve("entropy", "Entropy", "entropy (nats per token)", more={"y_range": (0.0, 0.0)}),
    Curve("clip_share", "Clipped ratios", "clipped (% of tokens)", 100.0, {"y_range": (0.0, 1.0)}),
    Curve("rollout_diff_max", "Train / rollout difference, largest", "|log p difference| (nats)", more=_GAP),
    Curve("rollout_diff_mean", "Train / rollout difference, mean", "|log p difference| (nats)", more=_GAP),
    Curve("staleness", "Staleness, mean of all tokens", "weights behind (updates)", more={"y_range": (0.0, 1.0)}),
    Curve("staleness_max", "Staleness, largest", "weights behind (updates)", more={"y_range": (0.0, 1.0)}),
    GRAD_NORM,
)
PACE = (
    Curve("generated_tokens_per_second", "Generation", "generated (tokens / second)", more={"y_range": (0.0, 1.0)}),
    SPEED,
    Curve("idle_share", "Trainer waits for responses", "waiting (% of the time)", 100.0, _SHARE),
    Curve("engine_idle_share", "Engine without work", "idle (% of the time)", 100.0, _SHARE),
    Curve("push_seconds", "Weight push", "time (seconds)", more={"y_range": (0.0, 0.0)}),
    Curve("push_gbps", "Weight push, speed", "sent (GB / second)", more={"y_range": (0.0, 0.0)}),
    Curve("reward_seconds", "Judging", "time (seconds)", more={"y_range": (0.0, 0.0)}),
    Curve("slowest_reward_seconds", "Slowest call of a reward", "time (seconds)", more={"y_range": (0.0, 0.0)}),
)
OTHERS = (
    Curve("loss", "Objective", "what is minimised (no unit)"),
    Curve("aux_loss", "Balance loss", "balance loss (no unit)"),
    Curve("balancedness_before", "Expert balance before a move", "mean / largest load of a rank (%)", 100.0, _SHARE),
    Curve("balancedness_after", "Expert balance after it", "mean / largest load of a rank (%)", 100.0, _SHARE),
    Curve("reward_std", "Spread of rewards", "standard deviation (points)", more={"y_range": (0.0, 0.0)}),
    Curve("reward_failed", "Failed rewards", "failed (% of responses)", 100.0, _RARE),
    Curve("mfu", "Share of the peak", "MFU (% of peak)", 100.0, {"y_range": (0.0, 1.0)}),
    Curve("step_seconds", "Time per step", "time (seconds)", more={"y_range": (0.0, 0.0)}),
    Curve("peak_gib", "Peak memory", "memory (GiB)", more={"y_range": (0.0, 1.0)}),
    Curve("peak_pass_gib", "Peak memory, forward and backward", "memory (GiB)", more={"y_range": (0.0, 1.0)}),
    Curve("peak_update_gib", "Peak memory, optimizer", "memory (GiB)", more={"y_range": (0.0, 1.0)}),
    Curve("batch", "Batch", "batch (sequences)", more={"y_range": (0.0, 1.0)}),
    Curve("tokens", "Tokens", "tokens so far (count)"),
)
EVERY = (LOSS, VALID_LOSS, MTP_LOSS, *REWARDS, *HEALTH, *PACE, RATE, *OTHERS)
"""All that have a name, in reading order; a report shows those before OTHERS, a comparison all."""
