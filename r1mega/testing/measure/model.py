"""A MoE layer and a training step of the whole model, timed through the code that trains.

In: BenchConfig and a device. Out: a dict for one JSON line. Operations are counted
as in :mod:`r1mega.model.flops`: causal attention once, backward as twice forward. Gradients are summed in fp32, as in a training.
With ``peer`` the same follows with Transformer Engine's products, in the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from r1mega import registry
from r1mega.config.bench import BenchConfig
from r1mega.config.errors import UserError
from r1mega.config.run import LaunchConfig, ParallelConfig, PrecisionConfig
from r1mega.config.train import OptimConfig
from r1mega.device import DTYPES, Device
from r1mega.mesh import Mesh, close_mesh, open_mesh

GIB = 2**30


def _short(value: float) -> float:
    """Four digits of it, however small a machine is."""
    return float(f"{value:.4g}")


@contextmanager
def _alone(config: BenchConfig, device: Device) -> Iterator[Mesh]:
    """The mesh of this process."""
    from r1mega.compat import megatron_jit

    megatron_jit.apply()
    mesh = open_mesh(device, ParallelConfig(recompute=config.recompute), LaunchConfig(), config.seed)
    try:
        yield mesh
    finally:
        close_mesh()


def moe_layer(config: BenchConfig, device: Device, rounds: int) -> tuple[dict[str, Any], float]:
    """Forward and backward of one MoE layer, all experts here; and its operations.

    With its router and shared experts, or with ``routed_only`` from permute to unpermute alone, the choice of experts and its
    probabilities given. Weights are quantised once a pass, and gradients are added to what the buffers hold.
    """
    from r1mega.model.build import build_stages, transformer_config
    from r1mega.model.fp8 import te
    from r1mega.model.fp8.use import use_products
    from r1mega.model.fp8.weights import kept_weights
    from r1mega.model.recompute import recomputing

    alone = {"num_shared_experts": 0} if config.routed_only else {}
    model = replace(config.model, num_layers=1, first_k_dense=0, num_mtp_layers=0, vocab_size=256, vocab_padding=0, **alone)
    dtype = DTYPES[config.precision.dtype]
    with _alone(config, device) as mesh:
        built = transformer_config(model, ParallelConfig(), dtype, products=config.precision.products)
        built.disable_parameter_transpose_cache = True  # Transformer Engine then does in every pass what ours does
        dispatcher = registry.lookup("dispatcher", "local")()
        (stage,) = build_stages(model, built, mesh.megatron_groups(), dispatcher=dispatcher)
        layer = stage.to(device.torch_device).train().decoder.layers[0].mlp
        use_products([layer], config.precision, model, ParallelConfig())
        for weight in layer.parameters():
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        del stage
        draw = torch.Generator(device.torch_device).manual_seed(config.seed)
        shape = (config.tokens, model.hidden_size) if config.routed_only else (config.tokens, 1, model.hidden_size)
        hidden, grad = (torch.randn(shape, generator=draw, device=device.torch_device, dtype=dtype) for _ in range(2))
        leaves = [hidden.requires_grad_()]
        if config.routed_only:
            map_TE = even_choice(config.tokens, model.num_experts, model.top_k, config.seed).to(device.torch_device)
            leaves.append(torch.rand(map_TE.shape, generator=draw, device=device.torch_device).requires_grad_())
        held, peaks, times = device.allocated_bytes(), {"forward": 0, "backward": 0}, []
        for number in range(config.warmup + rounds):
            device.synchronize()
            device.reset_peak_bytes()
            begin = device.mark()
            with kept_weights(), te.entered(built):
                with recomputing(config.recompute):
                    output = layer.routed(*leaves, map_TE)[0] if config.routed_only else layer(hidden)[0]
                middle = device.mark()
                peaks["forward"] = max(peaks["forward"], device.peak_bytes())
                device.reset_peak_bytes()
                output.backward(grad)
            end = device.mark()
            peaks["backward"] = max(peaks["backward"], device.peak_bytes())
            if number >= config.warmup:
                times.append((device.milliseconds(begin, middle), device.milliseconds(middle, end)))
            del output
            for leaf in leaves:
                leaf.grad = None
            layer.zero_grad(set_to_none=True)
    forward, backward, both = (
        statistics.median(took) for took in ([a for a, _ in times], [b for _, b in times], [a + b for a, b in times])
    )
    expert = 3 * model.hidden_size * model.moe_ffn_size * (model.top_k + model.num_shared_experts)
    flops = 3 * 2 * config.tokens * (expert + (0 if config.routed_only else model.hidden_size * model.num_experts))
    numbers = {
        "experts": model.num_experts,
        "tokens": config.tokens,
        "hidden": model.hidden_size,
        "ffn": model.moe_ffn_size,
        "top_k": model.top_k,
        "routed_only": config.routed_only,
        "precision": _formats(config),
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "forward_backward_ms": round(both, 3),
        "tokens_per_second": round(config.tokens / both * 1e3),
        "tflops_forward_backward": _short(flops / both / 1e9),
        "held_gib": round(held / GIB, 2),
        "peak_forward_gib": round(peaks["forward"] / GIB, 2),
        "peak_backward_gib": round(peaks["backward"] / GIB, 2),
    }
    return numbers, flops


def even_choice(num_tokens: int, num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    """A random map ``[T, E]``, bool, on the CPU: ``top_k`` experts a token, and every expert as often as another, give or take one
    block of ``num_experts`` tokens that is not whole.
    """
    draw = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-num_tokens // num_experts)):
        # each row of the square takes the same shifts from its own place, so each column is taken as often; then both are mixed
        shifts = torch.randperm(num_experts, generator=draw)[:top_k]
        chosen = (torch.arange(num_experts)[:, None] + shifts) % num_experts
        square = torch.zeros(num_experts, num_experts, dtype=torch.bool).scatter_(1, chosen, True)
        blocks.append(square[:, torch.randperm(num_experts, generator=draw)][torch.randperm(num_experts, generator=draw)])
    return torch.cat(blocks)[:num_tokens]


def with_peer(config: BenchConfig, device: Device, rounds: int, numbers: dict[str, Any]) -> dict[str, Any]:
    """``numbers`` of ours and, behind them, the peer's: the same measured with ``precision=fp8_te``, and its medians over ours.

    Above 1 ours takes less time. Where Transformer Engine is missing, the one line that says so is in the peer's place.
    """
    from r1mega.model.fp8 import te

    try:
        te.require()
    except UserError as missing:
        return numbers | {"peer": str(missing)}
    device.release_unused()
    theirs = replace(config, precision=PrecisionConfig(dtype=config.precision.dtype, products="te"))
    found, _ = (moe_layer if config.bench == "moe" else training_step)(theirs, device, rounds)
    told = [name for name in numbers if name.endswith("_ms")]
    ratios = {f"peer_over_ours_{name.removesuffix('_ms')}": _short(found[name] / numbers[name]) for name in told}
    return numbers | ratios | {"peer": found}


def _formats(config: BenchConfig) -> str:
    """The name that ``precision=`` takes."""
    return {"plain": config.precision.dtype, "fp8": "fp8", "te": "fp8_te"}[config.precision.products]


def training_step(config: BenchConfig, device: Device, rounds: int) -> tuple[dict[str, Any], float]:
    """A step on random tokens: forward and backward of all microbatches, then the optimizer; and the operations of the passes."""
    from r1mega.model.flops import train_flops_per_token
    from r1mega.model.forward import TokenTensors, token_losses
    from r1mega.train.fit import masked_sum
    from r1mega.train.ranges import named_layers
    from r1mega.train.trainee import Trainee

    model, shape = config.model, (config.micro_batch_size, config.sequence_length)
    optim = OptimConfig(lr=1e-4, min_lr=1e-4, warmup_steps=0, decay="constant")
    passes, steps, marks = [], [], []
    with _alone(config, device) as mesh:
        trainee = Trainee(model, optim, mesh, config.precision, dispatcher=registry.lookup("dispatcher", "local")())
        update = trainee.optimizer.step

        def marked_update() -> Any:
            marks.append(device.mark())
            return update()

        trainee.optimizer.step = marked_update
        draw = torch.Generator(device.torch_device).manual_seed(config.seed)
        for number in range(config.warmup + rounds):
            batches = []
            for _ in range(config.microbatches):
                drawn = torch.randint(model.vocab_size, (shape[0], shape[1] + 1), generator=draw, device=device.torch_device)
                mask = torch.ones(shape, device=device.torch_device)
                batches.append(TokenTensors(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), mask))
            marks.clear()
            device.synchronize()
            begin = device.mark()
            with named_layers(trainee, config.nvtx):
                result = trainee.step(batches, token_losses, masked_sum, optim.lr, lambda loss, norm: "")
            end = device.mark()
            if number >= config.warmup:
                passes.append(device.milliseconds(begin, marks[0]))
                steps.append(device.milliseconds(begin, end))
    peaks = trainee.peaks.by_phase
    pass_ms, step_ms = statistics.median(passes), statistics.median(steps)
    tokens = config.microbatches * shape[0] * shape[1]
    flops = train_flops_per_token(model, config.sequence_length) * tokens
    numbers = {
        "layers": model.num_layers,
        "experts": model.num_experts,
        "precision": _formats(config),
        "forward_backward_ms": round(pass_ms, 1),
        "step_ms": round(step_ms, 1),
        "tokens_per_second": round(tokens / pass_ms * 1e3),
        "tflops_forward_backward": _short(flops / pass_ms / 1e9),
        "tflops_step": _short(flops / step_ms / 1e9),
        "loss": round(result.loss, 4),
        "peak_gib": round(max(peaks["pass"], peaks["update"]) / GIB, 1),
        "peak_pass_gib": round(peaks["pass"] / GIB, 1),
        "peak_update_gib": round(peaks["update"] / GIB, 1),
    }
    return numbers, flops
