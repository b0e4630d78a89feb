"""What comes before core attention is Megatron's own to the last bit in fp32, its gradients to rounding; what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.model.context_cases import LENGTH, MODELS, build, mesh_of


def latent_attention(name: str):
    mesh = mesh_of()
    return build(MODELS[name], mesh).decoder.layers[1].self_attention


def outcome(attention, compute) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What ``compute`` gives for one sequence, and the gradients of a weighted sum of it."""
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(LENGTH, 2, attention.config.hidden_size, generator=draw).requires_grad_()
    found = list(compute(attention, hidden))
    weights = [torch.randn(part.shape, generator=draw) for part in found[:3]]
    named = {"hidden": hidden} | dict(attention.named_parameters())
    total = sum((part * weight).sum() for part, weight in zip(found, weights, strict=False))
    grads = torch.autograd.grad(total, named.values(), allow_unused=True)
    return found, {key: grad for key, grad in zip(named, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_query_key_and_value_are_megatrons(name: str) -> None:
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    attention = latent_attention(name)
    ours = outcome(attention, lambda own, hidden: own.get_query_key_value_tensors(hidden))
    theirs = outcome(attention, MLASelfAttention.get_query_key_value_tensors)
    assert len(ours[0]) == 5 and all(torch.equal(mine, other) for mine, other in zip(ours[0], theirs[0], strict=True))
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) >= 5
    for key, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][key], grad, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_tables_are_shared_by_layers_and_few() -> None:
    from r1mega.model import attention as module

    attention = latent_attention(next(iter(MODELS)))
    module._tables.clear()
    hidden = torch.zeros(LENGTH, 1, attention.config.hidden_size)
    with torch.inference_mode():
        first = attention._cos_sin(hidden)
    assert not first[0].is_inference(), "training reads what evaluation made"
    assert latent_attention(next(iter(MODELS)))._cos_sin(hidden)[0] is first[0]
    for length in range(1, 2 * module.MOST_TABLES):
        attention._cos_sin(hidden[:length])
    assert len(module._tables) == module.MOST_TABLES


def test_packed_format_and_megatrons_inference_are_refused() -> None:
    attention = latent_attention(next(iter(MODELS)))
    hidden = torch.zeros(2, 1, attention.config.hidden_size)
    with pytest.raises(NotImplementedError, match="got packed_seq_params; pass segment ids"):
        attention.get_query_key_value_tensors(hidden, packed_seq_params=object())
    with pytest.raises(NotImplementedError, match="Megatron's inference is not there"):
        attention.get_query_key_value_tensors(hidden, inference_context=object())
