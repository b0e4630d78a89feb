"""Is it the same logits under another reading: no temperature, twice the temperature, renormalised over top-p or top-k?

In: a case. Out: findings, the numbers (which temperature, which p or k) read off the difference itself.
"""

from __future__ import annotations

import math

import torch

from r1mega.rl.autopsy.case import Case, Finding
from r1mega.rl.autopsy.judge import logprobs

COARSE, FINE = 25, 12
LOWEST, HIGHEST = 0.2, 5.0
"""Temperatures among which a fit looks."""
LEAST_LOSS = 1e-3
"""Nats that renormalising has to add somewhere, to be looked at."""


def sampling(case: Case) -> list[Finding]:
    """Temperature first, then what cuts the distribution."""
    logits = [made for made in case.judge.logits(case.rows)]
    return [*_temperatures(case, logits), *_cuts(case, logits)]


def _temperatures(case: Case, logits: list[torch.Tensor]) -> list[Finding]:
    own = case.judge.temperature

    def at(temperature: float, *, with_support: bool = True) -> list[torch.Tensor]:
        pairs = zip(logits, case.rows, strict=True)
        return [logprobs(made, row, temperature, with_support=with_support).cpu() for made, row in pairs]

    def misfit(temperature: float) -> float:
        return sum(case.misfit(place, values) for place, values in enumerate(at(temperature)))

    known = {}
    if own != 1:
        known |= {1.0: f"the {case.side} does not apply the temperature {own:g}", own * own: f"the {case.side} applies it twice"}
    found = []
    for temperature, what in known.items():
        says = f"{what}: its log-probabilities are those at {temperature:g} (mean difference {{before}} nats, there {{left}})"
        found.append(case.finding("sampling", (f"temperature {temperature:g}",), at(temperature), says))
    if any(row.support for row in case.rows):
        says = f"the {case.side} tells raw log-probabilities, not those of the tokens kept (mean {{before}} nats, raw {{left}})"
        found.append(case.finding("sampling", ("support",), at(own, with_support=False), says))
    if not any(finding.convicts for finding in found):
        best = _least(misfit)
        says = f"the {case.side} has another temperature, {best:.4g} where {own:g} is due (mean {{before}} nats, there {{left}})"
        found.append(case.finding("sampling", (f"temperature {best:.4g}",), at(best), says))
    return found


def _least(misfit) -> float:
    """Where a function of the temperature is least: a grid of logarithms, then ever finer ones."""
    low, high = math.log(LOWEST), math.log(HIGHEST)
    count = COARSE
    for _ in range(4):
        grid = torch.linspace(low, high, count, dtype=torch.float64).tolist()
        best = min(grid, key=lambda value: misfit(math.exp(value)))
        low, high, count = best - (high - low) / count, best + (high - low) / count, FINE
    return math.exp(best)


def _cuts(case: Case, logits: list[torch.Tensor]) -> list[Finding]:
    """A renormalised log-probability is larger by -log of the probability that was kept: at every token, so that p and k show."""
    kept, masses = [], []
    for place, (made, row) in enumerate(zip(logits, case.rows, strict=True)):
        probs = torch.softmax(made / case.judge.temperature, -1)
        ordered = probs.sort(-1, descending=True).values
        masses.append(ordered.double().cumsum(-1).cpu())
        kept.append(torch.exp((case.nominal[place] - case.suspect(row)).double()))
    own = [row.own_T for row in case.rows]
    implied = torch.cat([values[mine] for values, mine in zip(kept, own, strict=True)])
    if not len(implied) or not bool((implied < 1 - LEAST_LOSS).any()) or bool((implied > 1 + 1e-2).any()):
        return []
    found = []
    sizes = torch.cat(
        [((mass - value[:, None]).abs().argmin(-1) + 1)[mine] for mass, value, mine in zip(masses, kept, own, strict=True)]
    )
    for k in sizes.mode().values.view(-1).tolist():
        values = [_renormalised(case, place, mass[:, k - 1]) for place, mass in enumerate(masses)]
        says = f"the {case.side} renormalises over the {k} likeliest tokens, alone (mean {{before}} nats, so {{left}})"
        found.append(case.finding("sampling", (f"top_k {k}",), values, says))
    # The nucleus is the fewest tokens of a probability of at least p, so that p is at most the least that was kept.
    least = float(implied[implied < 1 - LEAST_LOSS].min()) + 1e-6
    tried = []
    for p in sorted({least, math.floor(least * 100) / 100, math.floor(least * 20) / 20} - {0.0}, reverse=True):
        values = []
        for place, mass in enumerate(masses):
            size = (mass < p - 1e-6).sum(-1)
            values.append(_renormalised(case, place, mass.gather(1, size.clamp(max=mass.shape[1] - 1)[:, None])[:, 0]))
        says = f"the {case.side} renormalises over top-p of {p:.4g}, alone (mean {{before}} nats, so {{left}})"
        tried.append(case.finding("sampling", (f"top_p {p:.4g}",), values, says))
    best = min(tried, key=lambda finding: (round(finding.left, 6), len(finding.where[0])))  # the rounder of equals
    return [*found, best]


def _renormalised(case: Case, place: int, mass_T: torch.Tensor) -> torch.Tensor:
    return (case.nominal[place].double() - mass_T.log()).float()
