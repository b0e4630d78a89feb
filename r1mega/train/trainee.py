"""A model under training: Megatron's DDP, distributed optimizer and forward-backward schedule behind three methods.

``Trainee.step`` takes this rank's microbatches and a loss and makes one optimizer step; pretraining, SFT and RL share it. The loss
of a microbatch is a sum; gradients are divided by the sum of the microbatches' counts over all ranks: no split changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from r1mega.compat import megatron_balance
from r1mega.config.model import ModelConfig
from r1mega.config.train import OptimConfig
from r1mega.device import DTYPES
from r1mega.mesh import Mesh
from r1mega.model.build import build_model, transformer_config

Judge = Callable[[float, float], str]
"""(loss, gradient norm) to what is wrong with them, or ""; see :meth:`r1mega.train.health.Health.judge`."""
LossSum = tuple[torch.Tensor, int, dict[str, float]]
"""Sum of a microbatch's losses, how many items it is a sum of, statistics to be added up."""


@dataclass
class StepResult:
    """What one optimizer step did. Sums and counts are over all ranks; loads are ``[layers][experts]`` shares of assignments.

    ``trouble``: why the step was not applied, or "".
    """

    loss: float
    count: int
    grad_norm: float
    trouble: str = ""
    stats: dict[str, float] = field(default_factory=dict)
    aux_loss: float = 0.0
    mtp_loss: float = 0.0
    expert_load: list[list[float]] = field(default_factory=list)


class Trainee:
    """The model, its gradients and its optimizer on one mesh."""

    def __init__(self, model: ModelConfig, optim: OptimConfig | None, mesh: Mesh, dtype: str):
        """Build fresh weights; ``optim`` None: for scoring alone. ``dtype``: a key of ``device.DTYPES``."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        self.model_config, self.mesh, self.dtype = model, mesh, DTYPES[dtype]
        self.config = transformer_config(model, mesh.parallel, self.dtype)
        module = build_model(model, self.config).to(mesh.device.torch_device)
        if self.dtype != torch.float32:
            from megatron.core.transformer.module import Float16Module

            module = Float16Module(self.config, module)
        self.optimizer = None
        self.model: torch.nn.Module = module
        if optim is not None:
            ddp = DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False, bucket_size=None
            )
            self.model = DistributedDataParallel(self.config, ddp, module)
            self._make_optimizer(optim)
            self.config.grad_scale_func = self.optimizer.scale_loss
            self.config.no_sync_func = self.model.no_sync
            self.config.finalize_model_grads_func = self._finalize
        self._counts: list[torch.Tensor] = []
        self._norm: float | None = None
        self._trouble = ""
        self._judged: Callable[[float], str] = lambda norm: ""

    def _make_optimizer(self, optim: OptimConfig) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=self.dtype == torch.bfloat16,
            params_dtype=self.dtype,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(config, [self.model])
        # Between the gradient norm and the update stands the judge: both calls are Megatron's own step's.
        norm, update = self.optimizer.get_grad_norm, self.optimizer.step_with_ready_grads

        def noted_norm():
            self._norm = norm()
            return self._norm

        def update_if_sound() -> bool:
            self._trouble = self._judged(float(self._norm or 0.0))
            return False if self._trouble else update()

        self.optimizer.get_grad_norm, self.optimizer.step_with_ready_grads = noted_norm, update_if_sound

    def allocate_moments(self) -> None:
        """Give a fresh torch optimizer its (zero) moments: Megatron loads a checkpoint into moments that are there."""
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner = part.optimizer
            if not isinstance(inner, torch.optim.Adam) or inner.state:
                continue
            for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
                zero = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter] = {"step": torch.tensor(0.0), **zero}

    @property
    def module(self) -> torch.nn.Module:
        """Megatron's GPTModel without its wrappers."""
        inner = self.model
        while hasattr(inner, "module"):
            inner = inner.module
        return inner

    def routers(self) -> list[torch.nn.Module]:
        """This stage's routers of decoder layers, in order."""
        return [module for name, module in self.module.decoder.named_modules() if hasattr(module, "local_tokens_per_expert")]

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and expert biases by Megatron's names, without gradients."""
        yield from ((name, parameter.detach()) for name, parameter in self.module.named_parameters())
        yield from self._expert_biases()

    def _expert_biases(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from (
            (name, buffer) for name, buffer in self.module.named_buffers() if name.endswith("expert_bias") and buffer is not None
        )

    def step(
        self,
        microbatches: list[Any],
        forward: Callable[[torch.nn.Module, Any], Any],
        loss: Callable[[Any, Any], LossSum],
        lr: float,
        judge: Judge,
    ) -> StepResult:
        """One optimizer step over this rank's microbatches.

        ``forward(model, batch)`` gives the model's output; ``loss(output, batch)`` its :data:`LossSum`. Where ``judge`` finds
        something wrong, on any rank, no rank applies the step: weights, moments and expert biases stay as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        biases = [(bias, bias.clone()) for _, bias in self._expert_biases()]  # updated with the gradients, before the judgement
        total, count, stats = self._run(microbatches, forward, loss, forward_only=False)
        mean = total / max(count, 1)
        self._judged = lambda norm: self._agreed(judge(mean, norm))
        self.optimizer.step()
        if self._trouble:
            for bias, before in biases:
                bias.copy_(before)
        aux, mtp = self._side_losses(len(microbatches))
        return StepResult(mean, count, float(self._norm or 0.0), self._trouble, stats, aux, mtp, self._take_load())

    def _agreed(self, trouble: str) -> str:
        """This rank's finding, or, where only another rank has one, that."""
        anywhere = self.mesh.any(bool(trouble))
        return trouble or ("another rank found a trouble" if anywhere else "")

    def evaluate(self, microbatches: list[Any], forward: Callable, loss: Callable[[Any, Any], LossSum]) -> tuple[float, int]:
        """Mean loss and item count of this rank's microbatches over all ranks, without gradients."""
        self.model.eval()
        with torch.no_grad():
            total, count, _ = self._run(microbatches, forward, loss, forward_only=True)
        return total / max(count, 1), count

    def _run(self, microbatches, forward, loss, *, forward_only: bool) -> tuple[float, int, dict[str, float]]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        kept: list[tuple[float, int, dict[str, float]]] = []

        def reduce(batch, output):
            value, items, stats = loss(output, batch)
            kept.append((float(value.detach()), items, stats))
            return value, torch.tensor(items, dtype=torch.int, device=value.device), {}

        def forward_step(iterator, model):
            batch = next(iterator)
            mask_BS = getattr(batch, "loss_mask_BS", None)  # without one the loss is one item: the caller has divided by its own
            with megatron_balance.items(1 if mask_BS is None else int(mask_BS.sum())):
                return forward(model, batch), partial(reduce, batch)

        shape = microbatches[0].tokens_BS.shape
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=[self.model],
            num_microbatches=len(microbatches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=forward_only,
        )
        names = sorted(kept[0][2]) if kept else []
        sums = [
            sum(item[0] for item in kept),
            sum(item[1] for item in kept),
            *(sum(item[2][name] for item in kept) for name in names),
        ]
        reduced = self.mesh.sum(torch.tensor(sums, dtype=torch.float64, device=self.mesh.device.torch_device))
        values = reduced.tolist()
        return values[0], int(values[1]), dict(zip(names, values[2:], strict=True))

    def _finalize(self, model, num_tokens=None, **kwargs) -> None:
        from megatron.core.distributed import finalize_model_grads

        self._counts = [router.local_tokens_per_expert.clone() for router in self.routers() if router.enable_expert_bias]
        finalize_model_grads(model, num_tokens, **kwargs)

    def _take_load(self) -> list[list[float]]:
        if not self._counts:
            return []
        counts_LE = self.mesh.sum_stage(torch.stack(self._counts).double())
        return (counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)).tolist()

    def _side_losses(self, num_microbatches: int) -> tuple[float, float]:
        """Sequence-balance loss (sum over layers, without its coefficient) and MTP loss, over all ranks.

        From Megatron's trackers, which are emptied.
        """
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        balance, prediction = get_moe_layer_wise_logging_tracker(), MTPLossLoggingHelper.tracker
        aux = sum(float(entry["values"].sum()) for entry in balance.values())
        mtp = float(prediction["values"].mean()) if "values" in prediction else 0.0
        balance.clear()  # not only zeroed: the next model of this process may have more layers
        prediction.clear()
        # a tensor or context rank holds its part of the balance loss, and the whole MTP loss of its own tokens
        mesh, parallel = self.mesh, self.mesh.parallel
        both = mesh.sum_everywhere(torch.tensor([aux, mtp], dtype=torch.float64, device=mesh.device.torch_device))
        aux, mtp = (both / (num_microbatches * mesh.data_size)).tolist()
        return aux, mtp / (parallel.tensor * parallel.context)
