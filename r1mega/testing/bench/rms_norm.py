"""Benchmark cases of RMSNorm: hidden and latent widths of DeepSeek-V3. Peers: torch's own function, and plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from r1mega.ops import rms_norm as ops
from r1mega.ops.quantize import BLOCK, E4M3, LARGEST
from r1mega.testing.bench import Bench

SHAPES = ((4096, 7168), (32768, 2048), (4096, 1536), (4096, 512))
EPS = 1e-6


def _forward(M: int, D: int):
    def make(device):
        return torch.randn(M, D, device=device).to(torch.bfloat16), torch.ones(D, device=device, dtype=torch.bfloat16)

    return make


def _backward(M: int, D: int):
    def make(device):
        x, weight = _forward(M, D)(device)
        return torch.randn_like(x), x, weight, ops.rms_norm(x, weight, EPS).rstd

    return make


def _plain(x, weight):
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.float()).to(x.dtype)


def _plain_backward(grad, x, weight, rstd):
    normed, of_y = x.float() * rstd.unsqueeze(-1), grad.float()
    weighted = of_y * weight.float()
    grad_x = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return grad_x.to(x.dtype), (of_y * normed).sum(0).to(weight.dtype)


def _plain_quantize(x, weight):
    tiles = _plain(x, weight).float().view(x.shape[0], -1, BLOCK)
    scale = tiles.abs().amax(-1, keepdim=True) / LARGEST
    return (tiles / scale).to(E4M3).view(x.shape), scale.squeeze(-1)


def benches() -> Iterator[Bench]:
    """Forward, backward, and the norm with quantisation. Bytes: bf16 two a number; rstd and weights are nothing beside them."""
    for M, D in SHAPES:
        case, n = f"{M} x {D} bf16", M * D
        yield Bench(  # x read, y written
            "rms_norm",
            case,
            _forward(M, D),
            lambda x, weight: ops.RMS_NORM.packet(x, weight, EPS),
            4 * n,
            peers={"torch": _plain, "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)},
        )
        yield Bench(  # grad and x read, grad_x written
            "rms_norm_backward", case, _backward(M, D), ops.RMS_NORM_BACKWARD.packet, 6 * n, peers={"torch": _plain_backward}
        )
        yield Bench(  # x read, payload and its scales written
            "rms_norm_quantize",
            case,
            _forward(M, D),
            lambda x, weight: ops.rms_norm_quantize(x, weight, EPS),
            3 * n + n * 4 // BLOCK,
            peers={"torch": _plain_quantize},
        )
