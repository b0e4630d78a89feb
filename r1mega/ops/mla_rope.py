"""Op ``mla_rope``: rotary positions of multi-head latent attention, with the split and the concatenation around them, in one pass.

DeepSeek-V2, arXiv 2405.04434, section 2.1.3: ``q = [q_nope; turn(q_rope)]``, ``k = [k_nope; turn(k_rope)]`` with one ``k_rope`` for
all heads. ``turn`` takes pairs ``(x[2i], x[2i + 1])`` to ``(x[2i] cos_i - x[2i + 1] sin_i, x[2i + 1] cos_i + x[2i] sin_i)``, all
first numbers before all second ones: how Megatron-Core and the published weights have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.ops.library import Case, Op


class Turned(NamedTuple):
    """What attention reads: query and key ``[S, B, H, nope + rope]``, value ``[S, B, H, v]``; all contiguous."""

    query_SBHd: torch.Tensor
    key_SBHd: torch.Tensor
    value_SBHv: torch.Tensor


def mla_rope(
    query: torch.Tensor, key_value: torch.Tensor, shared_key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, nope: int
) -> Turned:
    """Query, key and value of attention from MLA's projections.

    ``query``: ``[S, B, H, nope + rope]``; ``key_value``: ``[S, B, H, nope + v]``, each head's key part, then its value;
    ``shared_key``: ``[S, B, rope]``. All of one floating dtype, any strides (a dense last dimension is not copied). Query and
    key_value may differ in H, 0 among them: where a rank's queries are a part of the sequence whose keys it holds, each side has a
    call of its own. ``cos`` and ``sin``: fp32 (fp64 with fp64), ``[S, rope / 2]``, of a place's angles, times YaRN's mscale where
    there is one: a number a pair, since both halves of Megatron's ``[S, rope]`` are the same.

    Turned in fp32 (fp64 for fp64), each number rounded once; all else is copied. The gradient of ``shared_key`` is the fp32 sum
    over the heads in one order, turned back and rounded once; ``cos`` and ``sin`` have none. The same input gives the same bits,
    forward and backward.
    """
    return Turned(*MLA_ROPE.packet(query, key_value, shared_key, cos, sin, nope))


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _turn(x, cos, sin):
    """``[S, B, H, rope]`` with the angles of ``[S, rope / 2]``."""
    cos, sin = (table.detach()[:, None, None].to(_wide(x).dtype) for table in (cos, sin))
    first, second = _wide(x)[..., 0::2], _wide(x)[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _turn_back(x, cos, sin, dtype):
    cos, sin = (table.detach()[:, None, None].to(_wide(x).dtype) for table in (cos, sin))
    first, second = _wide(x).chunk(2, dim=-1)
    return torch.stack([first * cos + second * sin, second * cos - first * sin], dim=-1).flatten(-2).to(dtype)


def _reference(query, key_value, shared_key, cos, sin, nope):
    turned = torch.cat([query[..., :nope], _turn(query[..., nope:], cos, sin)], dim=-1)
    shared = _turn(shared_key.unsqueeze(2), cos, sin).expand(-1, -1, key_value.shape[2], -1)
    key = torch.cat([key_value[..., :nope], shared], dim=-1)
    return turned, key, key_value[..., nope:].clone(memory_format=torch.contiguous_format)


def _backward_reference(grad_query, grad_key, grad_value, cos, sin, nope):
    dtype = grad_query.dtype
    query = torch.cat([grad_query[..., :nope], _turn_back(grad_query[..., nope:], cos, sin, dtype)], dim=-1)
    both = torch.cat([grad_key[..., :nope], grad_value], dim=-1)
    shared = _turn_back(_wide(grad_key[..., nope:]).sum(2, keepdim=True), cos, sin, dtype).squeeze(2)
    return query, both, shared


def _fake(query, key_value, shared_key, cos, sin, nope):
    heads = key_value.shape[:3]
    key = query.new_empty(*heads, query.shape[3])
    return query.new_empty(query.shape), key, query.new_empty(*heads, key_value.shape[3] - nope)


def _backward_fake(grad_query, grad_key, grad_value, cos, sin, nope):
    both = grad_value.new_empty(*grad_value.shape[:3], nope + grad_value.shape[3])
    return grad_query.new_empty(grad_query.shape), both, grad_key.new_empty(*grad_key.shape[:2], 2 * cos.shape[1])


def _setup(ctx, inputs, output):
    *_, cos, sin, ctx.nope = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_query, grad_key, grad_value):
    cos, sin = ctx.saved_tensors
    return *MLA_ROPE_BACKWARD.packet(grad_query, grad_key, grad_value, cos, sin, ctx.nope), None, None, None


def _arguments(S, B, H, nope, rope, v, dtype, device, *, scale=1.0, strided=False, key_heads=None):
    draw = torch.Generator().manual_seed(100 * S + 10 * H + nope + rope + v)
    key_heads = H if key_heads is None else key_heads

    def numbers(*shape):
        return (torch.randn(shape, generator=draw) * scale).to(device, dtype)

    def heads(count, width):
        if not strided:
            return numbers(S, B, count, width)
        return numbers(B, count, S, width).permute(2, 0, 1, 3)  # as attention's own gradients come

    query, both = heads(H, nope + rope), heads(key_heads, nope + v)
    shared = numbers(S, B, 3 + rope)[..., 3:] if strided else numbers(S, B, rope)
    angles = torch.outer(torch.arange(S), 10000.0 ** -(torch.arange(0, rope, 2) / max(rope, 1)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = ((1.2 * table).to(device, wide) for table in (angles.cos(), angles.sin()))
    return query, both, shared, cos, sin, nope


def _case(*sizes, **how):
    return lambda dtype, device: _arguments(*sizes, dtype, device, **how)


def _backward_case(*sizes, **how):
    def make(dtype, device):
        S, B, H, nope, rope, v = sizes
        query, _, _, cos, sin, _ = _arguments(*sizes, dtype, device, **how)
        key_heads = H if how.get("key_heads") is None else how["key_heads"]
        key = _arguments(S, B, key_heads, nope, rope, v, dtype, device, **how)[0].flip(0).clone()
        value = _arguments(S, B, key_heads, 0, rope, v, dtype, device, **how)[1]
        return query, key, value, cos, sin, nope

    return make


_SITUATIONS = (
    ("ordinary", (6, 2, 3, 16, 8, 16), {}),
    ("empty", (0, 2, 3, 8, 4, 8), {}),
    ("one token", (1, 1, 2, 8, 8, 8), {}),
    ("odd widths", (5, 2, 3, 7, 6, 5), {}),
    ("non-contiguous", (6, 2, 4, 16, 8, 8), {"strided": True}),
    ("all of it turned", (4, 1, 2, 0, 8, 8), {}),
    ("queries alone", (4, 2, 2, 8, 8, 8), {"key_heads": 0}),
    ("keys alone", (4, 2, 0, 8, 8, 8), {"key_heads": 3}),
    ("extreme values", (4, 1, 2, 8, 8, 8), {"scale": 1e4}),
    ("many heads", (3, 1, 130, 24, 16, 16), {}),
)


def _cases(make) -> tuple[Case, ...]:
    return tuple(Case(name, make(*sizes, **how)) for name, sizes, how in _SITUATIONS)


MLA_ROPE = Op(
    "mla_rope(Tensor query, Tensor key_value, Tensor shared_key, Tensor cos, Tensor sin, SymInt nope) "
    "-> (Tensor turned_query, Tensor key, Tensor value)",
    _reference,
    _fake,
    _setup,
    _backward,
    _cases(_case),
    exact=False,
)
MLA_ROPE_BACKWARD = Op(
    "mla_rope_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cos, Tensor sin, SymInt nope) "
    "-> (Tensor grad_query, Tensor grad_key_value, Tensor grad_shared_key)",
    _backward_reference,
    _backward_fake,
    cases=_cases(_backward_case),
    exact=False,
)
OPS = (MLA_ROPE, MLA_ROPE_BACKWARD)
