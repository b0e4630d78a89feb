"""The weight of the sequence-wise balance loss: it is the main loss's, and upstream's is still another."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from tests.train.cases import MODEL, one_rank

COEFFICIENT = 0.01


@pytest.fixture(scope="module")
def router():
    mesh = one_rank()
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, clear_aux_losses_tracker

    from r1mega.train.trainee import Trainee

    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # as our executor leaves it: the gradient is not scaled
    yield Trainee(replace(MODEL, seq_aux_loss_coef=COEFFICIENT), None, mesh, "fp32").routers()[0].train()
    clear_aux_losses_tracker()


def balance_gradient(router, rows: int) -> torch.Tensor:
    """Gradient of the router's weight from the balance loss alone, of ``rows`` sequences of 6 tokens."""
    hidden = torch.randn(6, 4, MODEL.hidden_size, generator=torch.Generator().manual_seed(0))[:, :rows]
    router.zero_grad()
    probs, _ = router(hidden)
    (probs.sum() * 0).backward()
    return router.weight.grad.clone()


def by_hand(router, rows: int) -> torch.Tensor:
    """Mean over the sequences of alpha * sum_i f_i P_i (V3 2.1.2, equations 17 to 20: f by the plain top-k of the scores)."""
    hidden = torch.randn(6, 4, MODEL.hidden_size, generator=torch.Generator().manual_seed(0))[:, :rows]
    weight = router.weight.detach().clone().requires_grad_()
    scores = torch.sigmoid(hidden @ weight.T)
    shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(MODEL.top_k).indices, 1.0)
    load = chosen.mean(0) * MODEL.num_experts / MODEL.top_k
    (COEFFICIENT * (load * shares).sum(-1).mean()).backward()
    return weight.grad


@pytest.mark.parametrize("rows", [1, 4])
def test_it_weighs_as_many_items_as_the_main_loss(router, rows: int) -> None:
    from r1mega.compat import megatron_balance

    for count in (1, 24):
        with megatron_balance.items(count):
            torch.testing.assert_close(balance_gradient(router, rows), count * by_hand(router, rows), atol=1e-6, rtol=1e-4)


def test_upstream_still_weighs_the_tokens_of_one_sequence(router, monkeypatch) -> None:
    upstream = inspect.getclosurevars(type(router).attach_and_log_load_balancing_loss).nonlocals["attach"]
    monkeypatch.setattr(type(router), "attach_and_log_load_balancing_loss", upstream)
    torch.testing.assert_close(balance_gradient(router, 4), 6 * by_hand(router, 4), atol=1e-6, rtol=1e-4)
