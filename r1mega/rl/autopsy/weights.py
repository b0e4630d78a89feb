"""Does the engine have other weights? First what it says itself, then what its log-probabilities say: a tensor is assumed to be
another one, and the judge scores again.

In: a case. Out: findings of the kinds weights, routing, quantisation and staleness. Of L layers with E experts a search takes about
L E^2 / 2 + 5 passes a matrix; in a large model it first takes a layer as a whole, and ends where the case's passes do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch

from r1mega.rl.autopsy.case import Case, Finding
from r1mega.rl.autopsy.changes import EXPERT, Change, described, rounded_fp8, scales_of

LISTED = 4
WORTH_A_LOOK = 0.05
"""Share that the change of a whole layer must explain, in either direction, for its tensors to be tried one by one."""
MOST_EXPERTS = 64
"""In a layer whose pairs are tried."""

Changes = dict[str, torch.Tensor]


def weights_held(case: Case) -> list[Finding]:
    """What the engine held, from the evidence: each tensor that differs is described, and its effect measured where it is known."""
    if case.held is None or not case.held.wrong:
        return []
    names, tensors = case.held.wrong, case.held.tensors
    older = {version: read() for version, read in case.older.items()} if tensors else {}
    trainers = {name: case.judge.tensor(name) for name in case.roles if name in case.judge.places}
    changes = [
        described(name, trainers[name].cpu(), tensors[name], {key: value.cpu() for key, value in _peers(trainers, name)}, older)
        if name in tensors and name in trainers
        else Change(name, "weights", f"{name} is another one", 2)
        for name in names
    ]
    values = case.judge.score_with({name: tensor.float() for name, tensor in tensors.items()}, case.rows)
    is_known = all(name in tensors for name in names)
    most = min(change.rank for change in changes)
    told = [change for change in changes if change.rank == most] or changes
    kind, listed = told[0].kind, "; ".join(dict.fromkeys(change.what for change in told[:LISTED]))
    more = f"; and {len(told) - LISTED} more like these" if len(told) > LISTED else ""
    others = [change for change in changes if change not in told]
    kinds = dict.fromkeys(change.what.removeprefix(change.name).strip() if change.rank == 3 else "another one" for change in others)
    rest = f"; {len(others)} more: {', '.join(kinds)}" if others else ""
    effect = "with the engine's tensors the judge gives {left}" if is_known else "what it does is not known ({left} nats stay)"
    says = (
        f"the engine does not hold the trainer's weights, in {len(names)} of {case.held.asked} tensors: {listed}{more}"
        f"{rest} (mean difference {{before}} nats, {effect})"
    )
    return [case.finding(kind, [change.name for change in told], values, says, is_certain=True)]


def _peers(trainers: Mapping[str, torch.Tensor], name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of the same kind of the other experts of a layer."""
    found = EXPERT.fullmatch(name)
    for other, tensor in trainers.items() if found else ():
        same = EXPERT.fullmatch(other)
        if same and same[1] == found[1] and same[3] == found[3]:
            yield other, tensor


def expert_bias(case: Case) -> list[Finding]:
    """The bias of one layer, or of all, missing or moved by one expert."""
    names = [name for name, role in case.roles.items() if role == "bias" and case.judge.places.get(name) is not None]
    found = []
    for name in names:
        bias, layer = case.judge.tensor(name), name.split(".")[2]
        if not bias.any():
            continue
        for what, made in (
            ("does not add the expert bias", torch.zeros_like(bias)),
            ("has the expert bias moved by one", bias.roll(1)),
        ):
            says = f"the {case.side} {what} in layer {layer} (mean difference {{before}} nats, {{left}} so)"
            found.append(case.finding("routing", (name,), _scored(case, {name: made}), says))
    if len(names) > 1:
        says = f"the {case.side} does not add the expert bias in any of {len(names)} layers (mean {{before}} nats, {{left}} so)"
        none = {name: torch.zeros_like(case.judge.tensor(name)) for name in names}
        found.append(case.finding("routing", names, _scored(case, none), says))
    return _best(found)


def experts(case: Case) -> list[Finding]:
    """Two experts of a layer in each other's place."""
    layers: dict[str, dict[int, list[str]]] = {}
    for name in case.roles:
        if (found := EXPERT.fullmatch(name)) and name in case.judge.places:
            layers.setdefault(found[1], {}).setdefault(int(found[2]), []).append(name)
    tried = []
    for prefix, held in layers.items():
        if len(held) > MOST_EXPERTS:
            continue
        for left, right in itertools.combinations(sorted(held), 2):
            if not case.can_search():
                break
            swapped: Changes = {}
            for ours, theirs in zip(held[left], held[right], strict=True):
                swapped |= {ours: case.judge.tensor(theirs).clone(), theirs: case.judge.tensor(ours).clone()}
            layer = prefix.split(".")[2]
            says = f"experts {left} and {right} of layer {layer} are exchanged in {case.side} (mean {{before}} nats, {{left}} so)"
            tried.append(case.finding("routing", (f"{prefix}{left}", f"{prefix}{right}"), _scored(case, swapped), says))
    return _best(tried)


def stale(case: Case) -> list[Finding]:
    """A tensor of an older version among new ones."""
    tried = []
    for version, read in sorted(case.older.items(), reverse=True):
        tensors = {name: value for name, value in read().items() if name in case.judge.places}
        what = f"as of version {version}, the others of {case.version}"
        tried += _tensors(case, "weights", lambda name, tensors=tensors: tensors[name].float(), what, list(tensors), ())
    return _best(tried)


def wrong_scale(case: Case) -> list[Finding]:
    """A matrix whose FP8 scale is missing, or off by a power of two, alone or in an engine that is in FP8 altogether."""
    linear = [name for name, role in case.roles.items() if role == "linear" and name in case.judge.places]
    fp8 = {name: rounded_fp8(case.judge.tensor(name)) for name in linear}
    whole = _scored(case, fp8)
    says = f"the {case.side} computes with weights in FP8 (mean difference {{before}} nats, {{left}} with weights so rounded)"
    found = [case.finding("quantisation", ("all linear weights",), whole, says)]
    made: list[Finding] = []
    for base, about in (({}, ""), (fp8, ", the others rounded to FP8")):
        for what, change in (
            ("with a scale twice too large", lambda name: 2 * case.judge.tensor(name)),
            ("with a scale half as large", lambda name: case.judge.tensor(name) / 2),
            ("without its FP8 scales", lambda name: case.judge.tensor(name) / scales_of(case.judge.tensor(name))),
        ):
            with case.judge.edited(base):
                made += _tensors(case, "quantisation", change, what + about, linear, _best(made))
        if any(finding.convicts for finding in made):
            break
    return [*found, *_best(made)]


def _tensors(
    case: Case, kind: str, change: Callable[[str], torch.Tensor], what: str, names: list[str], known: tuple | list
) -> list[Finding]:
    """One tensor changed: every one in a small model; in one of many, those of layers that matter as a whole."""
    if not any(finding.convicts for finding in known) and case.can_search():
        layers: dict[str, list[str]] = {}
        for name in names:
            layers.setdefault(".".join(name.split(".")[:3]), []).append(name)
        chosen = list(layers)
        if len(layers) > 8:
            shares = {layer: _explained(case, {name: change(name) for name in held}) for layer, held in layers.items()}
            chosen = sorted((layer for layer in layers if abs(shares[layer]) > WORTH_A_LOOK), key=lambda layer: -shares[layer])
        made = []
        for layer in chosen:
            for name in layers[layer]:
                if not case.can_search():
                    break
                if torch.equal(value := change(name), case.judge.tensor(name)):
                    continue
                says = f"the {case.side} has {name} {what} (mean difference {{before}} nats, {{left}} so)"
                made.append(case.finding(kind, (name,), _scored(case, {name: value}), says))
        return made
    return []


def staleness(case: Case) -> list[Finding]:
    """Rows that are right under the weights of another version than they say."""
    misfits = [case.misfit(place, values) for place, values in enumerate(case.nominal)]
    best: list[tuple[float, int]] = [(misfit, case.version) for misfit in misfits]
    for version, read in sorted(case.older.items(), reverse=True):
        values = case.judge.score_with({name: tensor.float() for name, tensor in read().items()}, case.rows)
        best = [min(known, (case.misfit(place, made), version), key=lambda pair: pair[0]) for place, (known, made) in
                enumerate(zip(best, values, strict=True))]  # fmt: skip
    late = [place for place, (misfit, version) in enumerate(best) if version != case.version and misfit < 0.2 * misfits[place]]
    if not late:
        return []
    rows = [case.rows[place] for place in late]
    versions = sorted({best[place][1] for place in late})
    labels = sorted({drawn for row in rows for drawn, _, _ in row.versions} or {case.version})
    is_told = all(label in versions for label in labels)
    listed = ", ".join(row.name for row in rows[:LISTED]) + (f" and {len(rows) - LISTED} more" if len(rows) > LISTED else "")
    label = "and say so: the budget's stale_mean is for these" if is_told else f"and are labelled {', '.join(map(str, labels))}"
    says = (
        f"{listed} are from the weights of version {', '.join(map(str, versions))} {label} "
        "(mean difference {before} nats, under those weights {left})"
    )
    left = [best[place][0] if place in late else misfits[place] for place in range(len(misfits))]
    return [case.finding("staleness", [row.name for row in rows], left, says)]


def _scored(case: Case, changes: Changes) -> list[torch.Tensor]:
    return case.judge.score_with(changes, case.rows)


def _explained(case: Case, changes: Changes) -> float:
    return case.finding("", (), _scored(case, changes), "").explained


def _best(found: list[Finding]) -> list[Finding]:
    return [max(found, key=lambda finding: finding.explained)] if found else []
