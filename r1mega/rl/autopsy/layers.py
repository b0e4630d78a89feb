"""Trainer against judge, module by module: the first one whose output differs though its inputs agree. Hooks on both sides.

In: the trainer's policy on one rank and the judge, with the same weights, and one row. Out: :class:`Point` a module in the order of
the pass, and a finding. The name table says which module of one side is which of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1mega.model import names
from r1mega.rl.autopsy.case import Case, Finding
from r1mega.rl.autopsy.evidence import Row
from r1mega.train.policy import Policy

LIMITS = {"fp32": 1e-4, "bf16": 0.06, "fp8": 0.25}
"""Relative difference of a token's vector that three of four tokens keep: rounding gives about 1e-6, 1e-2 and 6e-2."""
QUANTILE = 0.75
ROUTER = "mlp.router"


@dataclass(frozen=True)
class Point:
    """``trainer``, ``judge``: the module's paths; ``relative``: |difference| / |judge| of three of four tokens at most."""

    trainer: str
    judge: str
    relative: float


@dataclass
class _Tokens:
    """One row as a microbatch."""

    tokens_BS: torch.Tensor


def pairs(num_layers: int) -> list[tuple[str, str, bool]]:
    """(trainer's path, judge's path, its input and not its output) in the order of a pass."""
    found = [("embedding", "model.embed_tokens", False)]
    rows = {native.removesuffix(".weight"): published.removesuffix(".weight") for native, (published, _) in names.SAME.items()}
    rows = {native: published for native, published in rows.items() if native.count("expert_bias") == 0 and native != ROUTER}
    for layer in range(num_layers):
        native, published = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for ours, theirs in rows.items():
            if ours == "self_attention.linear_proj":  # what reaches it is attention's core
                found.append((native + ours, published + theirs, True))
            found.append((native + ours, published + theirs, False))
        found += [
            (native + "mlp.shared_experts", published + "mlp.shared_experts", False),
            (native + "mlp", published + "mlp", False),
        ]
        found.append((native.rstrip("."), published.rstrip("."), False))
    return [*found, ("decoder.final_layernorm", "model.norm", False)]


def compared(policy: Policy, case: Case, row: Row) -> list[Point]:
    """Every module that both sides have, in the order in which the judge calls them."""
    table = pairs(policy.model_config.num_layers)
    ours: dict[tuple[str, bool], torch.Tensor] = {}
    theirs: dict[tuple[str, bool], torch.Tensor] = {}
    inner = dict(policy.trainee.module.named_modules())
    inner = {path: module for path, module in inner.items() if any(path == native for native, _, _ in table)}

    def hook(into: dict, path: str, turned: bool):
        def keep(module, inputs, output) -> None:
            for is_input, value in ((True, inputs), (False, output)):
                value = value[0] if isinstance(value, tuple) and value else value
                if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == 1:
                    value = value[:, 0]  # transformers' latents, as its cache has them
                if isinstance(value, torch.Tensor) and value.ndim == 3:
                    into[path, is_input] = (value.transpose(0, 1) if turned else value).detach().float().cpu().clone()

        return keep

    handles = [module.register_forward_hook(hook(ours, path, True)) for path, module in inner.items()]
    try:
        with case.judge.hooked({path: hook(theirs, path, False) for _, path, _ in table}):
            list(case.judge.logits([row]))
        tokens = torch.tensor([row.prompt + row.tokens], device=policy.mesh.device.torch_device)
        policy.score([_Tokens(tokens)], lambda output, batch: torch.zeros(()))
    finally:
        for handle in handles:
            handle.remove()
    order = {key: place for place, key in enumerate(theirs)}
    found = []
    for native, published, is_input in table:
        left, right = ours.get((native, is_input)), theirs.get((published, is_input))
        if left is None or right is None:
            continue
        if left.shape != right.shape:
            continue
        found.append(
            (order[published, is_input], Point(native + (" (input)" if is_input else ""), published, relative(left, right)))
        )
    return [point for _, point in sorted(found, key=lambda pair: pair[0])]


def relative(left_BSD: torch.Tensor, right_BSD: torch.Tensor) -> float:
    """|left - right| / |right| of a token's vector, the value that three of four tokens keep."""
    shares = (left_BSD - right_BSD).norm(dim=-1) / right_BSD.norm(dim=-1).clamp(min=1e-30)
    return float(torch.quantile(torch.nan_to_num(shares.flatten(), nan=1e3, posinf=1e3), QUANTILE))


def layer(case: Case, policy: Policy, number_format: str) -> list[Finding]:
    """The first module of the trainer whose output is not the judge's; the difference counts as explained as far as the other side
    agrees with the judge."""
    worst = max(range(len(case.rows)), key=lambda place: case.misfit(place, case.nominal[place]))
    points = compared(policy, case, case.rows[worst])
    limit = LIMITS[number_format]
    first = next((idx for idx, point in enumerate(points) if not point.relative <= limit), None)
    if first is None:
        return []
    before = max((point.relative for point in points[:first]), default=0.0)
    point = points[first]
    what = point.trainer
    if what.endswith(" (input)"):
        what = what.replace("linear_proj (input)", "core_attention") + " (rotary positions, scale or mask)"
    elif what.endswith(".mlp"):
        what += " (router, experts or their sum)"
    says = (
        f"{what} is the first module of the trainer whose output differs from transformers': by {point.relative:.2g} of its size, "
        f"those before it by {before:.1g} at most (mean difference {{before}} nats, of the other side to the judge {{left}})"
    )
    other = [float(_gap(case, place).sum()) for place in range(len(case.rows))]
    return [case.finding("layer", (what.partition(" ")[0], point.judge), other, says, is_certain=True)]


def _gap(case: Case, place: int) -> torch.Tensor:
    """|other side - judge| of a row."""
    row = case.rows[place]
    other = row.trainer if case.side == "engine" else row.engine
    return (other - case.nominal[place])[row.own_T].abs()
