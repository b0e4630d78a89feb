"""The bend for the meta device: it works, and it is still needed."""

from __future__ import annotations

import contextlib

import torch

from r1mega.compat.megatron_meta import on_meta
from r1mega.config.run import ParallelConfig
from tests.train.cases import MODEL, one_rank


def tensors() -> list[torch.Tensor]:
    """Parameters and buffers of a small model that is built with Megatron's own switch for the meta device."""
    mesh = one_rank()
    from r1mega.model import build

    config = build.transformer_config(MODEL, ParallelConfig(), torch.float32, meta=True)
    (model,) = build.build_stages(MODEL, config, mesh.megatron_groups())
    return [*model.parameters(), *model.buffers()]


def test_nothing_has_storage_inside() -> None:
    with on_meta():
        made = torch.zeros(2, device="cpu"), torch.tensor([1.0]), torch.ones(3, dtype=torch.int32, device="cpu").to("cpu")
        cast = made[0].to(device="cpu", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in (*made, cast)) and cast.dtype == torch.bfloat16
    assert not torch.zeros(2).is_meta
    assert all(tensor.is_meta for tensor in tensors())


def test_megatrons_switch_alone_still_allocates(monkeypatch) -> None:
    from r1mega.model import build

    monkeypatch.setattr(build, "on_meta", contextlib.nullcontext)
    assert sum(not tensor.is_meta for tensor in tensors()) > 10
