"""Stages of a pipeline: the letters, every refusal in its words, and the even cut against all cuts there are."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from r1mega.config.compose import compose, preset
from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig
from r1mega.config.stages import LONGEST, StagePlan, automatic, head_cost, mtp_cost, plan, spelled, stage_violations, written

MODEL = ModelConfig(num_layers=7, num_mtp_layers=1)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("EttL", "EttL"),
        ("Et*3|t*2L", "Ettt|ttL"),
        ("E(t|)*2tL", "Et|t|tL"),
        ("Ettt|(tt|)*3tmL", "Ettt|tt|tt|tt|tmL"),
        ("(E)(t)|(((t)))*2L", "Et|ttL"),
        ("E((t)*2|)*2tL", "Ett|tt|tL"),
        ("(t*2|)*2", "tt|tt|"),
        ("t*1", "t"),
        ("", ""),
    ],
)
def test_letters_are_spelled_out(text, whole) -> None:
    assert spelled(text) == whole


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Ett,tL", "',' at character 4"),
        ("Ett L", "' ' at character 4"),
        ("ett", "'e' at character 1"),
        ("t*", "'*' at character 2"),
        ("*2t", "*2 behind no letter or group"),
        ("(*2)", "*2 behind no letter or group"),
        ("()*2", "*2 behind no letter or group"),
        ("t*2*3", "*3 behind no letter or group"),
        ("t*0", f"*0, which is not 1 to {LONGEST}"),
        ("t*99999999999999", f"*99999999999999, which is not 1 to {LONGEST}"),
        ("(tt)*50001", f"*50001, which is not 1 to {LONGEST // 2}"),
        ("((t*1000)*100|)*2", f"more than {LONGEST} letters"),
        ("t*99999tt", f"more than {LONGEST} letters"),
        ("(t", "a ( without its )"),
        ("t)", "a ) without its ("),
    ],
)
def test_what_is_no_stage_text_says_where(text, fault) -> None:
    with pytest.raises(ValueError) as caught:
        spelled(text)
    assert str(caught.value) == fault


WAY = "use parallel.stages=null, or 'parallel.stages=Ettt|ttt|tmL'"

REFUSED = [
    ("Ett|x|tmL", "the letters E, t, m, L, | between stages, *N behind a letter or (group); got Ett|x|tmL ('x' at character 5)"),
    ("Etttt|tttmL", "3 stages, parallel.pipeline x stages a rank, with | between them; got Etttt|tttmL (2)"),
    ("Ett|tt|ttmL|t", "3 stages, parallel.pipeline x stages a rank, with | between them; got Ett|tt|ttmL|t (4)"),
    ("", "3 stages, parallel.pipeline x stages a rank, with | between them; got '' (1)"),
    ("ttt|tt|ttmL", "E once, at the start of the first stage; got ttt|tt|ttmL"),
    ("ttE|tt|tttmL", "E once, at the start of the first stage; got ttE|tt|tttmL"),
    ("Ett|Ett|tttmL", "E once, at the start of the first stage; got Ett|Ett|tttmL"),
    ("Ett|tt|tttm", "L once, at the end of the last stage; got Ett|tt|tttm"),
    ("Ett|ttL|tttm", "L once, at the end of the last stage; got Ett|ttL|tttm"),
    ("EttL|tt|tttmL", "L once, at the end of the last stage; got EttL|tt|tttmL"),
    ("Ett|tt|tttL", "as many m as model.num_mtp_layers, 1; got Ett|tt|tttL (0)"),
    ("Ett|tt|tttmmL", "as many m as model.num_mtp_layers, 1; got Ett|tt|tttmmL (2)"),
    ("Ett|ttm|tttL", "m in the last stage before L, since the MTP block shares the head; got Ett|ttm|tttL"),
    ("Ett|tt|mtttL", "m in the last stage before L, since the MTP block shares the head; got Ett|tt|mtttL"),
    ("Ett|tt|ttmL", "as many t as model.num_layers, 7; got Ett|tt|ttmL (6)"),
    ("Et*99|tt|ttmL", "as many t as model.num_layers, 7; got Et*99|tt|ttmL (103)"),
    ("Ettttttt||mL", "a layer t in every stage; got Ettttttt||mL (none in stage 2, 3)"),
    ("E|tttt|tttmL", "a layer t in every stage; got E|tttt|tttmL (none in stage 1)"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_broken_rule_shows_a_text_that_fits(text, message) -> None:
    model = dataclasses.replace(MODEL, vocab_size=2)  # nearly no head, so that the way out is easily seen
    found = [str(item) for item in stage_violations(model, 3, text)]
    assert found == [f"parallel.stages: {message}; {WAY}"]
    with pytest.raises(UserError) as caught:
        plan(model, 3, text)
    assert str(caught.value) == found[0]
    assert list(stage_violations(model, 3, "Ettt|ttt|tmL")) == []


def test_a_text_without_mtp_needs_no_m() -> None:
    model = dataclasses.replace(MODEL, num_mtp_layers=0)
    assert written(plan(model, 2, "Ettt|ttttL")) == "Ettt|ttttL"
    assert "as many m as model.num_mtp_layers, 0; got Ettt|ttttmL (1); use" in str(next(stage_violations(model, 2, "Ettt|ttttmL")))


def test_a_plan_names_layers_and_ends() -> None:
    assert plan(MODEL, 3, "Ett|(t)*4|tmL") == (
        StagePlan(0, 2, embedding=True),
        StagePlan(2, 4),
        StagePlan(6, 1, head=True, mtp=True),
    )
    assert plan(MODEL, 1) == plan(MODEL, 1, "Et*7mL") == (StagePlan(0, 7, True, True, True),)


def test_fewer_layers_than_stages_are_refused() -> None:
    line = "parallel.pipeline: at most a stage a layer, model.num_layers 7; got 8 stages; use fewer pipeline ranks or stages a rank"
    with pytest.raises(UserError) as caught:
        plan(MODEL, 8)
    assert str(caught.value) == line
    assert len(plan(MODEL, 7)) == 7
    with pytest.raises(UserError, match="got 3 stages for 2 layers"):
        automatic(2, 3)


@pytest.mark.parametrize("extra", [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.7, 9.0, 40.0])
def test_the_even_cut_is_the_best_of_all_cuts(extra) -> None:
    for num_layers in range(1, 11):
        for num_stages in range(1, num_layers + 1):
            cuts = []
            for bars in itertools.combinations(range(1, num_layers), num_stages - 1):
                edges = (0, *bars, num_layers)
                counts = [high - low for low, high in itertools.pairwise(edges)]
                loads = sorted([float(count) for count in counts[:-1]] + [counts[-1] + extra], reverse=True)
                cuts.append((loads, counts))
            assert automatic(num_layers, num_stages, extra / 2, extra / 2) == min(cuts)[1], (num_layers, num_stages)


def test_equal_cuts_give_the_later_stages_more() -> None:
    assert automatic(8, 3) == [2, 3, 3] and automatic(7, 4) == [1, 2, 2, 2]
    assert automatic(4, 2, head_cost=1.0) == [2, 2], "3 + 2 is as full as 2 + 3"
    assert automatic(10**12, 4, 2.0) == [250_000_000_000] * 2 + [250_000_000_001, 249_999_999_999], "no walk over the layers"


def test_costs_are_the_weights_of_the_published_shapes() -> None:
    v3 = preset("model", "deepseek_v3")
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    assert 3 * v3.ffn_size == 3 * 9 * v3.moe_ffn_size, "V3's dense layers are as wide as a token's nine experts"
    layer = attention + 3 * 7168 * 18432
    assert head_cost(v3) == pytest.approx(129280 * 7168 / layer)
    assert mtp_cost(v3) == pytest.approx(1 + (2 * 7168**2 + 129280 * 7168) / layer)
    assert mtp_cost(dataclasses.replace(v3, num_mtp_layers=0)) == 0
    wide = dataclasses.replace(v3, first_k_dense=61, ffn_size=2 * 18432)
    assert head_cost(wide) == pytest.approx(129280 * 7168 / (attention + 6 * 7168 * 18432))
    assert [stage.num_layers for stage in plan(v3, 16)] == [4] * 15 + [1]


def test_hydra_takes_the_letters(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    base = ("data.train={t:1}", "trainer.steps=3000", "data.sequence_length=512", "launch.processes=2", "parallel.pipeline=2")
    for text, whole in (("Ett|ttmL", "Ett|ttmL"), ("Et*3|tmL", "Ettt|tmL"), ('"E(t)*2|(t)*2mL"', "Ett|ttmL")):
        cfg = compose("pretrain", [*base, f"parallel.stages={text}"])
        assert written(plan(cfg.model, 2, cfg.parallel.stages)) == whole
    with pytest.raises(UserError, match=r"parallel\.stages: as many t as model\.num_layers, 4; got Ett\|tmL \(3\)"):
        compose("pretrain", [*base, "parallel.stages=Ett|tmL"])
