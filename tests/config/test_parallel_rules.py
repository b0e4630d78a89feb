"""Rules of the layout: every axis with the wrong number, the whole line that answers it, and ways out that mend it; named layouts."""

from __future__ import annotations

import dataclasses
import inspect
import time

import pytest
import yaml

from r1mega import registry
from r1mega.config import parallel_rules
from r1mega.config.compose import compose, composition, config_dir, load_config, preset, save_config
from r1mega.config.errors import UserError
from r1mega.config.knob import knob
from r1mega.config.model_rules import check_model
from r1mega.config.rules import check, check_cut, field_violations
from r1mega.config.run import ParallelConfig
from r1mega.config.train import USUAL, PretrainConfig, SftConfig, TrainerConfig
from r1mega.train.pipeline.schedule import Action
from tests.config.test_rules import BASE, MODEL, PRETRAIN, violations

N = "launch.processes"

WRONG = [
    # command, overrides, the whole line
    # tensor
    ("pretrain", f"{N}=3 parallel.tensor=2 trainer.global_batch_size=48", f"parallel: tensor x pipeline x context divides {N} 3; got 2 x 1 x 1 = 2; use parallel.tensor=1, or {N}=2 or 4"),
    ("pretrain", f"{N}=8 parallel.tensor=8 trainer.global_batch_size=64", "model.num_heads: a multiple of parallel.tensor 8; got 4; use parallel.tensor=1, 2 or 4, or model.num_heads=8"),
    ("pretrain", f"{N}=4 parallel.tensor=4 model.vocab_size=510", "model.vocab_size: a multiple of parallel.tensor 4; got 510; use parallel.tensor=1 or 2, or model.vocab_size=508 or 512"),
    ("pretrain", f"{N}=4 parallel.tensor=4 model.ffn_size=322", "model.ffn_size: a multiple of parallel.tensor 4; got 322; use parallel.tensor=1 or 2, or model.ffn_size=320 or 324"),
    ("pretrain", f"{N}=4 parallel.tensor=4 model.moe_ffn_size=66", "model.moe_ffn_size: num_shared_experts x moe_ffn_size is a multiple of parallel.tensor 4; got 66; use parallel.tensor=1 or 2"),
    ("sft", f"{N}=4 parallel.tensor=4 data.sequence_length=510", "data.sequence_length: a multiple of 4, which tensor and context parallel cut it into; got 510; use data.sequence_length=508 or 512"),
    # pipeline
    ("sft", f"{N}=4 parallel.pipeline=3", f"parallel: tensor x pipeline x context divides {N} 4; got 1 x 3 x 1 = 3; use parallel.pipeline=1, 2 or 4, or {N}=3 or 6"),
    ("pretrain", f"{N}=8 parallel.pipeline=8 trainer.global_batch_size=64", "parallel.pipeline: at most model.num_layers 4; got 8; use parallel.pipeline=1, 2 or 4, or model.num_layers=8"),
    ("pretrain", f"{N}=4 parallel.pipeline=4 pipeline=interleaved", "parallel.pipeline: at most a stage a layer: parallel.pipeline x 2 stages a rank is at most model.num_layers 4; got 4 x 2 = 8; use parallel.pipeline=1 or 2, or model.num_layers=8"),
    ("pretrain", f"{N}=2 parallel.pipeline=2 pipeline=interleaved pipeline.chunks=3", "parallel.pipeline: at most a stage a layer: parallel.pipeline x 3 stages a rank is at most model.num_layers 4; got 2 x 3 = 6; use parallel.pipeline=1, or model.num_layers=6"),
    ("pretrain", f"{N}=4 parallel.pipeline=4 pipeline=dualpipev trainer.micro_batch_size=4", "parallel.pipeline: at most a stage a layer: parallel.pipeline x 2 stages a rank is at most model.num_layers 4; got 4 x 2 = 8; use parallel.pipeline=1 or 2, or model.num_layers=8"),
    ("sft", f"{N}=2 parallel.pipeline=2 pipeline=none", "parallel.pipeline: 1 with pipeline=none, which cuts the model into no stages; got 2; use parallel.pipeline=1, or pipeline=1f1b"),
    ("sft", f"{N}=4 parallel.pipeline=4 pipeline=interleaved trainer.global_batch_size=40", "trainer.global_batch_size: a multiple of trainer.micro_batch_size 8 x 1 data ranks x parallel.pipeline 4, for pipeline=interleaved; got 40; use trainer.global_batch_size=32 or 64, or trainer.micro_batch_size=2, 5 or 10"),
    ("sft", f"{N}=4 parallel.pipeline=4 pipeline=interleaved trainer.global_batch_size=8", "trainer.global_batch_size: a multiple of trainer.micro_batch_size 8 x 1 data ranks x parallel.pipeline 4, for pipeline=interleaved; got 8; use trainer.global_batch_size=32, or trainer.micro_batch_size=1 or 2"),
    ("sft", f"{N}=4 parallel.pipeline=4 pipeline=dualpipev", "trainer.global_batch_size: at least 8 microbatches of trainer.micro_batch_size 8 x 1 data ranks, for pipeline=dualpipev with parallel.pipeline 4; got 32; use trainer.global_batch_size=64, or trainer.micro_batch_size=1, 2 or 4"),
    ("sft", f"{N}=4 parallel.pipeline=4 pipeline=interleaved optim.batch_ramp_start=8 optim.batch_ramp_steps=9", "optim.batch_ramp_start: a multiple of trainer.micro_batch_size 8 x 1 data ranks x parallel.pipeline 4, for pipeline=interleaved; got 8; use optim.batch_ramp_start=32"),
    ("sft", f"{N}=4 parallel.pipeline=4 pipeline=dualpipev trainer.micro_batch_size=4 optim.batch_ramp_start=28 optim.batch_ramp_steps=9", "optim.batch_ramp_start: at least 8 microbatches of trainer.micro_batch_size 4 x 1 data ranks, for pipeline=dualpipev with parallel.pipeline 4; got 28; use optim.batch_ramp_start=32"),
    ("pretrain", f"{N}=2 parallel.pipeline=2 parallel.stages=Ettt|mL", "parallel.stages: as many t as model.num_layers, 4; got Ettt|mL (3); use parallel.stages=null, or 'parallel.stages=Ettt|tmL'"),
    ("pretrain", "parallel.stages=Ettt|tmL", "parallel.stages: 1 stages, parallel.pipeline x stages a rank, with | between them; got Ettt|tmL (2); use parallel.stages=null, or 'parallel.stages=EttttmL'"),
    ("pretrain", f"{N}=2 parallel.pipeline=2 pipeline=dualpipev parallel.stages=Ettt|tmL", "parallel.stages: 4 stages, parallel.pipeline x stages a rank, with | between them; got Ettt|tmL (2); use parallel.stages=null, or 'parallel.stages=Et|t|t|tmL'"),
    # context
    ("sft", f"{N}=4 parallel.context=3 data.sequence_length=768", f"parallel: tensor x pipeline x context divides {N} 4; got 1 x 1 x 3 = 3; use parallel.context=1, 2 or 4, or {N}=3 or 6"),
    ("sft", f"{N}=2 parallel.context=2 data.sequence_length=510", "data.sequence_length: a multiple of 4, which tensor and context parallel cut it into; got 510; use data.sequence_length=508 or 512"),
    ("sft", f"{N}=4 parallel.context=2 parallel.tensor=2 data.sequence_length=516", "data.sequence_length: a multiple of 8, which tensor and context parallel cut it into; got 516; use data.sequence_length=512 or 520"),
    ("sft", "parallel.context_exchange=gossip", "parallel.context_exchange: one of allgather, ring; got gossip; use parallel.context_exchange=allgather"),
    # recompute
    ("rl", "parallel.recompute=[norms,attention]", "parallel.recompute: in [norms,mla_up,swiglu], each once; got ['norms', 'attention']; use a value in [norms,mla_up,swiglu], each once"),
    ("pretrain", "parallel.recompute=[norms,norms]", "parallel.recompute: in [norms,mla_up,swiglu], each once; got ['norms', 'norms']; use a value in [norms,mla_up,swiglu], each once"),
    # expert, expert_tensor
    ("pretrain", f"{N}=2 parallel.expert=4", f"parallel: expert x expert_tensor x pipeline divides {N} 2; got 4 x 1 x 1 = 4; use parallel.expert=1 or 2, or {N}=4"),
    ("sft", f"{N}=8 parallel.expert=4 parallel.pipeline=4 trainer.global_batch_size=64", f"parallel: expert x expert_tensor x pipeline divides {N} 8; got 4 x 1 x 4 = 16; use parallel.expert=1 or 2, or parallel.pipeline=1 or 2, or {N}=16"),
    ("pretrain", f"{N}=3 parallel.expert=3 trainer.global_batch_size=24", "parallel.expert: divides model.num_experts 8; got 3; use parallel.expert=1"),
    ("pretrain", f"{N}=2 parallel.expert=2 parallel.expert_tensor=2", f"parallel: expert x expert_tensor x pipeline divides {N} 2; got 2 x 2 x 1 = 4; use parallel.expert=1, or parallel.expert_tensor=1, or {N}=4"),
    ("pretrain", f"{N}=4 parallel.expert_tensor=4 model.moe_ffn_size=66", "parallel.expert_tensor: divides model.moe_ffn_size 66; got 4; use parallel.expert_tensor=1 or 2"),
    ("pretrain", f"{N}=4 parallel.expert=2 parallel.expert_tensor=2 model.moe_ffn_size=65", "parallel.expert_tensor: divides model.moe_ffn_size 65; got 2; use parallel.expert_tensor=1"),
    ("sft", f"{N}=6 parallel.tensor=2 parallel.expert=4 trainer.global_batch_size=96", f"parallel: expert x expert_tensor x pipeline divides {N} 6; got 4 x 1 x 1 = 4; use parallel.expert=2, 3 or 6, or {N}=4 or 8"),
    # data
    ("sft", f"{N}=3", "trainer.global_batch_size: a multiple of trainer.micro_batch_size 8 x 3 data ranks; got 32; use trainer.global_batch_size=24 or 48"),
    ("sft", f"{N}=2 trainer.micro_batch_size=32", "trainer.global_batch_size: a multiple of trainer.micro_batch_size 32 x 2 data ranks; got 32; use trainer.global_batch_size=64, or trainer.micro_batch_size=4, 8 or 16"),
    # dispatcher, balance
    ("sft", f"{N}=2 parallel.expert=2 dispatcher=local", "parallel.expert: 1 with dispatcher=local, whose tokens stay on their rank; got 2; use parallel.expert=1, or dispatcher=alltoall"),
    ("sft", f"{N}=2 parallel.expert_tensor=2 dispatcher=local", "parallel.expert_tensor: 1 with dispatcher=local, for which an expert is whole on its rank; got 2; use parallel.expert_tensor=1, or dispatcher=alltoall"),
    ("sft", f"{N}=2 parallel.expert=2 dispatcher=deepep", "dispatcher: deepep needs GPUs, device=cuda; got deepep with device=cpu; use dispatcher=alltoall"),
    ("sft", f"{N}=2 parallel.expert=2 dispatcher=deepep device.kind=cuda", "dispatcher: deepep moves bf16, precision=bf16; got deepep with precision=fp32; use precision.dtype=bf16, or dispatcher=alltoall"),
    ("sft", f"{N}=2 dispatcher=deepep device.kind=cuda precision.dtype=bf16", "parallel.expert: above 1 with dispatcher=deepep, which moves tokens between GPUs; got 1; use parallel.expert=2, or dispatcher=alltoall"),
    ("sft", f"{N}=4 parallel.expert=2 parallel.expert_tensor=2 dispatcher=deepep device.kind=cuda precision.dtype=bf16", "parallel.expert_tensor: 1 with dispatcher=deepep, for which an expert is whole on its rank; got 2; use parallel.expert_tensor=1, or dispatcher=alltoall"),
    ("sft", f"{N}=8 balance=eplb trainer.save_every=5 trainer.global_batch_size=64", "parallel.expert: above 1 with balance=eplb, which moves experts between ranks; got 1; use parallel.expert=2, 4 or 8, or balance=none"),
    ("sft", f"{N}=2 parallel.expert=2 balance=eplb trainer.save_every=0 trainer.steps=40", "trainer.save_every: above 0 with balance=eplb, which moves experts at checkpoints; got 0; use trainer.save_every=4, or balance=none"),
    ("pretrain", f"{N}=2 parallel.expert=2 balance=eplb trainer.save_every=5 model.use_expert_bias=false", "model.use_expert_bias: true with balance=eplb, whose load is what the bias counts; got false; use model.use_expert_bias=true, or balance=none"),
    ("sft", "balance=eplb trainer.save_every=5", "parallel.expert: above 1 with balance=eplb, which moves experts between ranks; got 1; use balance=none"),
    # whole models
    ("eval", f"{N}=2 parallel.tensor=2", "parallel.tensor: 1, every rank of this command holds whole weights; got 2; use parallel.tensor=1"),
    ("eval", f"{N}=2 parallel.pipeline=2", "parallel.pipeline: 1, every rank of this command holds whole weights; got 2; use parallel.pipeline=1"),
    ("eval", f"{N}=2 parallel.expert=2", "parallel.expert: 1, every rank of this command holds whole weights; got 2; use parallel.expert=1"),
    ("eval", f"{N}=2 parallel.expert_tensor=2", "parallel.expert_tensor: 1, every rank of this command holds whole weights; got 2; use parallel.expert_tensor=1"),
    ("eval", f"{N}=2 parallel.context=2", "parallel.context: 1, every rank of this command holds whole weights; got 2; use parallel.context=1"),
    ("export", f"{N}=2 parallel.context=2", "parallel.context: 1, every rank of this command holds whole weights; got 2; use parallel.context=1"),
    ("eval", "parallel.stages=EttL", "parallel.stages: null, every rank of this command holds all layers; got EttL; use parallel.stages=null"),
    *((command, f"parallel.{axis}=0", f"parallel.{axis}: at least 1; got 0; use parallel.{axis}=1")
      for command, axis in zip(["pretrain", "sft", "rl", "eval", "chat"], ["tensor", "pipeline", "context", "expert", "expert_tensor"], strict=True)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("r1mega.config.launch_rules.visible_gpus", lambda: None)  # of this machine


@pytest.mark.parametrize(("command", "overrides", "line"), WRONG, ids=[f"{row[0]} {row[1]}" for row in WRONG])
def test_a_wrong_number_is_answered_by_a_line_whose_ways_out_mend_it(command, overrides, line) -> None:
    found = violations(command, *overrides.split())
    assert [str(item) for item in found] == [line]
    for key, values in found[0].fixes:
        for value in values:
            assert violations(command, *overrides.split(), f"{key}={value}") == [], f"{key}={value}"


RIGHT = [
    ("pretrain", f"{N}=3 parallel.pipeline=3 trainer.global_batch_size=24"),  # four layers in three stages
    ("pretrain", f"{N}=4 parallel.pipeline=4 pipeline=zb1p"),
    ("pretrain", f"{N}=2 parallel.pipeline=2 pipeline=interleaved"),
    ("pretrain", f"{N}=2 parallel.pipeline=2 pipeline=dualpipev parallel.stages=Et|t|t|tmL"),
    ("sft", f"{N}=4 parallel.pipeline=4 pipeline=dualpipev trainer.micro_batch_size=4"),
    (
        "sft",
        f"{N}=8 parallel.tensor=2 parallel.pipeline=2 parallel.expert=2 dispatcher=allgather balance=eplb trainer.save_every=5",
    ),
    ("pretrain", f"{N}=4 parallel.expert=2 parallel.expert_tensor=2"),
    ("pretrain", f"{N}=2 parallel.context=2 parallel.expert=2 parallel.context_exchange=ring"),
    ("pretrain", "pipeline=none dispatcher=local"),
    ("rl", f"{N}=2 parallel.context=2"),
    ("rl", f"{N}=4 parallel.tensor=2 parallel.expert=2"),
    ("rl", f"{N}=2 parallel.pipeline=2"),
    ("sft", f"{N}=2 parallel.expert=2 dispatcher=deepep device.kind=cuda precision.dtype=bf16"),
]


@pytest.mark.parametrize(("command", "overrides"), RIGHT, ids=[f"{row[0]} {row[1]}" for row in RIGHT])
def test_right_numbers_pass(command, overrides) -> None:
    assert violations(command, *overrides.split()) == []


def test_the_rules_know_what_the_schedules_refuse() -> None:
    compared = 0
    for name, cls in registry.choices("pipeline").items():
        if not cls.__module__.startswith("r1mega."):
            continue
        for num_ranks in (1,) if name == "none" else (1, 2, 3, 4):
            schedule = cls().build(num_ranks)
            for num_microbatches in range(1, 13):
                overrides = (
                    f"{N}={num_ranks}", f"parallel.pipeline={num_ranks}", f"pipeline={name}",
                    "trainer.micro_batch_size=1", f"trainer.global_batch_size={num_microbatches}",
                )  # fmt: skip
                try:
                    schedule.actions(num_microbatches)
                    served = True
                except UserError:
                    served = False
                assert (violations("sft", *overrides) == []) is served, overrides
                compared += not served
    assert compared > 20


def test_what_a_growing_batch_is_a_multiple_of() -> None:
    config = composition("sft", [*BASE["sft"], f"{N}=4", "parallel.pipeline=4"]).config
    for name, step, chunks in (("1f1b", 1, 1), ("zb1p", 1, 1), ("interleaved", 4, 2), ("dualpipev", 1, 2)):
        config.pipeline = registry.lookup("pipeline", name)()
        assert (parallel_rules.microbatch_step(config), parallel_rules.stages_per_rank(config)) == (step, chunks)
        assert parallel_rules.num_stages(config) == 4 * chunks


@dataclasses.dataclass(frozen=True)
class Fussy:
    """A schedule from outside the package: two ranks at most, an even number of microbatches."""

    grumpy: bool = knob(False, "refuses with no grammar", "bool")

    def build(self, num_ranks: int):
        if num_ranks > 2:
            raise UserError(f"pipeline: at most 2 ranks; got {num_ranks}; use parallel.pipeline=2")
        return self

    placement = ((0,), (1,))

    def actions(self, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
        if num_microbatches % 2:
            raise UserError("no" if self.grumpy else f"microbatches: even with Fussy; got {num_microbatches}; use another batch")
        return ((), ())


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"pipeline": 2}, []),
        ({"pipeline": 4}, ["pipeline: at most 2 ranks; got 4; use parallel.pipeline=2"]),
        ({"pipeline": 2, "batch": 12}, ["microbatches: even with Fussy; got 3; use another batch"]),
        ({"pipeline": 2, "batch": 12, "grumpy": True}, ["pipeline: no; got 3 microbatches; use another number, or pipeline=1f1b"]),
        ({"pipeline": 2, "start": 8}, ["microbatches: even with Fussy; got 3; use another batch"]),
        ({"pipeline": 2, "start": 16}, []),
    ],
)
def test_a_schedule_from_outside_is_asked_before_the_run(changes, lines) -> None:
    config = composition("sft", [*BASE["sft"], f"{N}=4", "trainer.micro_batch_size=2", "trainer.global_batch_size=16"]).config
    config.pipeline = Fussy(grumpy=changes.get("grumpy", False))
    config.parallel.pipeline = changes["pipeline"]
    config.trainer.global_batch_size = changes.get("batch", 16)
    config.optim.batch_ramp_start, config.optim.batch_ramp_steps = changes.get("start", 0), 4 * ("start" in changes)
    try:
        check(config)
        found = []
    except UserError as error:
        found = str(error).splitlines()
    assert found == lines


def test_hosts_count_and_started_ranks_count_instead(monkeypatch) -> None:
    three = ("launch.kind=torchrun", "launch.hosts=3", "launch.rendezvous=a:29500", f"{N}=2", "trainer.global_batch_size=48")
    assert violations("sft", *three, "parallel.pipeline=6") == []
    assert [str(item) for item in violations("sft", *three, "parallel.pipeline=4")] == [
        f"parallel: tensor x pipeline x context divides launch.hosts x {N} 6; got 1 x 4 x 1 = 4; "
        f"use parallel.pipeline=2, 3 or 6, or {N}=4"
    ]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert violations("pretrain", "parallel.tensor=2", "parallel.pipeline=2") == []
    assert [str(item) for item in violations("sft", "parallel.tensor=3", "parallel.pipeline=3", "data.sequence_length=513")] == [
        "parallel: tensor x pipeline x context divides WORLD_SIZE 4; got 3 x 3 x 1 = 9; start a multiple of 9 processes"
    ]


def test_a_checkpoints_model_is_cut_by_the_same_rules() -> None:
    config = composition("sft", [*BASE["sft"], f"{N}=8", "parallel.pipeline=8"]).config
    line = "parallel.pipeline: at most model.num_layers 4; got 8; use parallel.pipeline=1, 2 or 4, or model.num_layers=8"
    with pytest.raises(UserError) as caught:
        check_cut(config, MODEL)
    assert str(caught.value) == line
    config.parallel.pipeline = 4
    check_cut(config, MODEL)
    config.pipeline = registry.lookup("pipeline", "interleaved")()
    with pytest.raises(UserError, match=r"got 4 x 2 = 8; use parallel\.pipeline=1 or 2"):
        check_cut(config, MODEL)
    with pytest.raises(UserError, match=r"got 4 x 2 = 8"):
        check_model(MODEL, ParallelConfig(pipeline=4), num_stages=8)


def test_a_config_made_in_python_has_the_usual_choices(tmp_path) -> None:
    for command, cls in (("pretrain", PretrainConfig), ("sft", SftConfig)):
        made = cls(trainer=TrainerConfig(steps=5), **({"init": "a"} if cls is SftConfig else {}))
        composed = composition(command, BASE[command]).config
        for kind, name in USUAL.items():
            assert registry.name_of(kind, getattr(made, kind)) == name
            assert getattr(composed, kind) == getattr(made, kind)
        made.dispatcher = None
        assert [str(item) for item in field_violations(made)] == [
            "dispatcher: a choice is needed; got null; give one of allgather, alltoall, deepep, local"
        ]
    other = compose(
        "pretrain", [*PRETRAIN, "dispatcher=allgather", "pipeline=interleaved", "pipeline.chunks=4", "trainer.steps=3000"]
    )
    assert registry.name_of("dispatcher", other.dispatcher) == "allgather" and other.pipeline.chunks == 4
    save_config(other, tmp_path)
    assert load_config(tmp_path) == other


LAYOUTS = {path.stem: path for path in sorted((config_dir() / "parallel").glob("*.yaml"))}


def test_layouts_are_there() -> None:
    assert {"one", "tp2", "pp2", "cp2", "ep2", "ep2_etp2", "tp2_ep2", "pp2_ep2", "tp2_pp2", "cp2_ep2", "pp2_ep2_tp2"} <= set(
        LAYOUTS
    )
    all_kinds = ["norms", "mla_up", "swiglu"]
    assert yaml.safe_load(LAYOUTS["v3_pp16_ep64"].read_text()) == {"pipeline": 16, "expert": 64, "recompute": all_kinds}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_says_what_for_and_trains_the_model_it_names(name, monkeypatch) -> None:
    text = LAYOUTS[name].read_text()
    assert text.startswith("# ") and 20 < len(text.partition("\n")[0]) <= 132
    degrees = preset_of(name)
    model = "deepseek_v3" if name.startswith(("v3", "long")) else "small"
    sizes = {"v3_pp16_ep64": 2048, "v3_pp12_ep64": 768, "v3_pp8_ep32": 256}
    monkeypatch.setenv("WORLD_SIZE", str(sizes.get(name, 8)))
    batch = ["trainer.micro_batch_size=1", "trainer.global_batch_size=15360", "trainer.steps=3000"]
    cfg = compose("pretrain", ["data.train={t:1}", f"model={model}", f"parallel={name}", *batch])
    assert cfg.parallel == degrees
    assert compose("sft", ["init=a", "data.train={s:1}", f"parallel={name}", *batch]).parallel == degrees


def preset_of(name: str) -> ParallelConfig:
    return ParallelConfig(**yaml.safe_load(LAYOUTS[name].read_text()))


def test_a_layout_is_a_group_of_every_command_that_computes_with_ranks() -> None:
    for command in ("pretrain", "sft", "rl", "eval"):
        made = composition(command, [*BASE[command], "parallel=tp2", "parallel.context=4"])
        assert made.config.parallel == ParallelConfig(tensor=2, context=4) and made.choices["parallel"] == "tp2"
    with pytest.raises(UserError) as caught:
        compose("pretrain", [*PRETRAIN, "parallel=pp3"])
    assert str(caught.value).startswith("parallel: no such choice; got 'pp3'; did you mean pp")
    assert preset("model", "tiny").num_layers >= 4, "pp4 needs a layer a stage"


def test_every_axis_has_a_wrong_number() -> None:
    for field in dataclasses.fields(ParallelConfig):
        if field.type == "bool":  # the schema's own words
            continue
        assert any(f"parallel.{field.name}=" in row[1] for row in WRONG), field.name
    assert "import torch" not in inspect.getsource(parallel_rules)


def test_huge_numbers_are_refused_at_once() -> None:
    started = time.monotonic()
    for overrides in (
        "parallel.pipeline=1000000000000",
        f"{N}=9000000000000000000 parallel.tensor=7",
        "parallel.context=9000000000000000000",
    ):
        assert str(violations("pretrain", *overrides.split())[0]).startswith("parallel: tensor x pipeline x context divides")
    found = violations("pretrain", "model.num_layers=1000000000000", "parallel.stages=Et")
    assert [str(item) for item in found] == [
        "parallel.stages: L once, at the end of the last stage; got Et; use parallel.stages=null"
    ]
    assert time.monotonic() - started < 30
