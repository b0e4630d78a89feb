"""A model under training: this rank's stages in Megatron's DDP with its distributed optimizer, and a pipeline's schedule.

``Trainee.step`` takes this rank's microbatches and a loss and makes one optimizer step; pretraining, SFT and RL share it. The loss
of a microbatch is a sum; what goes back from it is divided by the sum of the microbatches' counts over all ranks: no split changes
the gradients, and their buffers need no division of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from r1mega.compat import megatron_balance, megatron_mtp
from r1mega.config.model import ModelConfig
from r1mega.config.run import PrecisionConfig
from r1mega.config.train import OptimConfig
from r1mega.device import DTYPES
from r1mega.mesh import Mesh
from r1mega.model.build import build_stages, transformer_config
from r1mega.model.fp8 import te
from r1mega.model.fp8.use import use_products
from r1mega.model.fp8.weights import kept_weights
from r1mega.model.recompute import recomputing
from r1mega.train import gradients
from r1mega.train.adamw import AdamW, use_moments
from r1mega.train.peaks import Peaks
from r1mega.train.pipeline.run import Executor
from r1mega.train.pipeline.schedule import Pipeline
from r1mega.train.stages import Stages

Judge = Callable[[float, float], str]
"""(loss, gradient norm) to what is wrong with them, or ""; see :meth:`r1mega.train.health.Health.judge`."""
LossSum = tuple[torch.Tensor, int | torch.Tensor, dict[str, float | torch.Tensor]]
"""Sum of a microbatch's losses, how many items it is a sum of, statistics to be added up: numbers, or scalars still on the device,
which nobody waits for before the step's passes are queued."""


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

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig | None,
        mesh: Mesh,
        precision: PrecisionConfig | str,
        pipeline: Pipeline | None = None,
        dispatcher: Any = None,
    ):
        """Build fresh weights; ``optim`` None: for scoring alone. ``precision``: number formats, or a dtype's name alone.

        ``pipeline``: None for 1F1B; ``dispatcher``: a choice, None for all-to-all. Raises UserError for a model whose experts are
        not whole blocks where products are in FP8, and where a package for them is missing.
        """
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        if isinstance(precision, str):
            precision = PrecisionConfig(dtype=precision)
        self.model_config, self.mesh, self.dtype = model, mesh, DTYPES[precision.dtype]
        self.pipeline = pipeline or default_pipeline(mesh.axes["pipeline"].size)
        self.config = transformer_config(model, mesh.parallel, self.dtype, products=precision.products)
        placement, here = self.pipeline.placement, mesh.axes["pipeline"].rank
        built = build_stages(model, self.config, mesh.megatron_groups(), placement, mesh.parallel.stages, dispatcher)
        self.stages = [stage.to(mesh.device.torch_device) for stage in built]
        use_products(self.stages, precision, model, mesh.parallel)
        for stage in self.stages:
            stage.fused_loss = mesh.parallel.fused_loss
        held = Stages(self.stages)
        self.embedding_copy = gradients.EmbeddingCopy(
            mesh, self.stages, placement, needed=model.tie_embeddings or bool(model.num_mtp_layers)
        )
        self.embedding_copy.share()
        numbered = dict(zip(placement[here], self.stages, strict=True))
        self.executor = Executor(mesh, self.pipeline, numbered, model.hidden_size, self.dtype)
        self.peaks = Peaks(mesh.device)
        self.optimizer = None
        self.model: torch.nn.Module = held
        if optim is not None:
            ddp = DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False, bucket_size=None
            )
            self.model = DistributedDataParallel(self.config, ddp, held)
            self._summed_here = gradients.summed_here(self.stages)
            self._make_optimizer(optim)
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
        use_moments(self.optimizer, DTYPES[optim.moment_dtype])
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
        """Give a fresh optimizer of ours its (zero) moments: Megatron loads a checkpoint into moments that are there."""
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner = part.optimizer
            if not isinstance(inner, AdamW) or inner.state:
                continue
            for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
                inner.allocate(parameter)

    @property
    def module(self) -> torch.nn.Module:
        """Megatron's GPTModel where this rank holds one stage; of several the first."""
        return self.stages[0]

    @property
    def held(self) -> Stages:
        """This rank's stages as one module."""
        return self.model if isinstance(self.model, Stages) else self.model.module

    def routers(self) -> list[torch.nn.Module]:
        """This rank's routers: of each stage's decoder layers, in order, then of its MTP block."""
        return [
            module
            for stage in self.stages
            for part in (stage.decoder, getattr(stage, "mtp", None))
            if part is not None
            for module in part.modules()
            if hasattr(module, "local_tokens_per_expert")
        ]

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and expert biases by Megatron's names, layers counted over all stages, without gradients."""
        yield from ((name, parameter.detach()) for name, parameter in self.held.named_weights())
        yield from self._expert_biases()

    def _expert_biases(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.held.named_expert_biases()

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
        self.peaks.end("rest")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        self.model.train()
        gradients.begin(self.model, self._summed_here)
        self.optimizer.zero_grad()
        self._forget_side_losses()
        biases = [(bias, bias.clone()) for _, bias in self._expert_biases()]  # updated with the gradients, before the judgement
        total, count, stats = self._run(microbatches, forward, loss, forward_only=False)
        load = self._finalize()
        mean = total / max(count, 1)
        self._judged = lambda norm: self._agreed(judge(mean, norm))
        self.peaks.end("pass")
        self.optimizer.step()
        self.peaks.end("update")
        if self._trouble:
            for bias, before in biases:
                bias.copy_(before)
        aux, mtp = self._side_losses(len(microbatches))
        return StepResult(mean, count, float(self._norm or 0.0), self._trouble, stats, aux, mtp, load)

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

    def read(self, microbatches: Sequence[Any], forward: Callable, look: Callable[[Any, Any], Any]) -> list[Any]:
        """``look(output, batch)`` of every microbatch, without gradients, on every rank; of a pipeline what its last stage saw."""
        self.model.eval()
        with torch.no_grad():
            if self.mesh.axes["pipeline"].size == 1:
                return [look(forward(self.model, batch), batch) for batch in microbatches]
            nothing = torch.zeros((), device=self.mesh.device.torch_device)
            seen = self.executor.run(
                list(microbatches), forward, lambda output, batch: (nothing, look(output, batch)), forward_only=True
            )
        if not microbatches:
            return []
        # through the host: another rank's device is not this one's
        everyone = self.mesh.gather_objects(_moved(seen, torch.device("cpu")), "pipeline")
        return _moved(next(part for part in everyone if part), self.mesh.device.torch_device)

    def _run(self, microbatches, forward, loss, *, forward_only: bool) -> tuple[float, int, dict[str, float]]:
        items, rows = self._global_batch(microbatches)
        share = 1.0 / max(items, 1)

        def forward_one(stage, batch):
            # the balance loss of a microbatch weighs by its rows: each sequence of the global batch the same (V3 2.1.2), however
            # many of its tokens are learnt
            with megatron_balance.items(len(batch.tokens_BS) / rows if items else 0), recomputing(self.mesh.parallel.recompute):
                return forward(stage, batch)

        def loss_of(output, batch):
            value, items, stats = loss(output, batch)
            return value * share, (value.detach(), items, stats)

        te.start_step(self.stages)
        with kept_weights(), megatron_mtp.scaled(share):  # no weight changes between the microbatches of a step
            kept = self.executor.run(microbatches, forward_one, loss_of, forward_only=forward_only)
        names = self._stat_names(kept)
        device = self.mesh.device.torch_device
        sums = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
        for value, count, stats in kept:
            sums += torch.stack([_wide(one, device) for one in (value, count, *(stats[name] for name in names))])
        values = self.mesh.sum(sums, "data", "context", "pipeline").tolist()
        if values[1] != items:
            raise ValueError(
                f"loss: expected as many items as the batches count, {items}, got {int(values[1])}; give a batch a num_learnt"
            )
        return values[0], items, dict(zip(names, values[2:], strict=True))

    def _global_batch(self, microbatches: list[Any]) -> tuple[int, int]:
        """Items of the loss and rows of all data ranks' microbatches. A batch that does not count its items is one item."""
        mine = torch.tensor([[getattr(batch, "num_learnt", 1), len(batch.tokens_BS)] for batch in microbatches], dtype=torch.int64)
        items, rows = self.mesh.sum(mine.sum(0).to(self.mesh.device.torch_device)).tolist()
        return items, rows

    def _stat_names(self, kept: list[tuple[float, int, dict[str, float]]]) -> list[str]:
        """Names of the loss's statistics, on the ranks without a loss too."""
        names = sorted(kept[0][2]) if kept else []
        return max(self.mesh.gather_objects(names, "pipeline"), key=len)

    def _finalize(self) -> list[list[float]]:
        """Make the gradients ready and move the expert biases; the load of the model's decoder layers, all stages'."""
        gradients.finalize(self.model, self.mesh, self.embedding_copy, self._summed_here)
        routers = self.routers()
        counts_LE = gradients.update_expert_biases(routers, self.mesh, self.config.moe_router_bias_update_rate)
        biased = [router for router in routers if router.enable_expert_bias]
        mine = []
        if counts_LE is not None:
            shares_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)
            mine = [
                (router.layer_number, shares)
                for router, shares in zip(biased, shares_LE.tolist(), strict=True)
                if router.layer_number <= self.model_config.num_layers  # MTP's are counted on from there
            ]
        everyone = (entry for part in self.mesh.gather_objects(mine, "pipeline") for entry in part)
        return [shares for _, shares in sorted(everyone)]

    def _forget_side_losses(self) -> None:
        """Empty Megatron's trackers of what forward passes without a step, or of another model in this process, have left."""
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
        megatron_mtp.take(self.mesh.device.torch_device)

    def _side_losses(self, num_microbatches: int) -> tuple[float, float]:
        """Sequence-balance loss (sum over layers, without its coefficient) and mean MTP loss of a token, over all ranks.

        Megatron's trackers are emptied.
        """
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        mesh, device = self.mesh, self.mesh.device.torch_device
        balance = get_moe_layer_wise_logging_tracker()
        aux = torch.tensor(sum(float(entry["values"].sum()) for entry in balance.values()), dtype=torch.float64, device=device)
        balance.clear()  # not only zeroed: the next model of this process may have more layers
        # a tensor or context rank holds its part of a layer's balance loss, one stage holds each layer
        aux = float(mesh.sum_everywhere(aux)) / (num_microbatches * mesh.data_size)
        total, count = mesh.sum(megatron_mtp.take(device), "data", "context", "pipeline").tolist()
        return aux, total / max(count, 1.0)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, alone or in lists and tuples, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(_moved(item, device) for item in value) if isinstance(value, list | tuple) else value


def _wide(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    return value.detach().double() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64, device=device)


def default_pipeline(num_ranks: int) -> Pipeline:
    """1F1B: one stage a rank."""
    from r1mega.registry import lookup

    return lookup("pipeline", "1f1b")().build(num_ranks)
