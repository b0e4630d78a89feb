"""The parity kit: a layout or a strategy of your own against one process, from one seed checkpoint, on the same tokens.

:func:`check` starts ranks, makes the same steps under every :class:`Case` and raises :class:`ParityError`, which names what differs
first: losses, gradient norm, router choices, the gradient of each tensor after one step, each tensor after the last. fp32 unless a
case says otherwise, Adam's epsilon 1e-6 (a smaller one turns rounding of tiny gradients into whole steps), no clipping (which would
spread one wrong gradient).
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig, PrecisionConfig
from r1mega.config.train import OptimConfig
from r1mega.testing.ranks import run_ranks
from r1mega.testing.routing import TIE, RouterLog, disagreements

TOLERANCE = 1e-5
MODEL = ModelConfig(
    vocab_size=64,
    max_position_embeddings=128,
    hidden_size=32,
    num_layers=5,
    num_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    yarn=YarnConfig(factor=4.0, original_max_position_embeddings=32),
    first_k_dense=1,
    ffn_size=48,
    moe_ffn_size=16,
    num_experts=8,
    top_k=4,
    num_groups=4,
    topk_groups=2,
    num_mtp_layers=1,
    init_std=0.05,
)
"""Small, and with all that a layout can get wrong: a dense first layer, five layers for uneven stages, groups, MTP."""
ROUTER_SCALE = 8.0
"""Of the seed checkpoint's router weights: fresh ones score experts nearly alike, so that rounding turns a choice now and then."""
MOMENTS = "optimizer.state.exp_avg."
CURSOR = {"epoch": 1, "at": 7}
"""A loader's state that the checkpoints carry, so that a test of resharding sees it kept."""
OPTIM = OptimConfig(lr=2e-3, min_lr=2e-3, warmup_steps=0, decay="constant", eps=1e-6, clip_grad=1e9)


@dataclass(frozen=True)
class Case:
    """One layout under test. ``parallel``: degrees, as ``ParallelConfig``'s fields; choices as they come from the registry.

    ``rows``: of the global batch; ``micro_batch_size``: of one microbatch of one rank; ``packed``: rows of several samples that
    do not see each other, with tokens that are not learnt; ``seed``: of the tokens, for another try where a run differs only
    behind a tie of a router; ``model``: fields of :data:`MODEL` that differ; ``precision``: number formats of the layout and of its
    reference; ``tolerance``: of all differences, relative; routers may also disagree where experts score that near to each other.
    """

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    pipeline: Any = None
    dispatcher: Any = None
    rows: int = 8
    length: int = 32
    micro_batch_size: int = 2
    packed: bool = False
    steps: int = 5
    seed: int = 1000
    model: dict[str, Any] = field(default_factory=dict)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    tolerance: float = TOLERANCE

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return replace(MODEL, **self.model)

    @property
    def reference_rows(self) -> int:
        """Of one microbatch of the reference: all; in FP8, where a microbatch's tokens share scales, as many as in the layout."""
        return self.micro_batch_size if self.precision.products == "fp8" else self.rows

    @property
    def problem(self) -> str:
        """Which reference the case has: the same text, the same tokens and model."""
        sizes = f"{self.rows}x{self.length}x{self.steps}s{self.seed}{'p' if self.packed else ''}"
        formats = "" if self.precision == PrecisionConfig() else f"{self.precision}{self.reference_rows}"
        return sizes + json.dumps(self.model, sort_keys=True) + formats


class ParityError(AssertionError):
    """A layout does not learn what one process learns; the text names what differs first, by how much, and what follows."""


def check(cases: Sequence[Case], world_size: int, *, device: str = "cpu", timeout_seconds: float = 600.0, keep: Path | None = None):
    """Run every case on ``world_size`` ranks, started once, and compare it with one process. Raises ParityError.

    ``keep``: folder for the runs' checkpoints; a temporary one without. References are made once for each problem in there.
    """
    with tempfile.TemporaryDirectory(prefix="parity-") as place:
        folder = Path(keep or place)
        run(cases, world_size, folder, device=device, timeout_seconds=timeout_seconds)
        faults = {case.name: found for case in cases if (found := differences(case, folder))}
    if faults:
        raise ParityError("\n".join(f"{name}: {_told(found)}" for name, found in faults.items()))


def _told(found: list[str]) -> str:
    """The first difference, the first tensor, how many there are."""
    tensor = next((text for text in found if text.startswith(("gradient of", "weights of", "tensor "))), found[0])
    return f"{found[0]}{'' if tensor == found[0] else f'; first tensor: {tensor}'}; {len(found)} differences in all"


def run(cases: Sequence[Case], world_size: int, folder: Path, *, device: str = "cpu", timeout_seconds: float = 600.0) -> None:
    """Make the runs of ``cases``, and of their references where ``folder`` has none yet."""
    missing = {case.problem: case for case in cases if not (_folder(folder, case, reference=True) / "record.json").is_file()}
    if missing:
        run_ranks(make_references, 1, list(missing.values()), folder, device, timeout_seconds=timeout_seconds)
    run_ranks(run_cases, world_size, list(cases), folder, device, timeout_seconds=timeout_seconds)


def differences(case: Case, folder: Path) -> list[str]:
    """What a case's run has otherwise than its reference, in the order of the computation; empty where they agree.

    Gradients come in the order of the backward pass: the first that is wrong lies where the fault does, or next to it.
    """
    ours, theirs, tolerance = _folder(folder, case), _folder(folder, case, reference=True), case.tolerance
    mine, wanted = (json.loads((path / "record.json").read_text()) for path in (ours, theirs))
    found = [
        f"{name} of step {step + 1} is {got:.8g}, not {want:.8g}"
        for step in range(1)
        for name, got, want in _numbers(mine, wanted, step)
        if abs(got - want) > tolerance * max(1.0, abs(want))
    ]
    found += disagreements(mine["routes"], wanted["routes"], max(TIE, tolerance))
    found += _tensors(ours / "first", theirs / "first", tolerance, moments=True)
    found += [
        f"{name} of step {step + 1} is {got:.8g}, not {want:.8g}"
        for step in range(1, case.steps)
        for name, got, want in _numbers(mine, wanted, step)
        if abs(got - want) > tolerance * max(1.0, abs(want))
    ]
    return found + _tensors(ours / "last", theirs / "last", tolerance, moments=False)


def _numbers(mine: dict, wanted: dict, step: int):
    for name in ("loss", "mtp_loss", "aux_loss", "grad_norm"):
        yield name, mine["steps"][step][name], wanted["steps"][step][name]


def _tensors(ours: Path, theirs: Path, tolerance: float, *, moments: bool) -> list[str]:
    """Tensors whose difference has a norm above ``tolerance`` x their own; ``moments``: the first moments (gradients) instead."""
    prefix = MOMENTS
    mine, wanted = _stored(ours), _stored(theirs)
    pick = (
        {name for name in wanted if name.startswith(prefix)} if moments else {n for n in wanted if not n.startswith("optimizer.")}
    )
    missing = [f"tensor {name} is missing" for name in sorted(pick - mine.keys())]
    whole = sum(float(wanted[name].norm()) ** 2 for name in pick) ** 0.5
    found = []
    for name in sorted(pick & mine.keys(), key=lambda name: place_of(name.removeprefix(prefix)), reverse=moments):
        # a gradient that nearly cancels is rounding, however small it is: measured against a thousandth of the whole
        norm = max(float(wanted[name].norm()), 1e-3 * whole if moments else 1e-12)
        off = float((mine[name] - wanted[name]).norm()) / norm
        if not off <= tolerance * (10 if moments else 1):
            what = "gradient" if moments else "weights"
            found.append(f"{what} of {name.removeprefix(prefix)} differ by {off:.2e} of their norm")
    return missing + found


def place_of(name: str) -> tuple:
    """Where a tensor stands in the forward pass, for sorting: embedding, layers, final norm, head, MTP."""
    parts = name.split(".")
    order = ("embedding", "decoder.layers", "decoder.final_layernorm", "output_layer", "mtp")
    kind = next((number for number, start in enumerate(order) if name.startswith(start)), len(order))
    inside = ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp")
    layer = int(parts[2]) if kind == 1 and parts[2].isdigit() else 0
    return kind, layer, next((number for number, part in enumerate(inside) if part in parts), 0), name


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, read by a process without ranks."""
    return torch.load(folder / "tensors.pt", weights_only=True)


def _folder(folder: Path, case: Case, *, reference: bool = False) -> Path:
    import hashlib

    return folder / (hashlib.sha256(case.problem.encode()).hexdigest()[:12] if reference else case.name)


def make_references(cases: Sequence[Case], folder: Path, device: str) -> None:
    """One process's runs, in one microbatch, from fresh weights, which are kept as the seed checkpoint."""
    for case in cases:
        alone = replace(case, parallel={}, pipeline=None, dispatcher=None, micro_batch_size=case.reference_rows)
        _run(alone, _folder(folder, case, reference=True), None, device)


def run_cases(cases: Sequence[Case], folder: Path, device: str) -> None:
    """This rank's part of every case, from the references' seed checkpoints."""
    gc.freeze()  # Megatron collects garbage at each save; what is imported is none
    for case in cases:
        _run(case, _folder(folder, case), _folder(folder, case, reference=True) / "seed", device)


def build(case: Case, device: str) -> Any:
    """This rank's ``Trainee`` under the layout, with fresh weights; opens the mesh, which the caller closes."""
    from r1mega.device import open_device
    from r1mega.mesh import open_mesh
    from r1mega.train.trainee import Trainee, default_pipeline

    parallel = ParallelConfig(**case.parallel)
    pipeline = case.pipeline.build(parallel.pipeline) if case.pipeline else default_pipeline(parallel.pipeline)
    place = open_device(DeviceConfig(kind=device, threads=1))
    launch = LaunchConfig(timeout_seconds=300, stall_timeout_seconds=120)
    mesh = open_mesh(place, parallel, launch, 1, len(pipeline.placement[0]))
    return Trainee(case.config, OPTIM, mesh, case.precision, pipeline, case.dispatcher)


def _run(case: Case, out: Path, seed: Path | None, device: str) -> None:
    from r1mega.mesh import close_mesh
    from r1mega.model.context import ContextPart
    from r1mega.model.forward import token_losses
    from r1mega.train import checkpoint
    from r1mega.train.checkpoint import TrainState
    from r1mega.train.fit import masked_sum

    trainee = build(case, device)
    mesh, place = trainee.mesh, trainee.mesh.device

    def save(name: str) -> Path:
        common = {"keep_last": 1, "tokenizer": None, "parent": None, "command": "parity"}
        path = checkpoint.save(trainee, TrainState(case.steps, cursor=CURSOR), out / f"{name}.run", **common)
        if mesh.is_first:
            kept = {"prefix": MOMENTS} if name == "first" else {"without": "optimizer."}
            tensors = checkpoint.plain_tensors(path, **kept)
            (out / name).mkdir(parents=True, exist_ok=True)
            torch.save(tensors, out / name / "tensors.pt")
        mesh.barrier()
        return path

    if seed is None:
        trainee.allocate_moments()  # a checkpoint has them
        with torch.no_grad():
            for router in trainee.routers():
                router.weight.mul_(ROUTER_SCALE)
        trainee.optimizer.reload_model_params()
        shutil.copytree(save("start"), out / "seed")
    else:
        checkpoint.load(trainee, seed, weights_only=True)
    log = RouterLog(trainee.routers(), mesh)
    steps = []
    for step in range(case.steps):
        rows = rows_of(case, step, place.torch_device)
        mine = rows[mesh.data_rank * case.rows // mesh.data_size : (mesh.data_rank + 1) * case.rows // mesh.data_size]
        parts = [_joined(mine[at : at + case.micro_batch_size]) for at in range(0, len(mine), case.micro_batch_size)]
        cut = [part.cut(ContextPart.of(mesh.axes["context"])) for part in parts]
        with log.recording(mesh.data_rank * case.rows // mesh.data_size, cut) if step == 0 else log.off():
            result = trainee.step(cut, token_losses, masked_sum, OPTIM.lr, lambda loss, norm: "")
        steps.append({name: getattr(result, name) for name in ("loss", "mtp_loss", "aux_loss", "grad_norm")})
        if step == 0:
            save("first")
    save("last")
    routes = log.gathered()
    if mesh.is_first:
        (out / "record.json").write_text(json.dumps({"steps": steps, "routes": routes}))
    mesh.barrier()
    close_mesh()


def rows_of(case: Case, step: int, device: torch.device) -> list:
    """The global batch of a step, a row each, the same on every rank."""
    from r1mega.model.forward import TokenTensors

    draw = torch.Generator().manual_seed(case.seed + step)
    tokens = torch.randint(3, case.config.vocab_size, (case.rows, case.length + 1), generator=draw)
    rows = []
    for row in tokens:
        mask, segments = torch.ones(1, case.length), None
        if case.packed:
            cuts = sorted(torch.randint(1, case.length, (2,), generator=draw).tolist())
            segments = torch.ones(1, case.length, dtype=torch.int32)
            for number, start in enumerate(cuts):
                segments[0, start:] = number + 2
            mask = (torch.rand(1, case.length, generator=draw) < 0.7).float()
        rows.append(
            TokenTensors(
                row[None, :-1].to(device),
                row[None, 1:].to(device),
                mask.to(device),
                None if segments is None else segments.to(device),
            )
        )
    return rows


def _joined(rows: list):
    """One microbatch of rows."""
    from r1mega.model.forward import TokenTensors

    fields = [[getattr(row, name) for row in rows] for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "segment_ids_BS")]
    return TokenTensors(*(None if values[0] is None else torch.cat(values) for values in fields))
