"""What comes before core attention is Megatron's own to the last bit in fp32, its gradients to rounding; what is refused."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from r1mega import device
from r1mega.config.errors import UserError
from r1mega.model import attention as module
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


def heads(where: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries and keys wider than values, ``[S, B, H, width]``, and a mask that is not causal alone."""
    draw = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(64, 2, 4, width, generator=draw).to(where, dtype) for width in (192, 192, 128))
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    mask[32:, :32] = False
    return query, key, value, mask.expand(2, 1, 64, 64).to(where)


def attend(core, query, key, value, mask=None) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = core(*leaves, mask)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture
def determinism():
    """A test may turn it off; behind it it is as before."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def package(monkeypatch):
    """A package of its name, whose function takes one width and knows no mask; the calls it got."""
    calls = []

    def flash_attn_func(query, key, value, *, softmax_scale, causal, deterministic):
        assert query.shape == key.shape == value.shape and causal
        calls.append((query.shape, deterministic))
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*turned, is_causal=True, scale=softmax_scale).transpose(1, 2)

    found = types.ModuleType("flash_attn")
    found.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", found)
    module.flash_attention.cache_clear()
    yield calls
    module.flash_attention.cache_clear()


def test_the_package_gets_values_of_the_keys_width_and_no_masks(monkeypatch, package) -> None:
    core = latent_attention(next(iter(MODELS))).core_attention
    *given, mask = heads()
    want, masked = attend(core, *given), attend(core, *given, mask)
    monkeypatch.setattr(device, "_attention", "flash_attn")
    for one, true in zip(attend(core, *given), want, strict=True):
        torch.testing.assert_close(one, true)
    assert package == [((2, 64, 4, 192), torch.are_deterministic_algorithms_enabled())]
    for one, true in zip(attend(core, *given, mask), masked, strict=True):
        torch.testing.assert_close(one, true)
    assert len(package) == 1


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is there")
def test_a_package_that_is_missing_is_told_before_the_first_step(monkeypatch) -> None:
    config = latent_attention(next(iter(MODELS))).config
    monkeypatch.setattr(device, "_attention", "flash_attn")
    module.flash_attention.cache_clear()
    with pytest.raises(UserError) as told:
        module.CoreAttention(config, 1, None, "self", softmax_scale=1.0)
    assert str(told.value) == (
        "device.attention: flash_attn is the package flash-attn; got ModuleNotFoundError: No module named 'flash_attn'; "
        "pip install --no-build-isolation 'r1mega[flash]', or use device.attention=auto"
    )


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_kernel_that_does_not_take_the_heads_is_told(monkeypatch, where: str) -> None:
    core = latent_attention(next(iter(MODELS))).core_attention
    query, key, _, _ = heads(where, torch.bfloat16)
    wide = torch.cat([key, key[..., :64]], dim=-1)  # flash kernels want one width, and values cannot be filled up to the keys'
    monkeypatch.setattr(device, "_attention", "flash")
    if where == "cpu":  # where nothing can be asked for
        monkeypatch.setattr(module, "attention_kernels", lambda *_, **__: sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    with pytest.raises(UserError) as told:
        core(query, key, wide)
    assert str(told.value) == (
        "device.attention: flash is a kernel of torch's that takes the model's heads on this device; got keys 192 wide and values "
        "256 wide in torch.bfloat16; use device.attention=auto"
    )
    core(query, key, wide[..., :192])


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("choice", ["cudnn", "flash", "math", "flash_attn"])
def test_every_kernel_gives_the_same(monkeypatch, determinism, choice, masked) -> None:
    if choice == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("no package flash-attn")
    core = latent_attention(next(iter(MODELS))).core_attention
    if choice == "cudnn":  # torch refuses it where bits have to be the same each time, as on this mesh
        torch.use_deterministic_algorithms(False)
    *given, mask = heads("cuda", torch.bfloat16)
    extra = [mask] if masked else []
    monkeypatch.setattr(device, "_attention", "math")
    true = attend(core, *(tensor.float() for tensor in given), *extra)
    monkeypatch.setattr(device, "_attention", choice)
    found = attend(core, *given, *extra)
    for one, right in zip(found, true, strict=True):
        assert one.dtype == torch.bfloat16 and float((one.float() - right).norm() / right.norm()) < 0.02
