"""What gradients need around the backward passes: empty buffers, sums over the axes, the embedding's two copies, expert biases.

In: this rank's stages in Megatron's DDP, whose buffers hold sums over microbatches. Out: the same buffers, ready for the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from r1mega.mesh import Mesh
from r1mega.model.experts import GroupedExperts
from r1mega.model.gradients import clear_forgotten, forget
from r1mega.model.linear import ColumnLinear, RowLinear


class EmbeddingCopy:
    """The embedding on the last stage, for MTP (V3 2.2) or a tied head, where another rank holds the embedding itself."""

    def __init__(self, mesh: Mesh, stages: Sequence[torch.nn.Module], placement: tuple[tuple[int, ...], ...], *, needed: bool):
        """``needed``: the last stage uses the embedding's weight."""
        line = mesh.axes["pipeline"]
        last = max(stage for held in placement for stage in held)
        ends = [next(rank for rank, held in enumerate(placement) if stage in held) for stage in (0, last)]
        self._pair = tuple(line.ranks[rank] for rank in ends)
        self._weight: torch.nn.Parameter | None = None
        if not needed or ends[0] == ends[1]:
            return
        self._group = mesh.connect([self._pair])[self._pair]
        if line.rank in ends:
            holder = next(part for part in stages if (part.pre_process if line.rank == ends[0] else part.post_process))
            self._weight = holder.shared_embedding_or_output_weight()

    def share(self) -> None:
        """Give the copy the embedding's value."""
        if self._weight is not None:
            dist.broadcast(self._weight.data, src=self._pair[0], group=self._group)

    def sum_gradients(self) -> None:
        """Give both the sum of their gradients, so that they stay equal."""
        if self._weight is not None:
            dist.all_reduce(self._weight.main_grad, group=self._group)


def summed_here(stages: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The weights all of whose gradients go through :mod:`r1mega.model.gradients`, after DDP has given them ``main_grad``.

    By exact type: not the head's, which an embedding may share and RL's fused loss reads too, and not those of subclasses, whose
    products may go elsewhere.
    """
    modules = [module for stage in stages for module in stage.modules()]
    experts = [weight for one in modules if type(one) is GroupedExperts for weight in (one.weight1, one.weight2)]
    linears = [one.weight for one in modules if type(one) in (ColumnLinear, RowLinear) and one.weight is not None]
    return [weight for weight in (*experts, *linears) if weight.requires_grad and weight.main_grad.dtype == torch.float32]


def begin(model: torch.nn.Module, ours: Sequence[torch.nn.Parameter]) -> None:
    """A step's gradients begin at 0. ``ours``: of :func:`summed_here`, whose first gradient overwrites what is there.

    Megatron's ``zero_grad_buffer`` but for those; nobody ever writes to what lies between weights in a buffer, which is 0. Weights
    of Transformer Engine's are zeroed, though it overwrites them: an expert without rows in the first microbatch is not.
    """
    forget(ours)
    overwritten = {id(weight) for weight in ours}
    for weight in model.params_with_grad:
        weight.grad_added_to_main_grad = False
    rest = [weight.main_grad for weight in model.params_with_grad if id(weight) not in overwritten]
    if rest:
        torch._foreach_zero_(rest)
    for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
        group.reset()


def finalize(model: torch.nn.Module, mesh: Mesh, copy: EmbeddingCopy, ours: Sequence[torch.nn.Parameter]) -> None:
    """Sum over data and context (to the optimizer's shards), tensor ranks and the embedding's copies.

    ``model``: Megatron's DDP over this rank's stages; ``ours``: what :func:`begin` was given, 0 where no pass used it.
    """
    clear_forgotten(ours)
    copy.sum_gradients()  # first: behind the sums over data each rank's buffer is right in its own shard alone
    for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
        if group.intra_distributed_optimizer_instance_size > 1:  # of one rank NCCL copies the whole buffer onto itself
            group.finish_grad_sync()
    _sum_over_tensor(model, mesh)


def _sum_over_tensor(model: torch.nn.Module, mesh: Mesh) -> None:
    """Weights that every tensor rank holds whole saw a part of the sequence on each, or a latent's use by its own heads."""
    line = mesh.axes["tensor"]
    if line.size == 1:
        return
    grads = [
        parameter.main_grad
        for name, parameter in model.module.named_parameters()
        if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name
    ]
    if grads:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=line.group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def update_expert_biases(routers: Sequence[torch.nn.Module], mesh: Mesh, rate: float) -> torch.Tensor | None:
    """Move the biases of a stage's routers against their load and empty the routers' counts (V3 2.1.2).

    ``b_i += rate`` for experts below the mean load of the global batch, ``-= rate`` above. Returns the assignments counted, float64
    ``[layers, experts]``, or None where no router has a bias. The same on every rank of the stage.
    """
    biased = [router for router in routers if router.enable_expert_bias]
    if not biased:
        return None
    counts_LE = mesh.sum_stage(torch.stack([router.local_tokens_per_expert for router in biased]))
    mean_L1 = counts_LE.sum(dim=-1, keepdim=True) / counts_LE.shape[-1]
    for router, step_E in zip(biased, torch.sign(mean_L1 - counts_LE) * rate, strict=True):
        router.expert_bias.add_(step_E)
        router.local_tokens_per_expert.zero_()
    return counts_LE.double()
