"""Activations made again: the same gradients bit for bit in every form of the model, and exactly the bytes that the formula says."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1mega.config.model import ModelConfig
from r1mega.config.run import RECOMPUTED, DeviceConfig, LaunchConfig, ParallelConfig, PrecisionConfig
from r1mega.device import open_device
from r1mega.mesh import close_mesh, open_mesh
from r1mega.model.fp8.weights import kept_weights
from r1mega.model.gradients import WeightGradients
from r1mega.model.recompute import following, is_remade, recomputing, remade
from r1mega.testing.ranks import run_ranks
from tests.train.cases import CPU, MODEL, one_rank

LENGTH, BATCH = 16, 2
SMALL = replace(MODEL, num_mtp_layers=0, q_lora_rank=24, seq_aux_loss_coef=1e-3)
BLOCKS = replace(
    SMALL,
    hidden_size=256,
    ffn_size=256,
    moe_ffn_size=128,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
)
"""Whole blocks for FP8; the projection down to keys, 192 wide, is none, as V3's."""


def stage_of(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig | None = None, device: DeviceConfig = CPU):
    """The model as one stage on the open mesh, or on a new one, from one seed."""
    from r1mega.device import DTYPES
    from r1mega.model.build import build_stages, transformer_config
    from r1mega.model.fp8.use import use_products

    parallel = parallel or ParallelConfig()
    mesh = open_mesh(open_device(device), parallel, LaunchConfig(), 1)
    torch.manual_seed(3)
    config = transformer_config(model, parallel, DTYPES[precision.dtype])
    stage = build_stages(model, config, mesh.megatron_groups())[0].to(mesh.device.torch_device)
    use_products([stage], precision, model, parallel)
    return stage.train()


def batch_of(packed: bool, device: torch.device):
    from r1mega.model.forward import TokenTensors

    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, MODEL.vocab_size, (BATCH, LENGTH + 1), generator=draw)
    segments = torch.ones(BATCH, LENGTH, dtype=torch.int32)
    segments[:, 5:] = 2
    parts = (tokens[:, :-1], tokens[:, 1:], torch.ones(BATCH, LENGTH), segments)
    return TokenTensors(*(part.to(device) for part in (parts if packed else parts[:3])))


def gradients_of(stage, kinds, *, packed: bool = False, later: bool = False) -> dict[str, torch.Tensor]:
    """Loss and all gradients of one microbatch; ``later``: weights' are put off as zero-bubble schedules do."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from r1mega.model.context import ContextPart
    from r1mega.model.forward import token_losses

    get_moe_layer_wise_logging_tracker().clear()  # another model's may be shorter
    part = ContextPart.of_group(stage.pg_collection.cp)
    stage.zero_grad(set_to_none=True)
    for router in (module for module in stage.modules() if hasattr(module, "local_tokens_per_expert")):
        router.local_tokens_per_expert.zero_()
    waiting = WeightGradients()
    with kept_weights():
        with recomputing(kinds):
            loss = token_losses(stage, batch_of(packed, next(stage.parameters()).device).cut(part)).sum()
        if later:
            with waiting.collect(0):
                loss.backward()
            waiting.run(0)
        else:
            loss.backward()
    counts = {name: buffer.clone() for name, buffer in stage.named_buffers() if name.endswith("local_tokens_per_expert")}
    return {"loss": loss.detach()} | counts | {name: weight.grad for name, weight in stage.named_parameters()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], where: str = "") -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 20
    differing = [name for name, value in theirs.items() if value is None or not torch.equal(ours[name], value)]
    assert not differing, f"{where}: {differing}"  # in full: in a process of ranks pytest does not explain an assert


FORMS = {
    "fp32": (SMALL, PrecisionConfig("fp32"), {}),
    "bf16": (SMALL, PrecisionConfig("bf16"), {}),
    "packed": (SMALL, PrecisionConfig("fp32"), {"packed": True}),
    "late": (SMALL, PrecisionConfig("bf16"), {"later": True}),
    "mtp": (replace(SMALL, num_mtp_layers=1), PrecisionConfig("fp32"), {}),
    "plain query": (replace(SMALL, q_lora_rank=None), PrecisionConfig("fp32"), {}),
    "fp8": (BLOCKS, PrecisionConfig("bf16", "fp8"), {}),
    "late fp8": (BLOCKS, PrecisionConfig("bf16", "fp8"), {"later": True, "packed": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_have_the_same_bits(form: str) -> None:
    one_rank()
    model, precision, how = FORMS[form]
    stage = stage_of(model, precision)
    want = gradients_of(stage, (), **how)
    for kinds in (*((kind,) for kind in RECOMPUTED), RECOMPUTED):
        assert_same(gradients_of(stage, kinds, **how), want)


def on_one_rank(kind: str, forms: tuple[str, ...]) -> list[str]:
    """Which forms had the same bits on a device; raises at the first that has not."""
    for form in forms:
        model, precision, how = FORMS[form]
        stage = stage_of(model, precision, device=DeviceConfig(kind=kind, threads=1, deterministic=True))
        want = gradients_of(stage, (), **how)
        assert want["loss"].device.type == kind
        for what, kinds in (("two runs", ()), ("recompute", RECOMPUTED)):  # where two runs differ, bits say nothing
            assert_same(gradients_of(stage, kinds, **how), want, f"{form}, {what}")
    return list(forms)


@pytest.mark.parametrize("kind", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_have_the_same_bits_in_a_process_of_its_own(kind: str) -> None:
    """On a GPU no other will do: where a CPU was used before, Megatron stays bent for it."""
    forms = ("bf16", "packed", "mtp", "fp8", "late fp8")
    assert run_ranks(on_one_rank, 1, kind, forms, timeout_seconds=200) == [list(forms)]


class _Storages(TorchDispatchMode):
    """Notes the storages that operations make: those of results which are none of an argument that was there before."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.made:
                self._before[storage._cdata] = StorageWeakRef(storage)
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._before:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> list[int]:
        """Bytes of each that is still there."""
        gc.collect()
        return [size for reference, size in self.made.values() if not reference.expired()]


def _storages(values) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def held_bytes(layer, hidden: torch.Tensor, kinds) -> int:
    """What a layer's forward pass leaves in memory for its backward pass."""
    layer(hidden.detach().requires_grad_(), attention_mask=None)  # tables and buffers that stay
    storages = _Storages()
    with storages, recomputing(kinds):
        output = layer(hidden, attention_mask=None)
    held = sum(storages.alive())
    del output
    assert storages.alive() == [], "all goes with the graph"
    return held


@pytest.mark.parametrize("form", [pytest.param("fp32", marks=pytest.mark.slow), "bf16", "fp8"])
@pytest.mark.parametrize("number, kind_of_layer", [(0, "dense"), (1, "sparse")])
def test_the_bytes_that_are_not_kept_are_those_of_the_formula(form: str, number: int, kind_of_layer: str) -> None:
    one_rank()
    m, precision, _ = FORMS[form]
    layer = stage_of(m, precision).decoder.layers[number]
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    hidden = torch.randn(128, 1, m.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    e, H = dtype.itemsize, m.num_heads
    query = m.qk_nope_head_dim + m.qk_rope_head_dim
    ffn = m.ffn_size if kind_of_layer == "dense" else m.num_shared_experts * m.moe_ffn_size
    # torch's kernel for a CPU wants values as wide as keys: what is kept is wider than v
    freed = {"norms": (2 * m.hidden_size + m.q_lora_rank + m.kv_lora_rank) * e, "mla_up": 3 * H * query * e, "swiglu": ffn * e}
    if form == "fp8":
        own = 1 + 4 / 128
        in_fp8 = m.q_lora_rank + m.kv_lora_rank  # both have linear layers in FP8 alone behind them
        freed["norms"] = 2 * m.hidden_size * (e + own) + in_fp8 * own  # of both norms somebody keeps bf16 too, but:
        if kind_of_layer == "dense":
            freed["norms"] -= m.hidden_size * e  # a dense FFN does not
        freed["swiglu"] = ffn * own
        latents = in_fp8 * e  # what the projections up are made again from: their layers keep FP8
        freed["mla_up"] -= latents
    before = held_bytes(layer, hidden, ())
    assert before > 0
    for kind, count in freed.items():
        assert before - held_bytes(layer, hidden, (kind,)) == 128 * count, kind
    together = sum(freed.values()) + (latents if form == "fp8" else 0)  # the norms make the latents again
    assert before - held_bytes(layer, hidden, RECOMPUTED) == 128 * together


def test_a_view_is_made_again_and_what_was_written_to_is_kept() -> None:
    calls = []

    def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(torch.is_grad_enabled())
        return 2 * x, 3 * x

    x = torch.arange(12.0).view(3, 4).requires_grad_()
    with recomputing(["mla_up"]):
        assert is_remade("mla_up") and not is_remade("norms")
        left, right = remade("mla_up", twice, x)
        wide = following(lambda tensor: torch.cat([tensor, tensor], 1), right)
        product = (left.t()[1:3].square().sum() + (wide[:, 2:6] ** 2).sum()) + remade("norms", torch.exp, x).square().sum()
    del left, right, wide
    assert calls == [True]
    (grad,) = torch.autograd.grad(product, x)
    assert calls == [True, False], "once for all that ask"
    want = torch.zeros_like(x)
    want[:, 1:3] += 8 * x.detach()[:, 1:3]
    want += 18 * x.detach()
    torch.testing.assert_close(grad, want + 2 * torch.exp(2 * x.detach()))

    with recomputing(["mla_up"]):
        left, _ = remade("mla_up", twice, x)
        with torch.no_grad():
            left.mul_(5)
        squared = left.square().sum()
    (grad,) = torch.autograd.grad(squared, x)
    torch.testing.assert_close(grad, 2 * 10 * x.detach() * 2)
    assert len(calls) == 3, "numbers that somebody changed are kept as they are"
    with torch.no_grad(), recomputing(["mla_up"]):
        assert not is_remade("mla_up")


LAYOUTS = ({"tensor": 2}, {"context": 2}, {"context": 2, "context_exchange": "ring"}, {"expert": 2}, {"expert_tensor": 2})
SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipev")


def on_two_ranks() -> list[str]:
    """One rank's part: every layout with and without."""
    from r1mega.registry import lookup
    from r1mega.testing import parity

    torch.set_num_threads(1)
    done = []
    for degrees in LAYOUTS:
        for form in ("fp32", "fp8") if "tensor" in degrees or "expert" in degrees else ("fp32",):
            model, precision, _ = FORMS[form]
            stage = stage_of(model, precision, ParallelConfig(**degrees))
            want = gradients_of(stage, (), packed=True)
            assert_same(gradients_of(stage, RECOMPUTED, packed=True), want)
            done.append(f"{degrees} {form}")
            close_mesh()
    for name in SCHEDULES:
        results = []
        for kinds in ((), RECOMPUTED):
            degrees = {"pipeline": 2, "recompute": list(kinds)}
            case = parity.Case(name, degrees, pipeline=lookup("pipeline", name)(), micro_batch_size=1, packed=True)
            results.append(step_of(case))
            close_mesh()
        assert_same(results[1], results[0])
        done.append(name)
    return done


def step_of(case) -> dict[str, torch.Tensor]:
    """Gradients, loss and weights of one optimizer step from fresh weights."""
    from r1mega.model.forward import token_losses
    from r1mega.testing import parity
    from r1mega.train.fit import masked_sum

    torch.manual_seed(11)
    trainee = parity.build(case, "cpu")
    rows = parity.rows_of(case, 0, torch.device("cpu"))
    result = trainee.step(rows, token_losses, masked_sum, 1e-3, lambda loss, norm: "")
    weights = dict(trainee.held.named_parameters())
    found = {f"gradient of {name}": weight.main_grad.clone() for name, weight in weights.items()}
    assert sum(float(grad.abs().sum()) for grad in found.values()) > 0
    return found | {"loss": torch.tensor(result.loss)} | {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.slow
def test_two_ranks_have_the_same_bits_in_every_layout_and_schedule() -> None:
    for done in run_ranks(on_two_ranks, 2, timeout_seconds=300):
        assert len(done) == len(LAYOUTS) + 2 + len(SCHEDULES), done
