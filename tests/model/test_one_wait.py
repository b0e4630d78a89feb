"""Where experts are spread, a layer waits for its device once a forward pass, after its shared experts are queued, and never backward.

One process stands for both ranks of an axis: what it sends comes back to it, so that all shapes are those of two ranks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig, PrecisionConfig
from r1mega.device import HostCopy, open_device
from r1mega.mesh import Axis, close_mesh, open_mesh
from r1mega.model.dispatch import AllToAll, ExpertRanks
from r1mega.model.dispatch.contract import begin_dispatch
from r1mega.testing.dispatch_contract import ALONE
from r1mega.testing.ranks import run_ranks
from tests.train.cases import MODEL, one_rank

TOKENS = 192
TWO = Axis(0, 2, (0, 1), None)
SIZES = dict(hidden_size=256, moe_ffn_size=128, num_layers=1, first_k_dense=0, num_mtp_layers=0, seq_aux_loss_coef=0.0)
PASS = ["sizes are on their way", "shared experts", "wait", "routed experts"]


def built_layer(mesh, parallel: ParallelConfig, products: str, device: str):
    """A MoE layer in bf16 with fp32 gradient buffers."""
    from r1mega.model.build import build_stages, transformer_config
    from r1mega.model.fp8.use import use_products

    model = replace(MODEL, **SIZES)
    config = transformer_config(model, parallel, torch.bfloat16)
    (stage,) = build_stages(model, config, mesh.megatron_groups(), dispatcher=AllToAll())
    layer = stage.decoder.layers[0].mlp.to(device).train()
    use_products([layer], PrecisionConfig("bf16", products), model, parallel)
    for weight in layer.parameters():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return layer


def half_a_layer(monkeypatch, products: str, device: str):
    """The layer of a rank that has the first half of the experts."""
    from r1mega.model.dispatch import exchange

    def to_itself(received, sent, received_rows=None, sent_rows=None, group=None):
        assert received_rows == sent_rows
        received.copy_(sent)

    monkeypatch.setattr(exchange.dist, "all_to_all_single", to_itself)
    layer = built_layer(one_rank(), ParallelConfig(), products, device)
    half = MODEL.num_experts // 2
    for name in ("weight1", "weight2"):
        weight = torch.nn.Parameter(getattr(layer.experts, name).detach()[:half].clone())
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        setattr(layer.experts, name, weight)
    layer.token_dispatcher = AllToAll().build(ExpertRanks(MODEL.num_experts, TWO, ALONE, MODEL.top_k))
    return layer


def noted(layer, monkeypatch) -> list[str]:
    """What the layer does from now on, in its order."""
    seen: list[str] = []
    begin, wait = HostCopy.__init__, HostCopy.wait
    monkeypatch.setattr(HostCopy, "__init__", lambda *args: (seen.append(PASS[0]), begin(*args))[1])
    monkeypatch.setattr(HostCopy, "wait", lambda *args: (seen.append(PASS[2]), wait(*args))[1])
    layer.shared_experts.register_forward_hook(lambda *_: seen.append(PASS[1]))
    layer.experts.register_forward_hook(lambda *_: seen.append(PASS[3]))
    return seen


def inputs(device: str) -> list[torch.Tensor]:
    """Tokens, and what comes back to them. They go to the device while they are made, which is a wait."""
    draw = torch.Generator().manual_seed(1)
    hidden, grad = (torch.randn(TOKENS, 1, 256, generator=draw).bfloat16().to(device) for _ in range(2))
    return [hidden.requires_grad_(), grad]


def once(layer, hidden: torch.Tensor, grad: torch.Tensor) -> None:
    output, _ = layer(hidden)
    output.backward(grad)


@pytest.mark.parametrize("products", ["plain", "fp8"])
def test_the_shared_experts_are_queued_before_the_only_wait(monkeypatch, products: str) -> None:
    layer = half_a_layer(monkeypatch, products, "cpu")
    seen = noted(layer, monkeypatch)
    once(layer, *inputs("cpu"))
    assert seen == PASS, "once, and nothing in the backward pass"
    assert float(layer.experts.weight1.main_grad.abs().sum()) > 0


def waits_of(layer, device: str) -> int:
    """Waits through the one function in a pass during which torch raises for every other."""
    given = inputs(device)
    for _ in range(2):
        once(layer, *given)  # compiles and allocates
    torch.cuda.synchronize()
    before = HostCopy.waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        once(layer, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return HostCopy.waits - before


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["plain", "fp8"])
def test_on_a_gpu_there_is_no_other_wait(monkeypatch, products: str) -> None:
    layer = half_a_layer(monkeypatch, products, "cuda")
    assert waits_of(layer, "cuda") == 1


def on_two_gpus(products: str) -> int:
    """One rank's part over NCCL."""
    parallel = ParallelConfig(expert=2)
    mesh = open_mesh(open_device(DeviceConfig(kind="cuda", deterministic=False)), parallel, LaunchConfig(), 1)
    return waits_of(built_layer(mesh, parallel, products, "cuda"), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["plain", "fp8"])
def test_on_two_gpus_there_is_no_other_wait(products: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs")
    close_mesh()
    assert run_ranks(on_two_gpus, 2, products, timeout_seconds=200) == [1, 1]


@pytest.mark.gpu
def test_a_copy_comes_while_the_gpu_goes_on_working() -> None:
    numbers = torch.arange(5, device="cuda")
    HostCopy(numbers).wait()  # page-locked memory is there
    torch.cuda.synchronize()
    copy = HostCopy(numbers * 2)
    torch.cuda._sleep(1_000_000_000)  # half a second
    after = torch.cuda.Event()
    after.record()
    assert copy.wait().tolist() == [0, 2, 4, 6, 8]
    assert not after.query(), "what was queued behind it is still at work"


def test_a_class_with_a_dispatch_of_its_own_is_not_gone_around() -> None:
    """Neither a subclass nor a wrapper that forwards what it does not have."""
    right = AllToAll().build(ExpertRanks(4, ALONE, ALONE, 2))

    class Below(type(right)):
        def dispatch(self, *tokens):
            return "own"

    class Around:
        def __getattr__(self, name):
            return getattr(right, name)

        def dispatch(self, *tokens):
            return "own"

    class Combining(type(right)):
        def combine(self, rows_RD, route):
            return rows_RD

    tokens = torch.ones(3, 2), torch.ones(3, 4), torch.tensor([[1, 1, 0, 0]]).repeat(3, 1).bool()
    for wrong in (Below(right.ranks), Around()):
        assert begin_dispatch(wrong, *tokens)() == "own"
    assert begin_dispatch(Combining(right.ranks), *tokens)().rows_RD.shape == (6, 2)
    assert begin_dispatch(Combining(right.ranks), *tokens).__qualname__.startswith("AllToAllDispatcher.begin")


def test_the_gradient_of_the_input_is_the_routed_part_and_then_the_shared_experts() -> None:
    """The order of this sum is the same whenever the shared experts are computed: fp32 sums of three in another order differ."""
    from tests.model.test_moe import layer as made
    from tests.model.test_moe import tokens

    one_rank()
    layer = made(ParallelConfig())
    compute = layer.shared_experts_compute
    weight = torch.randn(tokens(0).shape, generator=torch.Generator().manual_seed(9))

    def gradient(apart: bool) -> torch.Tensor:
        hidden, of_shared = tokens(0).requires_grad_(), tokens(0).requires_grad_()
        layer.shared_experts_compute = (lambda _: compute(of_shared)) if apart else compute
        (layer(hidden)[0] * weight).sum().backward()
        return hidden.grad + of_shared.grad if apart else hidden.grad

    assert torch.equal(gradient(False), gradient(True))
