"""Were other ids scored than those that were kept? In: a case. Out: one finding, a repair a row: moved, lost, added or changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from r1mega.rl.autopsy.case import Case, Finding, _finite
from r1mega.rl.autopsy.evidence import Row

CANDIDATES = 12
"""Ids tried at a place where one is missing: those whose log-probability is nearest to the one that was reported."""
REPAIRED = 0.1
"""Share of a row's difference that a repair may leave."""
LEAST_TOKENS = 3
"""That a repair must explain besides the one that it chooses."""


def tokens(case: Case) -> list[Finding]:
    """Rows that some edit of the ids, or of their order, explains."""
    misfits = [case.misfit(place, values) for place, values in enumerate(case.nominal)]
    usual = sorted(misfits)[len(misfits) // 4]
    told, values, where = [], list(misfits), []
    for place, row in enumerate(case.rows):
        if misfits[place] < 10 * usual and misfits[place] < 0.5 * max(misfits):
            continue
        best = min(_repairs(case, place, row), default=(misfits[place], ""), key=lambda repair: repair[0])
        if best[0] <= REPAIRED * misfits[place]:
            values[place] = best[0]
            where.append(row.name)
            told.append(f"{row.name}: {best[1]}")
    if not told:
        return []
    more = f" and {len(told) - 3} more rows" if len(told) > 3 else ""
    says = (
        f"the ids that the {case.side} scored are not those that were kept: {'; '.join(told[:3])}{more} "
        "(mean difference {before} nats, {left} with that put right)"
    )
    return [case.finding("tokens", where, values, says)]


def _repairs(case: Case, place: int, row: Row) -> Iterator[tuple[float, str]]:
    """(misfit that is left, scaled to the whole row; what was wrong) of each edit."""
    seen, nominal = case.suspect(row), case.nominal[place]
    for shift in (1, -1):
        theirs, ours = (seen[:-1], nominal[1:]) if shift == 1 else (seen[1:], nominal[:-1])
        own = row.own_T[:-1] & row.own_T[1:]
        if int(own.sum()) >= LEAST_TOKENS:
            yield (
                _scaled(theirs - ours, own, row),
                f"log-probabilities are moved by one place to the {'left' if shift == 1 else 'right'}",
            )
    prompts = {
        "its first prompt token was left out": row.prompt[1:],
        "its first prompt token was there twice": row.prompt[:1] + row.prompt,
        "its last prompt token was left out": row.prompt[:-1],
        "its last prompt token was there twice": row.prompt + row.prompt[-1:],
    }
    for what, prompt in prompts.items():
        if prompt and len(row.tokens) >= LEAST_TOKENS:
            yield case.misfit(place, case.judge.score([replace(row, prompt=prompt)])[0]), what
    difference = _finite((seen - nominal).abs())
    bad = torch.nonzero((difference > 0.2 * difference[row.own_T].max()) & row.own_T)[:, 0].tolist()
    if bad and case.can_search():
        for at in {bad[0], max(bad[0] - 1, 0)}:
            yield from _at(case, row, seen, at)


def _at(case: Case, row: Row, seen: torch.Tensor, at: int) -> Iterator[tuple[float, str]]:
    """An id lost, added or changed at ``at``."""
    count, rest = len(row.tokens), torch.ones_like(row.own_T)
    rest[at] = False
    rest &= row.own_T
    if int(rest[at:].sum()) >= LEAST_TOKENS:
        # added: what was scored is one shorter, and the last log-probability is of an id that is gone
        without = replace(row, tokens=row.tokens[:at] + row.tokens[at + 1 :], support=None)
        scored = case.judge.score([without])[0]
        yield _scaled(seen[: count - 1] - scored, row.own_T[: count - 1], row), f"the id at response place {at} was not there"
        logits = next(iter(case.judge.logits([row])))[at] / case.judge.temperature
        near = (torch.log_softmax(logits, -1) - seen[at].to(logits.device)).abs().argsort()[:CANDIDATES].tolist()
        lost = [replace(row, tokens=(row.tokens[:at] + [id_] + row.tokens[at:])[:count], support=None) for id_ in near]
        changed = [replace(row, tokens=row.tokens[:at] + [id_] + row.tokens[at + 1 :], support=None) for id_ in near]
        for made, what in ((lost, "is lost before"), (changed, "was scored at")):
            for id_, scored in zip(near, case.judge.score(made), strict=True):
                yield _scaled(seen - scored, rest, row), f"id {id_} {what} response place {at}"


def _scaled(difference: torch.Tensor, own: torch.Tensor, row: Row) -> float:
    """The misfit over ``own`` places as if it were of all the row's own tokens."""
    found = _finite(difference.abs())[own]
    return float(found.mean()) * int(row.own_T.sum()) if len(found) else float("inf")
