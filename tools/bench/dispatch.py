"""A MoE layer under each dispatcher on one rank: forward and backward, ratio to ``local``, side by side.

    python tools/bench/dispatch.py device=cuda tokens=8192 hidden=2048 experts=64 ffn=1408 top_k=6 rounds=30

Prints the median time of a forward and backward pass (device events on a GPU, the wall clock on a CPU), and the median over rounds
of its ratio to ``local`` in the same round; the dispatchers take turns, in another order each round. bf16 on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

import random
import statistics
import sys
import time

import torch

from r1mega import registry
from r1mega.config.model import ModelConfig
from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig
from r1mega.device import open_device
from r1mega.mesh import open_mesh

DEFAULTS = {"device": "cpu", "tokens": 2048, "hidden": 256, "experts": 16, "ffn": 128, "top_k": 4, "rounds": 20}
NAMES = ("local", "alltoall", "allgather")


def layers(sizes: dict, mesh) -> dict[str, torch.nn.Module]:
    """One MoE layer a dispatcher, with the same weights."""
    from r1mega.model.build import build_stages, transformer_config

    model = ModelConfig(
        vocab_size=256, max_position_embeddings=128, hidden_size=sizes["hidden"], num_layers=1, num_heads=2, q_lora_rank=None,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, first_k_dense=0, ffn_size=256,
        moe_ffn_size=sizes["ffn"], num_experts=sizes["experts"], top_k=sizes["top_k"],
        num_groups=1, topk_groups=1, num_mtp_layers=0,
    )  # fmt: skip
    dtype = torch.float32 if sizes["device"] == "cpu" else torch.bfloat16
    built = {}
    for name in NAMES:
        config = transformer_config(model, ParallelConfig(), dtype)
        (stage,) = build_stages(model, config, mesh.megatron_groups(), dispatcher=registry.lookup("dispatcher", name)())
        built[name] = stage.to(mesh.device.torch_device).train().decoder.layers[0].mlp
        if built[name] is not built[NAMES[0]]:
            built[name].load_state_dict(built[NAMES[0]].state_dict())
    return built


def timed(layer: torch.nn.Module, hidden: torch.Tensor, on_gpu: bool) -> float:
    """Milliseconds of one forward and backward pass."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else (None, None)
    began = time.perf_counter()
    if on_gpu:
        begin.record()
    output, _ = layer(hidden)
    output.backward(torch.ones_like(output))
    hidden.grad = None
    layer.zero_grad(set_to_none=True)
    if not on_gpu:
        return 1e3 * (time.perf_counter() - began)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    sizes = dict(DEFAULTS)
    for name, _, value in (argument.partition("=") for argument in arguments):
        if name not in sizes:
            sys.exit(f"{name}: one of {', '.join(sizes)}; got {name}={value}; see the first lines of this file")
        sizes[name] = type(sizes[name])(value)
    on_gpu = sizes["device"] == "cuda"
    mesh = open_mesh(open_device(DeviceConfig(kind=sizes["device"], deterministic=False)), ParallelConfig(), LaunchConfig(), 1)
    built = layers(sizes, mesh)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden = torch.randn(sizes["tokens"], 1, sizes["hidden"], device=mesh.device.torch_device, dtype=dtype, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for round_ in range(sizes["rounds"] + 5):
        order = random.Random(round_).sample(NAMES, len(NAMES))
        for name in order:
            took = timed(built[name], hidden, on_gpu)
            if round_ >= 5:  # what comes before warms up
                times[name].append(took)
    print(" ".join(f"{name}={value}" for name, value in sizes.items()))
    for name in NAMES:
        ratio = statistics.median(one / base for one, base in zip(times[name], times["local"], strict=True))
        print(f"{name:10} {statistics.median(times[name]):9.3f} ms   {ratio:6.3f} x local")


if __name__ == "__main__":
    main(sys.argv[1:])
