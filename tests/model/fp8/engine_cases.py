"""precision=fp8_te in a process that has Transformer Engine, or its stand-in for a CPU: tests/model/fp8/test_te.py starts them.

Weights, gradients and checkpoints are those of our own layers; weights are quantised once a step, and gradients of its microbatches
add up. ENGINE_DEVICE is cpu or cuda.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformer_engine

from r1mega import api
from r1mega.config.errors import UserError
from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig, PrecisionConfig
from r1mega.device import open_device
from r1mega.mesh import open_mesh
from r1mega.model.forward import TokenTensors, token_losses
from r1mega.testing.measure import ceilings
from r1mega.train import checkpoint
from r1mega.train.fit import masked_sum
from r1mega.train.gradients import begin
from r1mega.train.trainee import Trainee
from tests.model.fp8.test_linear import FP8_ERROR, error
from tests.train.cases import MODEL, OPTIM

DEVICE = os.environ["ENGINE_DEVICE"]
WIDE = replace(
    MODEL, hidden_size=128, moe_ffn_size=128, ffn_size=256, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64,
    qk_rope_head_dim=64, v_head_dim=128,
)  # fmt: skip
"""Every matrix is of whole blocks but one, as in DeepSeek-V3: the key latent with its rotary part."""
SAME = 1e-3 if DEVICE == "cpu" else 2e-2
"""Error of gradients that are the same: on a GPU those of attention are summed in any order."""


def mesh():
    kind = DeviceConfig(kind=DEVICE, threads=1, deterministic=DEVICE == "cpu")
    return open_mesh(open_device(kind), ParallelConfig(), LaunchConfig(), 1)


def trainee(products: str, model=WIDE) -> Trainee:
    torch.manual_seed(5)
    return Trainee(model, OPTIM, mesh(), PrecisionConfig(dtype="bf16", products=products))


def take_weights(target: Trainee, source: Trainee) -> Trainee:
    for (name, one), (other, two) in zip(target.held.named_weights(), source.held.named_weights(), strict=True):
        assert name == other
        one.data.copy_(two.data)
    for (_, one), (_, two) in zip(target.held.named_expert_biases(), source.held.named_expert_biases(), strict=True):
        one.copy_(two)
    target.optimizer.reload_model_params()
    return target


def batches(number: int, seed: int = 11) -> list[TokenTensors]:
    draw, found = torch.Generator().manual_seed(seed), []
    for _ in range(number):
        start, stride = torch.randint(0, 64, (8, 1), generator=draw), torch.randint(1, 4, (8, 1), generator=draw)
        whole = ((start + stride * torch.arange(33)) % 64).to(DEVICE)
        found.append(TokenTensors(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), torch.ones(8, 32, device=DEVICE)))
    return found


def step(one: Trainee, parts: list[TokenTensors], lr: float = 3e-3) -> float:
    return one.step(parts, token_losses, masked_sum, lr, lambda loss, norm: "").loss


def gradients(one: Trainee, parts: list[TokenTensors]) -> dict[str, torch.Tensor]:
    """Of the mean loss of the parts' tokens; no weight moves."""
    one.model.train()
    begin(one.model, one._summed_here)
    one._run(parts, token_losses, masked_sum, forward_only=False)
    return {name: weight.main_grad.clone() for name, weight in one.held.named_weights()}


def evaluate(one: Trainee, parts: list[TokenTensors]) -> float:
    return one.evaluate(parts, token_losses, masked_sum)[0]


def test_the_engine_is_the_one_that_these_tests_are_for() -> None:
    assert ("stand.in" in transformer_engine.__version__) == (DEVICE == "cpu")


def test_the_state_is_that_of_our_own_layers() -> None:
    ours, engines = trainee("plain"), trainee("te")
    held = [{name: (value.shape, value.dtype) for name, value in one.named_tensors()} for one in (ours, engines)]
    assert held[0] == held[1]
    states = [one.module.state_dict() for one in (ours, engines)]
    assert states[0].keys() == states[1].keys()
    assert all((states[0][name] is None) == (states[1][name] is None) for name in states[0])
    assert not {name for name, _ in engines.module.named_parameters()} ^ {name for name, _ in ours.module.named_parameters()}


def test_head_router_and_projection_of_mtp_are_not_the_engines() -> None:
    from transformer_engine.pytorch import Linear

    inside = {name for name, module in trainee("te").module.named_modules() if isinstance(module, Linear)}
    ends = {name.rpartition(".")[2] for name in inside}
    assert ends == {
        "linear_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_fc1", "linear_fc2",
    }  # fmt: skip
    assert any(name.startswith("mtp.") for name in inside) and not any("router" in name for name in inside)


def test_gradients_of_microbatches_add_up() -> None:
    """The first one overwrites what the buffers hold, so it has to be the first of the step and not of the run."""
    one, (first, second) = trainee("te"), batches(2)
    alone = [gradients(one, [part]) for part in (first, second)]
    both = gradients(one, [first, second])
    again = gradients(one, [first, second])
    for name, total in both.items():
        assert total.any(), name
        assert torch.isfinite(total).all(), name
        wanted = (alone[0][name] + alone[1][name]) / 2  # as many tokens are learnt in one as in the other
        assert error(total, wanted) < SAME and error(again[name], wanted) < SAME, name


def test_products_are_in_fp8_and_near_those_in_bf16() -> None:
    ours, parts = trainee("plain"), batches(2)
    engines = take_weights(trainee("te"), ours)
    found, wanted = evaluate(engines, parts), evaluate(ours, parts)
    assert found != wanted and abs(found - wanted) < 0.02 * wanted
    near, true = gradients(engines, parts), gradients(ours, parts)
    errors = {name: error(near[name], grad) for name, grad in true.items()}
    assert errors["output_layer.weight"] < FP8_ERROR * 4 and min(errors.values()) > 0
    # a token whose experts change places for a rounding is another token: the median of all weights
    assert sorted(errors.values())[len(errors) // 2] < 0.3


def test_quantised_weights_follow_the_optimizer_and_evaluation_does_not_keep_old_ones() -> None:
    one, parts = trainee("te"), batches(3)
    evaluate(one, parts[:1])
    for part in parts:
        step(one, [part], lr=2e-2)
        fresh = take_weights(trainee("te"), one)
        assert evaluate(one, parts) == pytest.approx(evaluate(fresh, parts), rel=1e-5)
        moved, true = gradients(one, [part]), gradients(fresh, [part])
        assert max(error(moved[name], grad) for name, grad in true.items()) < SAME


def test_a_model_learns_as_in_bf16() -> None:
    ours, parts = trainee("plain"), batches(16)
    engines = take_weights(trainee("te"), ours)
    bf16, fp8 = ([step(one, [part]) for part in parts] for one in (ours, engines))
    assert fp8 != bf16 and bf16[-1] < 0.8 * bf16[0]
    assert abs(fp8[-1] - bf16[-1]) < 0.05 * bf16[0]


@pytest.mark.parametrize(("first", "then"), [("plain", "te"), ("te", "plain"), ("te", "te")])
def test_a_run_goes_on_from_a_checkpoint_of_another_precision(tmp_path: Path, first: str, then: str) -> None:
    one, parts = trainee(first), batches(3)
    for part in parts[:2]:
        step(one, [part])
    saved = checkpoint.save(
        one, checkpoint.TrainState(2, 512, {}), tmp_path, keep_last=1, tokenizer=None, parent=None, command="pretrain"
    )
    other = trainee(then)
    assert checkpoint.load(other, saved).step == 2
    again = checkpoint.save(
        other, checkpoint.TrainState(2, 512, {}), tmp_path / "again", keep_last=1, tokenizer=None, parent=None, command="pretrain"
    )
    written, found = checkpoint.plain_tensors(saved), checkpoint.plain_tensors(again)
    assert written.keys() == found.keys() and sum("exp_avg_sq" in name for name in written) > 20
    assert all(torch.equal(value, found[name]) for name, value in written.items())
    assert step(other, parts[2:]) == pytest.approx(step(one, parts[2:]), rel=1e-5 if first == then else 0.03)


@pytest.mark.parametrize("counts", [(40, 0, 3, 21), (0, 0, 0, 16)])
def test_experts_answer_for_any_number_of_rows(counts: tuple[int, ...]) -> None:
    from r1mega.model.build import transformer_config
    from r1mega.model.experts import GroupedExperts
    from r1mega.model.fp8 import te
    from r1mega.model.fp8.te_layers import TeExperts

    groups, rows = mesh().megatron_groups(), sum(counts)
    config = transformer_config(WIDE, ParallelConfig(), torch.bfloat16, products="te")
    config.disable_parameter_transpose_cache = (
        True  # so that gradients are added to what is there, as from the second microbatch on
    )
    draw = torch.Generator().manual_seed(3)
    made, found = [cls(4, config, pg_collection=groups).to(DEVICE) for cls in (TeExperts, GroupedExperts)], []
    with torch.no_grad(), te.entered(config):  # what has been lent before the weights move is not used behind it
        made[0](torch.zeros(rows, 128, device=DEVICE).bfloat16(), torch.tensor(counts), torch.zeros(rows, device=DEVICE))
    for name in ("weight1", "weight2"):
        values = (0.1 * torch.randn(getattr(made[0], name).shape, generator=draw)).bfloat16().to(DEVICE)
        for one in made:
            getattr(one, name).data = values.clone()
            getattr(one, name).main_grad = torch.ones_like(getattr(one, name), dtype=torch.float32)
    tokens, probs = torch.randn(rows, 128, generator=draw).bfloat16(), torch.rand(rows, generator=draw)
    slope = torch.randn(rows, 128, generator=draw).bfloat16()
    for one in made:
        x, p = (value.to(DEVICE).requires_grad_() for value in (tokens.clone(), probs.clone()))
        with te.entered(config):
            out, bias = one(x, torch.tensor(counts, device=DEVICE), p)
        assert bias is None
        out.backward(slope.to(DEVICE))
        found.append([out.detach(), x.grad, p.grad, *(weight.main_grad - 1 for weight in (one.weight1, one.weight2))])
    for mine, theirs in zip(*found, strict=True):
        assert mine.shape == theirs.shape and 0.005 < error(mine, theirs) < 2 * FP8_ERROR
    assert not found[0][3][1].any() and found[0][3][3].any()  # expert 1 has no rows


def test_no_rows_are_no_trouble() -> None:
    from r1mega.model.build import transformer_config
    from r1mega.model.fp8 import te
    from r1mega.model.fp8.te_layers import TeExperts

    groups = mesh().megatron_groups()
    config = transformer_config(WIDE, ParallelConfig(), torch.bfloat16, products="te")
    experts = TeExperts(4, config, pg_collection=groups).to(DEVICE)
    x, probs = (torch.zeros(*shape, device=DEVICE).bfloat16().requires_grad_() for shape in ((0, 128), (0,)))
    with te.entered(config):
        out, _ = experts(x, torch.zeros(4, dtype=torch.int64, device=DEVICE), probs)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 128) and out.dtype == torch.bfloat16 and probs.grad.shape == (0,)


@pytest.mark.parametrize("kind", [("moe", "tokens=256"), ("moe", "tokens=250", "routed_only=true"), ("step", "microbatches=2")])
def test_bench_measures_the_peer_after_ours(monkeypatch, tmp_path: Path, capsys, kind: tuple[str, ...]) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda device: {"copy": 1e9, "bf16": 1e12})
    widths = {"moe_ffn_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}
    words = [f"bench={kind[0]}", *kind[1:], *(f"model.{name}={width}" for name, width in widths.items()), "model.v_head_dim=128"]
    words += ["model=tiny", "model.num_layers=2", "precision=fp8", "peer=true", "sequence_length=64", "rounds=2", "warmup=1"]
    api.bench(*words, f"device={DEVICE}", "device.threads=1", f"out={tmp_path}")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["precision"], told["peer"]["precision"]) == ("fp8", "fp8_te")
    ours, theirs = told["forward_backward_ms"], told["peer"]["forward_backward_ms"]
    assert told["peer_over_ours_forward_backward"] == pytest.approx(theirs / ours, rel=1e-2) and ours > 0
    if kind[0] == "step":
        assert abs(told["loss"] - told["peer"]["loss"]) < 0.1
        assert told["peer_over_ours_step"] > 0


def test_what_it_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="precision.dtype: bf16 with precision.products=te"):
        Trainee(WIDE, None, mesh(), PrecisionConfig(dtype="fp32", products="te"))
    with pytest.raises(UserError, match="model.moe_ffn_size: a multiple of 16 with precision.products=te; got 40"):
        trainee("te", replace(WIDE, moe_ffn_size=40))
