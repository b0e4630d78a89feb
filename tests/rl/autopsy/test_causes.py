"""Nine planted causes: each is named, with the row, tensor or layer that it lies in. The faults are the tests', none the product's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from r1mega.config.errors import Failed
from r1mega.config.rl import DiffBudgetConfig
from r1mega.config.tools import AutopsyConfig
from r1mega.rl.autopsy.changes import rounded_fp8
from r1mega.rl.autopsy.command import autopsy
from r1mega.rl.engine import LocalEngine
from r1mega.rl.loop import turn
from r1mega.rl.run import Run
from r1mega.train.policy import Policy
from tests.rl.autopsy.cases import places, rollout
from tests.train.cases import CPU

LAYER = "model.layers.1."


def told(run: Run, **settings: Any) -> dict[str, Any]:
    """The first cause of the last rollout with evidence."""
    return autopsy(AutopsyConfig(run=str(run.folder), device=CPU, **settings))["causes"][0]


def test_a_sound_rollout_is_within_its_budget(begin) -> None:
    run = begin()
    assert rollout(run) and run._watch.gap.mean < 1e-5 and run._watch.gap.tokens > 50
    assert not (run.folder / "autopsy").exists()
    run = begin(diff_budget=DiffBudgetConfig(mean=1e-9))  # evidence of a difference that another budget allows
    assert rollout(run)
    with pytest.raises(Failed, match="rollout 1: engine and trainer agree within the budget: mean .* of 0.001"):
        _with_usual_budget(run)


def _with_usual_budget(run: Run) -> None:
    path = next((run.folder / "autopsy").rglob("rank-00000.pt"))
    values = torch.load(path, weights_only=True)
    values["facts"]["budget"] |= {"mean": 1e-3}
    torch.save(values, path)
    autopsy(AutopsyConfig(run=str(run.folder), device=CPU))


@pytest.mark.parametrize("edit", ["lost", "added", "changed", "moved"])
def test_ids_of_one_row_are_not_those_that_were_scored(begin, edit: str) -> None:
    run = begin()

    def spoil(rows) -> None:
        made = rows[3].completion
        ids, logprobs = list(made.token_ids), list(made.logprobs)
        if edit == "lost":
            ids = [*ids[1:], 9]
        elif edit == "added":
            ids = [*ids[:2], 9, *ids[2:-1]]
        elif edit == "changed":
            ids[1] = (ids[1] + 1) % 200
        else:
            logprobs = [*logprobs[1:], logprobs[0]]
        rows[3].completion = replace(made, token_ids=ids, logprobs=logprobs)

    assert rollout(run, rows=spoil)
    cause = told(run)
    words = {
        "lost": "is lost before response place 0",
        "added": "the id at response place 2 was not there",
        "moved": "moved by one place",
    }
    assert cause["kind"] == "tokens" and cause["where"] == ("row 3",) and cause["explained"] > 0.9, cause
    assert words.get(edit, "was scored at response place 1") in cause["says"]


def _at(run: Run, temperature: float) -> None:
    true = run.engine.generate
    run.engine.generate = lambda prompts, sampling, *rest: true(prompts, replace(sampling, temperature=temperature), *rest)


@pytest.mark.parametrize("temperature", [1.0, 0.49, 0.8])
def test_the_temperature_is_ignored_or_taken_twice_or_another(begin, temperature: float) -> None:
    run = begin(temperature=0.7)
    assert rollout(run, lambda run: _at(run, temperature))
    cause = told(run)
    words = {1.0: "does not apply the temperature 0.7", 0.49: "applies it twice", 0.8: "another temperature, 0.8"}
    assert cause["kind"] == "sampling" and words[temperature] in cause["says"] and cause["left"] < 1e-4, cause


@pytest.mark.parametrize("cut", ["top_p", "top_k"])
def test_the_engine_renormalises(begin, monkeypatch, cut: str) -> None:
    from r1mega.rl.engine import inprocess

    true = inprocess.draw

    def draw(logits_BV, uniform_B, temperature):
        ordered, order = torch.softmax(logits_BV / temperature, -1).sort(-1, descending=True)
        kept = (ordered.cumsum(-1) - ordered < 0.8) if cut == "top_p" else torch.arange(ordered.shape[1])[None] < 20
        kept = kept.expand_as(ordered)
        mask = torch.zeros_like(kept, memory_format=torch.contiguous_format).scatter(1, order, kept)
        return true(logits_BV.masked_fill(~mask, float("-inf")), uniform_B, temperature)

    monkeypatch.setattr(inprocess, "draw", draw)
    run = begin()
    assert rollout(run)
    cause = told(run)
    assert cause["kind"] == "sampling" and cause["where"] == ("top_p 0.8" if cut == "top_p" else "top_k 20",), cause
    assert cause["left"] < 1e-3


def _reports_other(run: Run, spoil: Callable[[Run], None]) -> Callable[[Run], None]:
    """The engine generates with spoilt weights, and says when it is asked that it has the right ones."""

    def hidden(run: Run) -> None:
        true = run.engine.generate

        def generate(*args):
            before = {name: place.clone() for name, place in places(run).items()}
            spoil(run)
            try:
                return true(*args)
            finally:
                for name, place in places(run).items():
                    place.copy_(before[name])

        run.engine.generate = generate

    return hidden


@pytest.fixture(params=["asked", "not asked"])
def either(request):
    """``either(run, spoil)``: as the engine's hashes show it, and as they do not."""
    return (lambda run, spoil: spoil) if request.param == "asked" else _reports_other


def test_one_tensor_is_stale(begin, either) -> None:
    run, name = begin(), f"{LAYER}self_attn.o_proj.weight"
    run.push()
    old = places(run)[name].clone()
    turn(run)
    assert rollout(run, either(run, lambda run: places(run)[name].copy_(old)))
    cause = told(run)
    assert cause["kind"] == "weights" and cause["where"] == (name,) and "version 0" in cause["says"], cause
    assert cause["explained"] > 0.9


def test_the_expert_bias_is_dropped(begin, either) -> None:
    run, name = begin(), f"{LAYER}mlp.gate.e_score_correction_bias"
    for native, tensor in run.policy.trainee.named_tensors():
        if native.endswith("expert_bias"):
            tensor.copy_(torch.linspace(-0.4, 0.4, len(tensor)))
    assert rollout(run, either(run, lambda run: places(run)[name].zero_()))
    cause = told(run)
    assert cause["kind"] == "routing" and cause["where"] == (name,) and cause["explained"] > 0.9, cause
    assert "bias" in cause["says"] and "layer 1" in cause["says"]


def test_experts_are_exchanged(begin, either) -> None:
    def spoil(run: Run) -> None:
        held = places(run)
        for kind in ("gate_proj", "up_proj", "down_proj"):
            left, right = (held[f"{LAYER}mlp.experts.{expert}.{kind}.weight"] for expert in (2, 5))
            both = left.clone(), right.clone()
            left.copy_(both[1])
            right.copy_(both[0])

    run = begin()
    assert rollout(run, either(run, spoil))
    cause = told(run)
    assert cause["kind"] == "routing" and cause["explained"] > 0.9, cause
    assert {name.split(".")[5] for name in cause["where"]} == {"2", "5"}


@pytest.mark.parametrize("wrong", [f"{LAYER}self_attn.kv_b_proj.weight", None])
def test_fp8_with_a_wrong_scale_and_fp8_at_all(begin, either, wrong: str | None) -> None:
    def spoil(run: Run) -> None:
        roles = {part.name: part.role for part in _parts(run)}
        for name, place in places(run).items():
            if roles.get(name) == "linear":
                place.copy_(rounded_fp8(place))
        if wrong:
            places(run)[wrong].mul_(2)

    run = begin()
    assert rollout(run, either(run, spoil))
    cause = told(run)
    assert cause["kind"] == "quantisation" and cause["explained"] > 0.9, cause
    assert "FP8" in cause["says"] and (wrong is None or cause["where"] == (wrong,))


def _parts(run: Run):
    from r1mega.model.names import parts

    return parts(run.policy.model_config)


def test_rows_of_the_version_before_say_that_they_are_new(begin) -> None:
    run = begin()
    run.push()
    old = {name: place.clone() for name, place in places(run).items()}
    turn(run)

    def spoil(run: Run) -> None:
        true = run.engine.generate

        def generate(*asked):
            new = true(*asked)
            held = {name: place.clone() for name, place in places(run).items()}
            for values in (old, held):
                for name, place in places(run).items():
                    place.copy_(values[name])
                if values is old:
                    stale = true(*asked)
            return [one if idx % 2 else other for idx, (one, other) in enumerate(zip(stale, new, strict=True))]

        run.engine.generate = generate

    assert rollout(run, spoil)
    cause = told(run)
    assert cause["kind"] == "staleness" and cause["explained"] > 0.9, cause
    assert sorted(cause["where"]) == [f"row {place}" for place in (1, 3, 5, 7)]
    assert "version 0" in cause["says"] and "labelled 1" in cause["says"]


@pytest.mark.parametrize("part", ["norm", "rope"])
def test_one_layer_of_the_trainer_computes_something_else(begin, monkeypatch, part: str) -> None:
    true = Policy.__init__

    def spoilt(self, *args, **kwargs):
        true(self, *args, **kwargs)
        layer = self.trainee.module.decoder.layers[1]
        if part == "norm":
            layer.pre_mlp_layernorm.eps = 0.05
            return
        tables = layer.self_attention._cos_sin
        layer.self_attention._cos_sin = lambda *args, **kwargs: tuple(table.roll(1, -1) for table in tables(*args, **kwargs))

    monkeypatch.setattr(Policy, "__init__", spoilt)
    run = begin()
    assert rollout(run)
    cause = told(run)
    names = {"norm": "decoder.layers.1.pre_mlp_layernorm", "rope": "decoder.layers.1.self_attention.core_attention"}
    assert cause["kind"] == "layer" and cause["where"][0] == names[part] and cause["explained"] > 0.9, cause


def test_an_engine_in_bf16_rounds(begin) -> None:
    run = begin(engine=LocalEngine(dtype="bfloat16"), diff_budget=DiffBudgetConfig(mean=1e-4, rows=8))
    assert rollout(run)
    cause = told(run)
    assert cause["kind"] == "rounding" and cause["where"] == ("bf16",), cause
