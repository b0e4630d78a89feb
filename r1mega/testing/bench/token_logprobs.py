"""Benchmarks of ``token_logprobs``: DeepSeek-V3's head, forward alone and with the backward; memory: :func:`peak_bytes`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops.token_logprobs import token_logprobs
from r1mega.testing.bench import Bench


def _ours(hidden, weight, targets, grads):
    return token_logprobs(hidden, weight, targets)[:2]


def _plain(hidden, weight, targets, grads):
    logp = torch.log_softmax(hidden.mm(weight.t()).float(), dim=-1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(-1)


def _without_gradients(call):
    def run(*args):
        with torch.no_grad():
            return call(*args)

    return run


def _with_gradients(call):
    def run(hidden, weight, targets, grads):
        return torch.autograd.grad(call(hidden, weight, targets, grads), [hidden, weight], grads)

    return run


def make(T: int, D: int, V: int, device: torch.device) -> tuple:
    """Hidden states and a head in bf16, targets, and gradients of logprobs and entropies."""
    hidden = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    weight = torch.randn(V, D, device=device, dtype=torch.bfloat16) / D**0.5
    targets = torch.randint(0, V, (T,), device=device)
    grads = [torch.randn(T, device=device) for _ in range(2)]
    return hidden.requires_grad_(), weight.requires_grad_(), targets, grads


def _benches(T: int, D: int, V: int) -> Iterator[Bench]:
    for name, around, products in (("forward", _without_gradients, 1), ("forward and backward", _with_gradients, 3)):
        yield Bench(
            "token_logprobs",
            f"{T} tokens, {V} words, {D} hidden, {name}",
            lambda device: make(T, D, V, device),
            around(_ours),
            num_bytes=2 * products * (T * D + V * D),  # operands read, of the backward also their gradients written
            flops=2 * products * T * V * D,  # logits once, two products of the backward: ours makes the logits again, a third more
            ceiling="bf16",
            peers={"torch": around(_plain)},
        )


def peak_bytes(device: torch.device, T: int = 8192, D: int = 7168, V: int = 129280) -> dict[str, int]:
    """On a GPU: the most memory that forward and backward hold beside their inputs, ours and plain torch's, in bytes."""
    found = {}
    for name, call in (("ours", _ours), ("torch", _plain)):
        args = make(T, D, V, device)
        torch.accelerator.synchronize()
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        _with_gradients(call)(*args)
        torch.accelerator.synchronize()
        found[name] = torch.accelerator.max_memory_allocated() - before
        del args
    return found


def benches() -> Iterator[Bench]:
    """The whole vocabulary of V3 over a microbatch, and over few tokens."""
    yield from _benches(8192, 7168, 129280)
    yield from _benches(512, 7168, 129280)
