"""Benchmarks of ``route`` and ``route_backward``: DeepSeek-V3's and V2's routers at 8,192 tokens, and small ones of a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops.route import ROUTE, ROUTE_BACKWARD
from r1mega.testing.bench import Bench

SHAPES = (  # tokens, experts, top_k, groups, kept, score function
    (8192, 256, 8, 8, 4, "sigmoid"),
    (8192, 160, 6, 8, 3, "softmax"),
    (2048, 32, 4, 4, 2, "sigmoid"),
    (512, 8, 4, 4, 2, "sigmoid"),
)
SCALE = 2.5


def benches() -> Iterator[Bench]:
    """Forward with counts and offsets, and the gradient of the logits, of each shape in fp32."""
    for T, E, top_k, groups, kept, score_function in SHAPES:
        knobs = (top_k, groups, kept, score_function, SCALE)
        case = f"{T:,} x {E}, {groups} groups keep {kept}, top-{top_k}, {score_function}"

        def forward_inputs(device, T=T, E=E, biased=score_function == "sigmoid") -> tuple:
            return torch.randn(T, E, device=device), 0.1 * torch.randn(E, device=device) if biased else None

        def backward_inputs(device, make=forward_inputs, knobs=knobs) -> tuple:
            logits, bias = make(device)
            return torch.randn_like(logits), logits, ROUTE.packet(logits, bias, *knobs)[1]

        def run(call, knobs):
            return lambda *inputs: call(*inputs, *knobs)

        yield Bench(
            op="route",
            case=case,
            make=forward_inputs,
            run=run(ROUTE.packet, knobs),
            num_bytes=T * E * (4 + 4 + 1),  # logits in, probabilities and map out
            peers={"torch": run(ROUTE.reference, knobs)},
        )
        back = (score_function, top_k, SCALE)
        all_logits = 4 * T * E if score_function == "softmax" else 4 * T * top_k
        yield Bench(
            op="route_backward",
            case=case,
            make=backward_inputs,
            run=run(ROUTE_BACKWARD.packet, back),
            num_bytes=T * E * (1 + 4) + 4 * T * top_k + all_logits,  # map in, gradient out; gradients and logits of the chosen in
            peers={"torch": run(ROUTE_BACKWARD.reference, back)},
        )
