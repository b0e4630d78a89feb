"""Rules of one architecture and of its cut into ranks. In: ModelConfig, ParallelConfig; out: Violations with the nearest values.

Two facts of Megatron-Core 0.16.1 make rules: it scores an expert group by the sum of its ``top_k // topk_groups`` best experts,
where DeepSeek-V3 takes 2 and V2 takes 1; and it always normalises a sigmoid gate's weights when a token has more than one expert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from r1mega.config.errors import UserError, Violation
from r1mega.config.model import ModelConfig
from r1mega.config.run import ParallelConfig
from r1mega.config.stages import stage_violations


def divisors(number: int) -> tuple[int, ...]:
    """Divisors of ``number`` in rising order; above 10^12 not those between a million and ``number`` over a million."""
    small = [value for value in range(1, min(math.isqrt(number), 10**6) + 1) if number % value == 0]
    return tuple(sorted({*small, *(number // value for value in small)}))


def near(values: tuple[int, ...], wanted: int, num: int = 3) -> tuple[int, ...]:
    """The ``num`` values closest to ``wanted``, in rising order."""
    return tuple(sorted(sorted(values, key=lambda value: (abs(value - wanted), value))[:num]))


def multiples(step: int, wanted: int) -> tuple[int, ...]:
    """The multiples of ``step`` next to ``wanted``, from one ``step`` on."""
    low = wanted // step * step
    return (low, low + step) if low else (step,)


def check_model(model: ModelConfig, parallel: ParallelConfig | None = None, num_stages: int | None = None) -> None:
    """Raise UserError, a line each, for an architecture that cannot be built or cut into these ranks (a checkpoint's model too)."""
    lines = [str(found) for found in model_violations(model, parallel or ParallelConfig(), num_stages=num_stages)]
    if lines:
        raise UserError("\n".join(lines))


def model_violations(
    model: ModelConfig, parallel: ParallelConfig, world: int = 0, num_stages: int | None = None
) -> Iterator[Violation]:
    """Every broken rule of ``model`` under ``parallel``. Fields are assumed to keep their own rules.

    ``world``: processes of the run, which limits the degrees that a way out may name; 0 where nobody knows yet. ``num_stages``:
    pipeline stages over all ranks; None: one a pipeline rank.
    """
    m = model
    if m.qk_rope_head_dim % 2:
        even = (m.qk_rope_head_dim - 1, m.qk_rope_head_dim + 1)
        rule = "even, rotary positions turn pairs"
        yield Violation("model.qk_rope_head_dim", rule, m.qk_rope_head_dim, (("model.qk_rope_head_dim", even),))
    if m.vocab_padding >= m.vocab_size:
        rule = f"below model.vocab_size {m.vocab_size}, of which it is a part"
        yield Violation("model.vocab_padding", rule, m.vocab_padding, (("model.vocab_padding", (0,)),))
    if m.first_k_dense > m.num_layers:
        rule = f"at most model.num_layers {m.num_layers}"
        yield Violation("model.first_k_dense", rule, m.first_k_dense, (("model.first_k_dense", (m.num_layers,)),))
    if m.yarn.factor > 1 and m.max_position_embeddings > m.yarn.factor * m.yarn.original_max_position_embeddings:
        longest = int(m.yarn.factor * m.yarn.original_max_position_embeddings)
        rule, fixes = (
            "at most yarn.factor x yarn.original_max_position_embeddings",
            (("model.max_position_embeddings", (longest,)),),
        )
        yield Violation("model.max_position_embeddings", rule, m.max_position_embeddings, fixes)
    if m.first_k_dense < m.num_layers or m.num_mtp_layers:
        yield from _router(m)
    yield from _cut(m, parallel, world)
    yield from _stages(m, parallel, world, num_stages or parallel.pipeline)


def _router(m: ModelConfig) -> Iterator[Violation]:
    fault = _routing_fault(m)
    if fault:
        field, rule = fault
        sizes = {
            "top_k": range(1, m.num_experts + 1),
            "topk_groups": range(1, m.num_groups + 1),
            "num_groups": divisors(m.num_experts),
        }
        fixes = []
        for name in (field, *(other for other in sizes if other != field)):
            right = tuple(value for value in sizes[name] if _routing_fault(dataclasses.replace(m, **{name: value})) is None)
            fixes.append((f"model.{name}", near(right, getattr(m, name))))
        hint = "" if any(values for _, values in fixes) else "or model.num_groups=1 with model.topk_groups=1"
        yield Violation(f"model.{field}", rule, getattr(m, field), tuple(fixes), hint)
    if m.score_function == "sigmoid" and m.top_k > 1 and not m.norm_topk_prob:
        rule = "true, since Megatron normalises a sigmoid gate with top_k above 1"
        yield Violation("model.norm_topk_prob", rule, "false", (("model.norm_topk_prob", (True,)),))
    if m.score_function == "softmax" and m.top_k == 1 and m.norm_topk_prob:
        rule = "false with the softmax gate and model.top_k 1, whose only weight is no share"
        yield Violation("model.norm_topk_prob", rule, "true", (("model.norm_topk_prob", (False,)),))
    if m.score_function == "softmax" and m.use_expert_bias:
        yield Violation("model.use_expert_bias", "false with the softmax gate", "true", (("model.use_expert_bias", (False,)),))


def _routing_fault(m: ModelConfig) -> tuple[str, str] | None:
    """(field, rule) of the first broken rule of top-k and groups, or None."""
    if m.top_k > m.num_experts:
        return "top_k", f"at most model.num_experts {m.num_experts}"
    if m.num_experts % m.num_groups:
        return "num_groups", f"divides model.num_experts {m.num_experts}"
    if m.topk_groups > m.num_groups:
        return "topk_groups", f"at most model.num_groups {m.num_groups}"
    if m.num_groups == 1:
        return None
    reach, best = m.topk_groups * (m.num_experts // m.num_groups), 1 if m.score_function == "softmax" else 2
    if m.top_k > reach:
        return "top_k", f"at most the {reach} experts of the {m.topk_groups} groups kept"
    if m.top_k % m.topk_groups:
        return "top_k", f"a multiple of model.topk_groups {m.topk_groups}"
    if m.top_k // m.topk_groups != best:
        return "top_k", (
            f"{best} x model.topk_groups {m.topk_groups}, since Megatron scores a group by its top_k / topk_groups best "
            f"experts and DeepSeek's {m.score_function} gate by its best {best}"
        )
    return None


def _cut(m: ModelConfig, parallel: ParallelConfig, world: int) -> Iterator[Violation]:
    """Degrees against the architecture. gcd(n, 0) is n: without a world every divisor is a way out."""
    tensor, expert, inside = parallel.tensor, parallel.expert, parallel.expert_tensor
    tensor_ranks, expert_ranks = world // (parallel.pipeline * parallel.context), world // parallel.pipeline
    for name in ("num_heads", "vocab_size", "ffn_size"):
        value = getattr(m, name)
        if value % tensor:
            degrees = near(divisors(math.gcd(value, tensor_ranks)), tensor)
            fixes = (("parallel.tensor", degrees), (f"model.{name}", multiples(tensor, value)))
            yield Violation(f"model.{name}", f"a multiple of parallel.tensor {tensor}", value, fixes)
    shared = m.num_shared_experts * m.moe_ffn_size
    if shared % tensor:
        rule = f"num_shared_experts x moe_ffn_size is a multiple of parallel.tensor {tensor}"
        degrees = near(divisors(math.gcd(shared, tensor_ranks)), tensor)
        yield Violation("model.moe_ffn_size", rule, shared, (("parallel.tensor", degrees),))
    if m.num_experts % expert:
        degrees = near(divisors(math.gcd(m.num_experts, expert_ranks // inside)), expert, 6)
        yield Violation("parallel.expert", f"divides model.num_experts {m.num_experts}", expert, (("parallel.expert", degrees),))
    if m.moe_ffn_size % inside:
        degrees = near(divisors(math.gcd(m.moe_ffn_size, expert_ranks // expert)), inside)
        rule = f"divides model.moe_ffn_size {m.moe_ffn_size}"
        yield Violation("parallel.expert_tensor", rule, inside, (("parallel.expert_tensor", degrees),))


def suits(m: ModelConfig, axis: str, degree: int) -> bool:
    """True where ``m`` can be cut into ``degree`` parts along ``axis``: for ways out that name one."""
    if axis == "pipeline":
        return degree <= m.num_layers
    sizes = {
        "tensor": (m.num_heads, m.vocab_size, m.ffn_size, m.num_shared_experts * m.moe_ffn_size),
        "expert": (m.num_experts,),
        "expert_tensor": (m.moe_ffn_size,),
    }
    return all(size % degree == 0 for size in sizes.get(axis, ()))


def _stages(m: ModelConfig, parallel: ParallelConfig, world: int, num_stages: int) -> Iterator[Violation]:
    """Pipeline stages against the layers: as many layers a stage as one likes, but one at least."""
    if num_stages <= m.num_layers:
        yield from stage_violations(m, num_stages, parallel.stages)
        return
    ranks, chunks = parallel.pipeline, num_stages // parallel.pipeline
    others = math.lcm(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)
    fits = tuple(num for num in range(1, m.num_layers // chunks + 1) if world // others % num == 0)
    rule = f"at most a stage a layer: parallel.pipeline x {chunks} stages a rank is at most model.num_layers {m.num_layers}"
    got = f"{ranks} x {chunks} = {num_stages}" if chunks > 1 else ranks
    fixes = (("parallel.pipeline", near(fits, ranks)), ("model.num_layers", (num_stages,)))
    yield Violation("parallel.pipeline", rule if chunks > 1 else f"at most model.num_layers {m.num_layers}", got, fixes)
