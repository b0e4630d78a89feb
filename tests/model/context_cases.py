"""What the ranks of the tests of context parallelism do: the same batch through a part of every sequence each, gradients summed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.device import open_device
from r1mega.mesh import Mesh, close_mesh, open_mesh
from r1mega.model.context import ContextPart
from tests.train.cases import CPU, MODEL

LENGTH = 48
"""Tokens a row: 2C divides it for 2, 3 and 4 ranks, and with two tensor ranks."""
MODELS: dict[str, ModelConfig] = {
    "yarn, query latent, MTP": MODEL,
    "plain rope, plain query": replace(
        MODEL, q_lora_rank=None, yarn=YarnConfig(), num_mtp_layers=0, rope_theta=100.0, qk_nope_head_dim=12, v_head_dim=4
    ),
}


def mesh_of(**degrees: Any) -> Mesh:
    """The mesh of this process's ranks."""
    return open_mesh(open_device(CPU), ParallelConfig(**degrees), LaunchConfig(), 1)


def build(model: ModelConfig, mesh: Mesh):
    """The whole model on ``mesh``, in fp32 and in training."""
    from r1mega.model.build import build_stages, transformer_config

    config = transformer_config(model, mesh.parallel, torch.float32)
    return build_stages(model, config, mesh.megatron_groups())[0].train()


def batch_of(packed: bool):
    """Two rows, some tokens not learnt; packed ones of several samples with padding at the end."""
    from r1mega.model.forward import TokenTensors

    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, MODEL.vocab_size, (2, LENGTH), generator=draw)
    mask = (torch.rand(2, LENGTH, generator=draw) < 0.7).float()
    mask[1, :30] = 0  # so that the ranks learn different numbers of tokens
    lengths = ([7, 1, 25, 11], [31, 13])
    ids = torch.zeros(2, LENGTH, dtype=torch.int32)
    for row, sizes in zip(ids, lengths, strict=True):
        filled = torch.cat([torch.full((size,), number + 1) for number, size in enumerate(sizes)])
        row[: len(filled)] = filled.int()
    return TokenTensors(tokens, tokens.roll(-1, 1), mask, ids if packed else None)


def losses_and_grads(model, batch, part: ContextPart) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Losses ``[B, S]`` whole, this rank's gradients by name, its sum and count of MTP losses."""
    from r1mega.compat import megatron_balance, megatron_mtp
    from r1mega.model.forward import token_losses

    own = batch.cut(part)
    megatron_mtp.take(torch.device("cpu"))
    with megatron_balance.items(own.num_learnt):
        losses = token_losses(model, own)
    (losses * own.loss_mask_BS).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return part.gather(losses.detach()), grads, megatron_mtp.take(torch.device("cpu"))


def reference(folder: Path) -> None:
    """One rank's weights and numbers, into ``folder``."""
    mesh = mesh_of()
    for name, config in MODELS.items():
        for packed in (False, True):
            model = build(config, mesh)
            losses, grads, mtp = losses_and_grads(model, batch_of(packed), ContextPart())
            state = {"weights": model.state_dict(), "losses": losses, "grads": grads, "mtp": mtp}
            torch.save({key: value for key, value in state.items()}, folder / f"{name}-{packed}.pt")


def compare(folder: Path, degrees: dict[str, int], cases: list[tuple[str, bool]]) -> list[dict[str, float]]:
    """Largest differences from one rank's numbers, for both exchanges of each case, in units of the tolerance."""
    close_mesh()
    found = []
    for exchange in ("allgather", "ring"):
        mesh = mesh_of(**degrees, context_exchange=exchange)
        part = ContextPart.of(mesh.axes["context"])
        for name, packed in cases:
            one = torch.load(folder / f"{name}-{packed}.pt", weights_only=False)
            model = build(MODELS[name], mesh)
            assert model.decoder.layers[0].self_attention.core_attention.takes_whole_keys is (exchange == "allgather")
            model.load_state_dict({key: _shard(key, one["weights"][key], value, mesh) for key, value in model.state_dict().items()})
            losses, grads, mtp = losses_and_grads(model, batch_of(packed), part)
            assert grads.keys() == one["grads"].keys()
            for key, parameter in model.named_parameters():
                dense = getattr(parameter, "allreduce", True)
                dist.all_reduce(grads[key], group=part.group if dense else mesh.axes["expert_data"].group)
                if getattr(parameter, "sequence_parallel", False) and mesh.axes["tensor"].size > 1:
                    dist.all_reduce(grads[key], group=mesh.axes["tensor"].group)
            dist.all_reduce(mtp, group=part.group)
            worst = {key: _difference(grad, _shard(key, one["grads"][key], grad, mesh)) for key, grad in grads.items()}
            found.append(
                {
                    "case": f"{name}, packed {packed}, {exchange}",
                    "losses": float((losses - one["losses"]).abs().max()),
                    "mtp": float((mtp - one["mtp"]).abs().max() / one["mtp"][1].clamp(min=1)),
                    "gradients": max(worst.values()),
                    "worst": max(worst, key=worst.get),
                }
            )
        close_mesh()
    return found


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of two gradients, over the norm of theirs."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))


def _shard(name: str, whole: torch.Tensor, own: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """A tensor rank's rows or columns of one rank's tensor; a gated FFN's first layer holds two such stacks."""
    if whole is None or not isinstance(whole, torch.Tensor) or whole.shape == own.shape:
        return whole
    axis = mesh.axes["tensor"]
    (dim,) = (place for place, (one, other) in enumerate(zip(whole.shape, own.shape, strict=True)) if one != other)
    if "linear_fc1" in name:
        return torch.cat([half.chunk(axis.size, dim)[axis.rank] for half in whole.chunk(2, dim)], dim)
    return whole.chunk(axis.size, dim)[axis.rank]


def attend(degree: int, length: int, packed: bool) -> list[float]:
    """Differences of both exchanges from softmax on paper, in fp64: output, gradients of query, key, value; and a second run's."""
    from r1mega.model.part_attention import gathered_attention, ring_attention

    part = ContextPart.of_group(dist.group.WORLD)
    assert part.size == degree
    draw = torch.Generator().manual_seed(5)
    query, key = (torch.randn(length, 2, 3, 10, dtype=torch.float64, generator=draw, requires_grad=True) for _ in range(2))
    value, grad = (torch.randn(length, 2, 3, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    value.requires_grad_()
    ids = torch.arange(length).mul(5).div(length, rounding_mode="floor").expand(2, -1).clone().int() if packed else None
    if packed:
        ids[1, length // 3 :] = 0
    mask = torch.ones(length, length).tril().bool().expand(2, 1, -1, -1)
    if packed:
        mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * 0.3
    out = torch.einsum("bhst,tbhv->sbhv", torch.softmax(scores.masked_fill(~mask, -torch.inf), -1), value)
    wanted = [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]

    def run(function) -> list[torch.Tensor]:
        own, keys, values = (part.cut(each.detach(), 0).requires_grad_() for each in (query, key, value))
        if function is gathered_attention:
            keys, values = (each.detach().clone().requires_grad_() for each in (key, value))
        got = function(own, keys, values, ids, part, 0.3)
        grads = list(torch.autograd.grad(got, (own, keys, values), part.cut(grad, 0)))
        if function is gathered_attention:
            for each in grads[1:]:
                dist.all_reduce(each)
            return [part.gather(got, 0), part.gather(grads[0], 0), *grads[1:]]
        return [part.gather(each, 0) for each in (got, *grads)]

    differences = []
    for function in (gathered_attention, ring_attention):
        first, second = run(function), run(function)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)), "the same bits again"
        differences += [float((got - want).abs().max()) for got, want in zip(first, wanted, strict=True)]
    return differences


def part_round_trip() -> bool:
    """cut and gather undo each other, along either axis."""
    part = ContextPart.of_group(dist.group.WORLD)
    whole = torch.arange(2 * 24 * 3).view(2, 24, 3)
    along = all(torch.equal(part.gather(part.cut(whole.movedim(1, dim), dim), dim), whole.movedim(1, dim)) for dim in (0, 1, 2))
    places = part.positions(24 // part.size, torch.device("cpu"))
    return along and torch.equal(places, part.cut(torch.arange(24), 0))


def rolled() -> list[bool]:
    """Megatron's rolled labels and loss masks over the ranks, against those of the whole row."""
    from megatron.core.models.gpt import gpt_model

    part = ContextPart.of_group(dist.group.WORLD)
    labels = torch.arange(1, 25).repeat(2, 1)
    mask = (labels % 3 != 0).float()
    got_labels, _ = gpt_model.roll_tensor(part.cut(labels), cp_group=part.group)
    got_mask, _ = gpt_model.roll_tensor(part.cut(mask), cp_group=part.group)
    want_labels, want_mask = (torch.cat([each[:, 1:], torch.zeros_like(each[:, :1])], 1) for each in (labels, mask))
    return [torch.equal(part.gather(got_labels), want_labels), torch.equal(part.gather(got_mask), want_mask)]


def two_ranks(folder: Path) -> dict[str, Any]:
    """Everything that two ranks do."""
    mesh_of(context=2)
    basics = {
        "round trip": part_round_trip(),
        "rolled": rolled(),
        "attention": {(length, packed): attend(2, length, packed) for length in (4, 20, 24) for packed in (False, True)},
    }
    cases = [(name, packed) for name in MODELS for packed in (False, True)]
    return {**basics, "models": compare(folder, {"context": 2}, cases)}


def three_ranks() -> dict[str, Any]:
    """A number of parts that divides no power of two."""
    mesh = mesh_of(context=3)
    build(MODEL, mesh)  # YaRN's table of the original length 32 is cut too
    return {"round trip": part_round_trip(), "rolled": rolled(), "attention": {(18, True): attend(3, 18, True)}}


def four_ranks(folder: Path) -> dict[str, Any]:
    """Four context ranks, then two with two tensor ranks and sequence parallelism."""
    mesh_of(context=4)
    basics = {"round trip": part_round_trip(), "attention": {(40, packed): attend(4, 40, packed) for packed in (False, True)}}
    both = [("yarn, query latent, MTP", True), ("plain rope, plain query", False)]
    return {
        **basics,
        "models": compare(folder, {"context": 4}, both[:1]) + compare(folder, {"context": 2, "tensor": 2}, both),
    }
