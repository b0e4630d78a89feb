"""On a GPU a MoE layer with all experts at home waits for nothing: forward and backward queue their work, and go into a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from r1mega import registry
from r1mega.config.run import ParallelConfig, PrecisionConfig
from tests.train.cases import MODEL, one_rank

pytestmark = pytest.mark.gpu
TOKENS = 192


def moe_layer(products: str):
    """A MoE layer with shared expert, bias and fp32 gradient buffers, in bf16, on the GPU."""
    from r1mega.model.build import build_stages, transformer_config
    from r1mega.model.fp8.use import use_products

    # Megatron's balance loss is its own code and not the layer's way of rows
    sizes = dict(hidden_size=256, moe_ffn_size=128, num_layers=1, first_k_dense=0, num_mtp_layers=0, seq_aux_loss_coef=0.0)
    model, mesh = replace(MODEL, **sizes), one_rank()
    config = transformer_config(model, ParallelConfig(), torch.bfloat16)
    (stage,) = build_stages(model, config, mesh.megatron_groups(), dispatcher=registry.lookup("dispatcher", "local")())
    layer = stage.decoder.layers[0].mlp.to("cuda").train()
    use_products([layer], PrecisionConfig(dtype="bf16", products=products), model, ParallelConfig())
    for weight in layer.parameters():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return layer


def once(layer, hidden: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Output; gradients are added to the weights' buffers and ``hidden.grad``."""
    output, _ = layer(hidden)
    output.backward(grad)
    return output


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(TOKENS, 1, 256, generator=draw).bfloat16().cuda() for _ in range(2))


@pytest.mark.parametrize("products", ["plain", "fp8"])
def test_forward_and_backward_never_wait_for_the_gpu(products) -> None:
    layer, (hidden, grad) = moe_layer(products), inputs(1)
    once(layer, hidden.requires_grad_(), grad)  # compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once(layer, hidden, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("products", ["plain", "fp8"])
def test_a_captured_layer_replays_on_other_tokens(products) -> None:
    layer, (hidden, grad) = moe_layer(products), inputs(1)
    hidden.requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            once(layer, hidden, grad)
    torch.cuda.synchronize()
    hidden.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once(layer, hidden, grad)
    for seed in (2, 3):  # other tokens choose other experts
        fresh, slope = inputs(seed)
        with torch.no_grad():
            hidden.copy_(fresh)
            grad.copy_(slope)
        for weight in layer.parameters():
            weight.main_grad.zero_()
        graph.replay()
        found = [captured.detach().clone(), hidden.grad.clone(), *(weight.main_grad.clone() for weight in layer.parameters())]
        alone = fresh.requires_grad_()
        for weight in layer.parameters():
            weight.main_grad.zero_()
            weight.grad = None
        want = [once(layer, alone, slope).detach(), alone.grad, *(weight.main_grad for weight in layer.parameters())]
        for one, true in zip(found, want, strict=True):
            torch.testing.assert_close(one, true, rtol=0, atol=0)
