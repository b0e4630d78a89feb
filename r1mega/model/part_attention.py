"""Causal attention of a context rank's two query parts: over all keys (gathered), or over keys that go around the ring.

Blocks of one query part and keys that no later query part shares are computed one after another and merged by their log-sum-exp:
    out = sum_b exp(lse_b - lse) out_b,   lse = log sum_b exp(lse_b)
The backward pass computes each block anew from the merged ``out`` and ``lse`` (ring attention, arXiv 2310.01889). Key parts after
the query part are never visited. Draws nothing; sums are in a fixed order. Tensors are ``[S, B, H, width]``; ``segments_BS``:
int32 sample numbers of the whole rows, or None where every row is one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1mega.model.context import ContextPart

MOST_SCORES = 1 << 26
"""Scores of one block at once where they are written out: 256 MiB in fp32; heads take turns beyond that."""
WIDEST_HEAD = 256
"""Widest head of the fused kernel."""


@dataclass(frozen=True)
class Keys:
    """Keys and values ``[B, H, K, width]`` of the parts from ``first`` up to, not with, ``end``."""

    first: int
    end: int
    key: torch.Tensor
    value: torch.Tensor


def gathered_attention(query, key, value, segments_BS, part: ContextPart, scale: float) -> torch.Tensor:
    """``query``: own parts, ``[S / C, B, H, d]``; ``key, value``: the whole sequence in order. Returns ``[S / C, B, H, v]``."""
    return _Gathered.apply(query, key, value, segments_BS, part, scale)


def ring_attention(query, key, value, segments_BS, part: ContextPart, scale: float) -> torch.Tensor:
    """All of own parts, ``[S / C, B, H, width]``: keys and values of one rank at a time come by. Returns ``[S / C, B, H, v]``."""
    return _Ring.apply(query, key, value, segments_BS, part, scale)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, segments_BS, part, scale):
        queries = _Queries(query, segments_BS, part, scale)
        for idx in range(2):
            for keys in _spans(key, value, part, idx, segments_BS):
                queries.attend(idx, keys)
        return _finish(ctx, queries, query, key, value, segments_BS, part, scale)

    @staticmethod
    def backward(ctx, grad_out):
        queries, key, value = _resume(ctx, grad_out)
        grad_key, grad_value = _zeros_like(key), _zeros_like(value)
        size = key.shape[0] // (2 * ctx.part.size)
        for idx in range(2):
            for keys in _spans(key, value, ctx.part, idx, queries.segments_BS):
                rows = slice(keys.first * size, keys.end * size)
                for whole, grad in zip((grad_key, grad_value), queries.attend_backward(idx, keys), strict=True):
                    whole[rows] += grad.permute(2, 0, 1, 3)
        return queries.grad_query(), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, segments_BS, part, scale):
        queries = _Queries(query, segments_BS, part, scale)
        travelling = torch.cat([key, value], dim=-1)
        for step in range(part.size):
            moving = _Move(part, travelling) if step < part.size - 1 else None
            for idx, _, keys in _visits(travelling, key.shape[-1], part, step):
                queries.attend(idx, keys)
            if moving is not None:
                (travelling,) = moving.arrived()
        return _finish(ctx, queries, query, key, value, segments_BS, part, scale)

    @staticmethod
    def backward(ctx, grad_out):
        """The gradients of keys and values travel with them, each rank adds its own, and come home with a last step."""
        queries, key, value = _resume(ctx, grad_out)
        part, width = ctx.part, key.shape[-1]
        travelling = torch.cat([key, value], dim=-1)
        grads = _zeros_like(travelling)
        for step in range(part.size):
            moving = _Move(part, travelling) if step < part.size - 1 else None
            for idx, half, keys in _visits(travelling, width, part, step):
                rows = grads.chunk(2)[half]
                for place, grad in zip(
                    rows.split([width, value.shape[-1]], dim=-1), queries.attend_backward(idx, keys), strict=True
                ):
                    place += grad.permute(2, 0, 1, 3)
            (grads,) = _Move(part, grads).arrived()
            if moving is not None:
                (travelling,) = moving.arrived()
        grad_key, grad_value = grads.split([width, value.shape[-1]], dim=-1)
        return queries.grad_query(), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


class _Move:
    """Tensors on their way to the next rank of the ring, while those of the rank before come in."""

    def __init__(self, part: ContextPart, *tensors: torch.Tensor):
        ranks = dist.get_process_group_ranks(part.group)
        after, before = ranks[(part.rank + 1) % part.size], ranks[(part.rank - 1) % part.size]
        self._sent = [tensor.contiguous() for tensor in tensors]  # held until it has arrived
        self._coming = [torch.empty_like(tensor) for tensor in self._sent]
        self._work = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, tensor, after, group=part.group) for tensor in self._sent]
            + [dist.P2POp(dist.irecv, tensor, before, group=part.group) for tensor in self._coming]
        )

    def arrived(self) -> list[torch.Tensor]:
        """What came in; waits for it, and until what was sent has left."""
        for work in self._work:
            work.wait()
        return self._coming


def _spans(key, value, part: ContextPart, idx: int, segments_BS) -> Iterator[Keys]:
    """The keys that query part ``idx`` looks at, its own part first: every query sees itself, so the merge starts finite.

    Earlier parts come as one block where nothing is masked in it.
    """
    own = part.parts[idx]
    earlier = [(0, own)] if segments_BS is None else [(number, number + 1) for number in range(own)]
    size = key.shape[0] // (2 * part.size)
    for first, end in [(own, own + 1), *(span for span in earlier if own)]:
        rows = slice(first * size, end * size)
        yield Keys(first, end, *(tensor[rows].permute(1, 2, 0, 3) for tensor in (key, value)))


def _visits(travelling: torch.Tensor, width: int, part: ContextPart, step: int) -> Iterator[tuple[int, int, Keys]]:
    """(query part, which half of the visitor's rows, keys) of the blocks that the rows of the rank ``step`` before this one make.

    Late keys come first, so that in step 0 a query part starts with itself.
    """
    visitor = ContextPart((part.rank - step) % part.size, part.size)
    for idx, own in enumerate(part.parts):
        for half, number in reversed(list(enumerate(visitor.parts))):
            if number <= own:
                rows = travelling.chunk(2)[half].permute(1, 2, 0, 3)
                yield idx, half, Keys(number, number + 1, rows[..., :width], rows[..., width:])


class _Queries:
    """A rank's two query parts, and what has been merged into them so far (fp32 ``out``, ``lse``)."""

    def __init__(self, query: torch.Tensor, segments_BS: torch.Tensor | None, part: ContextPart, scale: float):
        self.dtype, self.segments_BS, self.part, self.scale = query.dtype, segments_BS, part, scale
        self.query = [half.permute(1, 2, 0, 3) for half in query.chunk(2)]
        self.out: list[torch.Tensor | None] = [None, None]
        self.lse: list[torch.Tensor | None] = [None, None]
        self.grad: list[torch.Tensor | None] = [None, None]
        self.grad_out: list[torch.Tensor] = []

    def attend(self, idx: int, keys: Keys) -> None:
        """Merge a block into query part ``idx``."""
        out, lse = _block(self.query[idx], keys, self._causal(idx, keys), self._mask(idx, keys), self.scale)
        if self.out[idx] is None:
            self.out[idx], self.lse[idx] = out, lse
            return
        before, self.lse[idx] = self.lse[idx], torch.logaddexp(self.lse[idx], lse)
        old, new = (torch.exp(each - self.lse[idx]).unsqueeze(-1) for each in (before, lse))
        self.out[idx] = self.out[idx] * old + out * new

    def attend_backward(self, idx: int, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a block's gradient to query part ``idx``; return those of its keys and values, ``[B, H, K, width]``."""
        merged = (self.out[idx], self.lse[idx], self.grad_out[idx])
        grad, *rest = _block_backward(self.query[idx], keys, *merged, self._causal(idx, keys), self._mask(idx, keys), self.scale)
        self.grad[idx] = grad if self.grad[idx] is None else self.grad[idx] + grad
        return tuple(rest)

    def grad_query(self) -> torch.Tensor:
        """The gradient of the queries, ``[S / C, B, H, d]``."""
        return torch.cat([grad.permute(2, 0, 1, 3) for grad in self.grad]).to(self.dtype)

    def _causal(self, idx: int, keys: Keys) -> bool:
        return keys.first == self.part.parts[idx]

    def _mask(self, idx: int, keys: Keys) -> torch.Tensor | None:
        """Bool ``[B, 1, P, K]``, True where samples are the same."""
        if self.segments_BS is None:
            return None
        size = self.query[idx].shape[2]
        own = self.segments_BS[:, self.part.parts[idx] * size :][:, :size]
        theirs = self.segments_BS[:, keys.first * size : keys.end * size]
        return (own[:, :, None] == theirs[:, None, :])[:, None]


def _finish(ctx, queries: _Queries, query, key, value, segments_BS, part, scale) -> torch.Tensor:
    out = torch.cat([half.permute(2, 0, 1, 3) for half in queries.out]).to(query.dtype)
    ctx.save_for_backward(query, key, value, out, *queries.lse)
    ctx.segments_BS, ctx.part, ctx.scale = segments_BS, part, scale
    return out


def _resume(ctx, grad_out: torch.Tensor) -> tuple[_Queries, torch.Tensor, torch.Tensor]:
    query, key, value, out, *lse = ctx.saved_tensors
    queries = _Queries(query, ctx.segments_BS, ctx.part, ctx.scale)
    queries.lse = lse
    queries.out, queries.grad_out = ([half.permute(1, 2, 0, 3) for half in whole.chunk(2)] for whole in (out, grad_out))
    return queries, key, value


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=_wide(tensor), device=tensor.device)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """What sums are kept in: fp32, or fp64 where that is what came."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _fused(query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """True where torch's flash kernel takes the block: it knows no mask, and one width, to which values are padded."""
    width = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and mask is None and value.shape[-1] <= width <= WIDEST_HEAD and width % 8 == 0


def _padded(value: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(value, (0, width - value.shape[-1]))


def _block(query, keys: Keys, causal: bool, mask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one block: fp32 ``out`` ``[B, H, P, v]`` and ``lse`` ``[B, H, P]`` (-inf and 0 where a query sees nothing)."""
    if _fused(query, keys.value, mask):
        wide = _padded(keys.value, query.shape[-1])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, keys.key, wide, 0.0, causal, False, scale=scale)
        return out[..., : keys.value.shape[-1]].float(), lse
    parts = []
    for heads in _turns(query, keys):
        scores = _scores(query[:, heads], keys.key[:, heads], causal, mask, scale)
        lse = torch.logsumexp(scores, dim=-1)
        parts.append((_probs(scores, lse) @ keys.value[:, heads].to(scores.dtype), lse))
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _block_backward(query, keys: Keys, out, lse, grad_out, causal: bool, mask, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of one block's query, key and value, in fp32, from the merged ``out`` and ``lse``."""
    if _fused(query, keys.value, mask):
        width = query.shape[-1]
        wide = (_padded(tensor, width).to(query.dtype) for tensor in (grad_out, keys.value, out))
        grad, value, merged = wide
        nothing = torch.empty(0, dtype=torch.int64, device=query.device)  # no dropout: its random state is not read
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, keys.key, value, merged, lse, None, None, query.shape[2], keys.key.shape[2], 0.0, causal,
            nothing, nothing, scale=scale,
        )  # fmt: skip
        return grads[0].float(), grads[1].float(), grads[2][..., : keys.value.shape[-1]].float()
    parts = []
    for heads in _turns(query, keys):
        q, k, v, o, g = (tensor[:, heads].to(_wide(query)) for tensor in (query, keys.key, keys.value, out, grad_out))
        probs = _probs(_scores(q, k, causal, mask, scale), lse[:, heads])
        scores_grad = probs * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
        parts.append((scores_grad @ k, scores_grad.transpose(-1, -2) @ q, probs.transpose(-1, -2) @ g))
    return tuple(torch.cat(grads, 1) for grads in zip(*parts, strict=True))


def _turns(query: torch.Tensor, keys: Keys) -> list[slice]:
    batch, heads, length, _ = query.shape
    step = max(1, MOST_SCORES // (batch * length * keys.key.shape[2]))
    return [slice(start, min(start + step, heads)) for start in range(0, heads, step)]


def _scores(query, key, causal: bool, mask, scale: float) -> torch.Tensor:
    wide = _wide(query)
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
    if causal:
        length = scores.shape[-1]
        early = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
        mask = early if mask is None else mask & early
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _probs(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """``exp(scores - lse)``, 0 where a query sees nothing."""
    return torch.exp(scores - torch.where(torch.isinf(lse), 0.0, lse).unsqueeze(-1))
