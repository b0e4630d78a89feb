"""The head's losses, from kept logits or piece by piece, against plain torch; on two tensor ranks against one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1mega.model import head
from r1mega.model.gradients import WeightGradients
from r1mega.model.head import _FusedLosses, _Losses
from r1mega.testing.ranks import run_ranks

S, B, D, V = 6, 2, 16, 1100


class Alone:
    """A process group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, a head, labels and what comes back for each loss."""
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(S, B, D, generator=draw), torch.randn(V, D, generator=draw)
    labels, grad = torch.randint(0, V, (S, B), generator=draw), torch.randn(S, B, generator=draw)
    return hidden.to(dtype), weight.to(dtype), labels, grad


def plain(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Losses and gradients of hidden states and weight, in fp64 from the same numbers."""
    hidden, weight, labels, grad = drawn(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = F.cross_entropy((hidden @ weight.t()).view(-1, V), labels.view(-1), reduction="none").view(S, B)
    return losses.detach(), *torch.autograd.grad(losses, [hidden, weight], grad.double())


def fused(dtype: torch.dtype, *, main_grad: bool, deferred: bool = False) -> tuple[torch.Tensor, ...]:
    hidden, weight, labels, grad = drawn(dtype)
    hidden, weight = hidden.requires_grad_(), torch.nn.Parameter(weight)
    if main_grad:
        weight.main_grad = torch.zeros(V, D)
    losses = _FusedLosses.apply(hidden, weight, labels, False, Alone())
    if deferred:
        store = WeightGradients()
        with store.collect(0):
            losses.backward(grad)
        assert weight.main_grad.abs().max() == 0
        store.run(0)
    else:
        losses.backward(grad)
    return losses.detach(), hidden.grad, weight.main_grad if main_grad else weight.grad


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of 512 words: of the head's 1,100 there are three."""
    monkeypatch.setattr(head, "PIECE_LOGITS", 1)
    yield


@pytest.mark.parametrize("main_grad, deferred", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_pieces_give_the_losses_and_gradients_of_the_whole(small_pieces, dtype, near, main_grad, deferred) -> None:
    found = fused(dtype, main_grad=main_grad, deferred=deferred)
    for got, want in zip(found, plain(dtype), strict=True):
        assert (got.double() - want).norm() <= near * want.norm()
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype


def test_no_tensor_of_the_whole_vocabulary_is_made(small_pieces, monkeypatch) -> None:
    widths = []
    seen = head.cross_entropy
    monkeypatch.setattr(head, "cross_entropy", lambda logits, *rest: widths.append(logits.shape[1]) or seen(logits, *rest))
    fused(torch.float32, main_grad=True)
    assert widths == [384, 384, 332]


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kept_logits_give_the_same_and_become_their_gradient(dtype, near) -> None:
    hidden, weight, labels, grad = drawn(dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.t()
    losses = _Losses.apply(logits, labels, Alone())
    held = logits.data_ptr()
    (grad_logits,) = torch.autograd.grad(losses, [logits], grad, retain_graph=True)
    onwards = torch.autograd.grad(logits, [hidden, weight], grad_logits, retain_graph=True)
    assert grad_logits.data_ptr() == held, "in their place"
    for got, want in zip((losses.detach(), *onwards), plain(dtype), strict=True):
        assert (got.double() - want).norm() <= near * want.norm()
    with pytest.raises(RuntimeError, match="one backward pass"):  # a second time there are no logits to go back from
        losses.backward(grad)


def of_a_rank() -> tuple[float, ...]:
    """Each tensor rank has half of the words and, for the fused loss, half of the sequence: errors against one rank's."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    want, errors = plain(torch.float32), []
    hidden, weight, labels, grad = drawn(torch.float32)
    own = torch.nn.Parameter(weight[rank * V // 2 : (rank + 1) * V // 2].clone())
    whole = hidden.clone().requires_grad_()
    kept = _Losses.apply(whole @ own.t(), labels, group)
    kept.backward(grad)
    sums = whole.grad.clone()
    dist.all_reduce(sums)  # of the ranks' words
    for gathers in (True, False):
        head.PIECE_LOGITS = 1
        part = (hidden[rank * S // 2 : (rank + 1) * S // 2] if gathers else hidden).clone().requires_grad_()
        cut = torch.nn.Parameter(own.detach().clone())
        losses = _FusedLosses.apply(part, cut, labels, gathers, group)
        losses.backward(grad)
        wanted = want[1][rank * S // 2 : (rank + 1) * S // 2] if gathers else want[1]
        found = [(losses.detach(), want[0]), (part.grad, wanted), (cut.grad, want[2][rank * V // 2 : (rank + 1) * V // 2])]
        errors += [float((got.double() - right).norm() / right.norm()) for got, right in found]
    for got, right in ((kept.detach(), want[0]), (sums, want[1]), (own.grad, want[2][rank * V // 2 : (rank + 1) * V // 2])):
        errors.append(float((got.double() - right).norm() / right.norm()))
    dist.destroy_process_group()
    return tuple(errors)


@pytest.mark.slow
def test_two_tensor_ranks_give_what_one_gives() -> None:
    for errors in run_ranks(of_a_rank, 2):
        assert len(errors) == 9 and max(errors) < 1e-5, errors
