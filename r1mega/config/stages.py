"""Which part of a model each pipeline stage holds: from ``parallel.stages``, or cut by work. Pure arithmetic; imports no torch.

In: a ModelConfig, the number of stages, the text or None. Out: a :class:`StagePlan` a stage, or Violations of ``parallel.stages``.

The text has Megatron's letters: ``E`` embedding, ``t`` layer, ``m`` MTP block, ``L`` head and loss, ``|`` between stages. ``X*3``
is ``XXX``, where X is a letter or a group in parentheses: ``Ettt|(tt|)*28ttmL``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.config.errors import UserError, Violation
from r1mega.config.model import ModelConfig

LONGEST = 100_000
"""Letters of a text that is written out, so that ``t*999999999`` is an error and not a lack of memory."""

_KEY = "parallel.stages"
_TOKEN = re.compile(r"[EtmL|()]|\*\d+")


@dataclass(frozen=True)
class StagePlan:
    """What one stage holds: ``num_layers`` decoder layers from ``first_layer`` on (counted from 0), and the parts at the ends."""

    first_layer: int
    num_layers: int
    embedding: bool = False
    head: bool = False
    mtp: bool = False

    def __str__(self) -> str:
        return "E" * self.embedding + "t" * self.num_layers + "m" * self.mtp + "L" * self.head


def plan(model: ModelConfig, num_stages: int, text: str | None = None) -> tuple[StagePlan, ...]:
    """What each of ``num_stages`` stages holds: as ``text`` says, or cut so that the fullest stage has the least work.

    Raises UserError where there are fewer layers than stages, or where ``text`` breaks a rule.
    """
    found = list(stage_violations(model, num_stages, text))
    if found:
        raise UserError("\n".join(map(str, found)))
    if text is None:
        return _even(model, num_stages)
    counts = [stage.count("t") for stage in spelled(text).split("|")]
    return _planned(model, counts)


def automatic(num_layers: int, num_stages: int, head_cost: float = 0.0, mtp_cost: float = 0.0) -> list[int]:
    """Layers of each stage, so that the fullest stage has the least work, the next fullest too, and so on.

    A layer costs 1, the embedding nothing; the last stage also has ``head_cost`` and ``mtp_cost``, in layers. Every stage has a
    layer. Among equals the later stages get more layers: a schedule keeps more microbatches in flight on the earlier ones.
    Raises UserError for fewer layers than stages.
    """
    if not 1 <= num_stages <= num_layers:
        raise UserError(f"parallel.pipeline: at most a stage a layer; got {num_stages} stages for {num_layers} layers; use fewer")
    extra, others = head_cost + mtp_cost, num_stages - 1
    if not others:
        return [num_layers]
    even = math.floor((num_layers - others * extra) / num_stages)  # where the last stage is as full as the mean of the others
    best = None
    for last in sorted({min(max(even + step, 1), num_layers - others) for step in range(-2, 3)}):
        low, more = divmod(num_layers - last, others)
        counts = [low] * (others - more) + [low + 1] * more + [last]
        loads = sorted([float(count) for count in counts[:-1]] + [last + extra], reverse=True)
        if best is None or (loads, counts) < best:
            best = (loads, counts)
    return best[1]


def head_cost(model: ModelConfig) -> float:
    """Work of the head in layers: its weights, vocab_size x hidden_size, over the weights that a token meets in a layer."""
    return model.vocab_size * model.hidden_size / _layer_weights(model)


def mtp_cost(model: ModelConfig) -> float:
    """Work of the MTP block in layers: a layer, the projection of 2 x hidden_size to hidden_size, the head once more; 0 without."""
    return model.num_mtp_layers * (1 + 2 * model.hidden_size**2 / _layer_weights(model) + head_cost(model))


def _layer_weights(model: ModelConfig) -> float:
    """Weights that a token meets in a layer, the mean of all layers. Attention's scores are not in: they grow with the sequence."""
    hidden, heads = model.hidden_size, model.num_heads
    query_size = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    query = hidden * query_size if model.q_lora_rank is None else model.q_lora_rank * (hidden + query_size)
    latent = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    key_value = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = query + latent + key_value + heads * model.v_head_dim * hidden
    num_dense = min(model.first_k_dense, model.num_layers)
    width = num_dense * model.ffn_size
    width += (model.num_layers - num_dense) * (model.top_k + model.num_shared_experts) * model.moe_ffn_size
    return attention + 3 * hidden * width / model.num_layers


def written(stages: tuple[StagePlan, ...]) -> str:
    """The text of ``stages``, as ``parallel.stages`` takes it."""
    return "|".join(map(str, stages))


def spelled(text: str) -> str:
    """``text`` with every repetition written out: ``E(t|)*2tL`` is ``Et|t|tL``. Raises ValueError that says what is wrong."""
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"{text[place]!r} at character {place + 1}")
        tokens.append(match[0])
        place = match.end()
    groups = [""]  # of every open parenthesis what it holds so far
    last = ""  # what a * would repeat
    for token in tokens:
        if token == "(":
            groups.append("")
            last = ""
            continue
        if token == ")":
            if len(groups) == 1:
                raise ValueError("a ) without its (")
            last = groups.pop()
        elif token.startswith("*"):
            if not last:
                raise ValueError(f"{token} behind no letter or group")
            num = int(token[1:]) if len(token) < 9 else LONGEST + 1
            if num < 1 or num * len(last) > LONGEST:
                raise ValueError(f"{token}, which is not 1 to {LONGEST // len(last)}")
            groups[-1] += last * (num - 1)
            last = ""
            continue
        else:
            last = token
        groups[-1] += last
        if len(groups[-1]) > LONGEST:
            raise ValueError(f"more than {LONGEST} letters")
    if len(groups) > 1:
        raise ValueError("a ( without its )")
    return groups[0]


def stage_violations(model: ModelConfig, num_stages: int, text: str | None) -> Iterator[Violation]:
    """Broken rules of ``num_stages`` stages, and of ``text`` where one is given. Fields of ``model`` keep their own rules."""
    if num_stages > model.num_layers:
        rule = f"at most a stage a layer, model.num_layers {model.num_layers}"
        yield Violation("parallel.pipeline", rule, f"{num_stages} stages", hint="use fewer pipeline ranks or stages a rank")
    elif text is not None:
        fault = _fault(model, num_stages, text)
        if fault:
            way = f"or 'parallel.stages={written(_even(model, num_stages))}'" if model.num_layers <= LONGEST else ""
            yield Violation(_KEY, *fault, ((_KEY, ("null",)),), way)


def _fault(model: ModelConfig, num_stages: int, text: str) -> tuple[str, str] | None:
    """(rule, what was given) of the first broken rule of ``text``."""
    try:
        stages = spelled(text).split("|")
    except ValueError as error:
        return "the letters E, t, m, L, | between stages, *N behind a letter or (group)", f"{text} ({error})"
    first, last, num_mtp = stages[0], stages[-1], model.num_mtp_layers
    joined = "".join(stages)
    if len(stages) != num_stages:
        return (
            f"{num_stages} stages, parallel.pipeline x stages a rank, with | between them",
            f"{text or repr(text)} ({len(stages)})",
        )
    if not first.startswith("E") or joined.count("E") > 1:
        return "E once, at the start of the first stage", text
    if not last.endswith("L") or joined.count("L") > 1:
        return "L once, at the end of the last stage", text
    if joined.count("m") != num_mtp:
        return f"as many m as model.num_mtp_layers, {num_mtp}", f"{text} ({joined.count('m')})"
    if num_mtp and not last.endswith("mL"):
        return "m in the last stage before L, since the MTP block shares the head", text
    if joined.count("t") != model.num_layers:
        return f"as many t as model.num_layers, {model.num_layers}", f"{text} ({joined.count('t')})"
    empty = [str(stage_idx + 1) for stage_idx, stage in enumerate(stages) if "t" not in stage]
    if empty:
        return "a layer t in every stage", f"{text} (none in stage {', '.join(empty)})"
    return None


def _even(model: ModelConfig, num_stages: int) -> tuple[StagePlan, ...]:
    return _planned(model, automatic(model.num_layers, num_stages, head_cost(model), mtp_cost(model)))


def _planned(model: ModelConfig, counts: list[int]) -> tuple[StagePlan, ...]:
    firsts = [sum(counts[:stage_idx]) for stage_idx in range(len(counts))]
    end = len(counts) - 1
    return tuple(
        StagePlan(first, count, embedding=idx == 0, head=idx == end, mtp=idx == end and model.num_mtp_layers > 0)
        for idx, (first, count) in enumerate(zip(firsts, counts, strict=True))
    )
