"""Rules: what is refused, in which words, and that every way out that a message names does mend what it complains of."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import yaml

from r1mega import registry
from r1mega.config.compose import compose, composition, preset
from r1mega.config.errors import UserError, Violation
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.config.model_rules import check_model, divisors, multiples, near
from r1mega.config.rules import cross_violations, field_violations

PRETRAIN = ("data.train={t:1}", "trainer.steps=100", "optim.warmup_steps=10", "data.sequence_length=512")
SFT = ("init=a", "data.train={s:1}", "trainer.steps=100", "data.sequence_length=512")
RL = ("init=a", "rl.rollouts=4", "data.problems=p.jsonl")
BASE = {
    "pretrain": PRETRAIN, "sft": SFT, "rl": RL, "eval": ("checkpoint=a", "data.problems=p"),
    "chat": ("checkpoint=a",), "export": ("checkpoint=a",), "prepare": ("problems.sums.num_train=5",),
}  # fmt: skip


MODEL = ModelConfig(
    vocab_size=512, max_position_embeddings=2048, hidden_size=128, num_layers=4, num_heads=4, ffn_size=320, moe_ffn_size=64,
    num_experts=8, top_k=4, num_groups=4, topk_groups=2, num_mtp_layers=1, yarn=YarnConfig(4.0, 512),
)  # fmt: skip
"""Two experts a group, two groups kept, so that every rule of the router is one step away. No preset: those may change."""


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@functools.cache
def base(command: str) -> object:
    config = composition(command, BASE[command]).config
    if command == "pretrain":
        config.model = MODEL
    return config


def violations(command: str, *overrides: str) -> list[Violation]:
    """Broken rules of the command's base config after ``key=value`` changes, made without Hydra: hundreds of them in seconds."""
    config = copy.deepcopy(base(command))
    for override in overrides:
        path, _, text = override.partition("=")
        *sections, last = path.split(".")
        holder = functools.reduce(
            lambda node, name: node[name] if isinstance(node, dict) else getattr(node, name), sections, config
        )
        value = float(text) if text in ("nan", "inf") else yaml.safe_load(text)
        if path in registry.KINDS:
            setattr(config, path, registry.lookup(path, text)())
        elif sections and sections[-1] in registry.KINDS:  # a choice is frozen
            setattr(config, sections[-1], dataclasses.replace(holder, **{last: value}))
        elif isinstance(holder, dict):
            holder[last] = value
        else:
            setattr(holder, last, value)
    return list(field_violations(config)) or list(cross_violations(config))


BAD = [
    # command, overrides, where, part of the message
    ("pretrain", "trainer.steps=0", "trainer.steps", "at least 1; got 0"),
    ("pretrain", "optim.lr=-1", "optim.lr", "above 0; got -1"),
    ("pretrain", "optim.lr=nan", "optim.lr", "a finite number; got nan"),
    ("pretrain", "optim.lr=inf", "optim.lr", "a finite number; got inf"),
    ("pretrain", "optim.decay=linear", "optim.decay", "one of constant, cosine; got linear; use optim.decay=cosine"),
    ("pretrain", "device.kind=tpu", "device.kind", "one of cpu, cuda; got tpu; use device.kind=cpu"),
    ("pretrain", "model.num_mtp_layers=2", "model.num_mtp_layers", "from 0 to 1; got 2"),
    ("pretrain", "model.q_lora_rank=0", "model.q_lora_rank", "at least 1; got 0"),
    ("pretrain", "model.yarn.factor=0.5", "model.yarn.factor", "at least 1.0; got 0.5"),
    ("export", "dtype=fp4", "dtype", "one of as_is, bf16, fp32, fp8; got fp4"),
    ("prepare", "problems.sums.kind=csv", "problems.sums.kind", "one of reasoning_gym, file, jsonl; got csv"),
    ("rl", "rl.group_size=1", "rl.group_size", "at least 2; got 1"),
    ("pretrain", "model.qk_rope_head_dim=15", "model.qk_rope_head_dim", "even, rotary positions turn pairs; got 15; use"),
    ("pretrain", "model.first_k_dense=5", "model.first_k_dense", "at most model.num_layers 4; got 5"),
    ("pretrain", "model.top_k=16", "model.top_k", "at most model.num_experts 8; got 16; use model.top_k=4"),
    ("pretrain", "model.num_groups=3", "model.num_groups", "divides model.num_experts 8; got 3; use model.num_groups=2 or 4"),
    ("pretrain", "model.topk_groups=5", "model.topk_groups", "at most model.num_groups 4; got 5; use model.topk_groups=2"),
    ("pretrain", "model.top_k=6", "model.top_k", "at most the 4 experts of the 2 groups kept; got 6; use model.top_k=4, or model.topk_groups=3"),
    ("pretrain", "model.top_k=3", "model.top_k", "a multiple of model.topk_groups 2; got 3; use model.top_k=4"),
    ("pretrain", "model.top_k=2", "model.top_k", "2 x model.topk_groups 2, since Megatron scores a group by its top_k / topk_groups best"),
    ("pretrain", "model.norm_topk_prob=false", "model.norm_topk_prob", "true, since Megatron normalises a sigmoid gate"),
    ("pretrain", "model.score_function=softmax model.top_k=2", "model.use_expert_bias", "false with the softmax gate; got true"),
    ("pretrain", "model.score_function=softmax model.use_expert_bias=false model.num_groups=1 model.topk_groups=1 model.top_k=1", "model.norm_topk_prob", "false with the softmax gate and model.top_k 1, whose only weight is no share; got true"),
    ("pretrain", "model.score_function=softmax model.use_expert_bias=false", "model.top_k", "1 x model.topk_groups 2"),
    ("pretrain", "model.max_position_embeddings=4096", "model.max_position_embeddings", "at most yarn.factor x yarn.original"),
    ("pretrain", "launch.processes=2 parallel.tensor=2 model.num_heads=3", "model.num_heads", "a multiple of parallel.tensor 2; got 3"),
    ("pretrain", "launch.processes=2 parallel.tensor=2 model.vocab_size=511", "model.vocab_size", "a multiple of parallel.tensor 2"),
    ("pretrain", "launch.processes=2 parallel.tensor=2 model.ffn_size=321", "model.ffn_size", "a multiple of parallel.tensor 2"),
    ("pretrain", "launch.processes=3 parallel.expert=3 trainer.global_batch_size=24", "parallel.expert", "divides model.num_experts 8; got 3"),
    ("pretrain", "parallel.tensor=2", "parallel", "tensor x pipeline x context divides launch.processes 1; got 2 x 1 x 1 = 2; use parallel.tensor=1"),
    ("sft", "launch.processes=4 parallel.pipeline=3", "parallel", "got 1 x 3 x 1 = 3; use parallel.pipeline=1, 2 or 4, or launch.processes=3 or 6"),
    ("pretrain", "data.sequence_length=4096", "data.sequence_length", "at most model.max_position_embeddings 2048; got 4096"),
    ("sft", "launch.processes=2 parallel.context=2 data.sequence_length=510", "data.sequence_length", "a multiple of 4, which"),
    ("pretrain", "trainer.micro_batch_size=5", "trainer.global_batch_size", "a multiple of trainer.micro_batch_size 5 x 1 data ranks; got 32; use"),
    ("sft", "launch.processes=3", "trainer.global_batch_size", "x 3 data ranks; got 32; use trainer.global_batch_size=24 or 48"),
    ("pretrain", "optim.batch_ramp_start=64 optim.batch_ramp_steps=9", "optim.batch_ramp_start", "at most trainer.global_batch_size 32"),
    ("pretrain", "optim.batch_ramp_start=12 optim.batch_ramp_steps=9", "optim.batch_ramp_start", "a multiple of trainer.micro_batch_size 8"),
    ("pretrain", "optim.batch_ramp_start=8", "optim.batch_ramp_start", "both 0 or both above 0; got 8 and 0"),
    ("pretrain", "optim.min_lr=1", "optim.min_lr", "at most optim.lr 0.00022; got 1"),
    ("pretrain", "optim.warmup_steps=101", "optim.warmup_steps", "at most the run's 100 steps (trainer.steps); got 101"),
    ("pretrain", "optim.constant_steps=95", "optim.constant_steps", "with warmup_steps 10 at most the run's 100 steps"),
    ("rl", "optim.warmup_steps=5", "optim.warmup_steps", "at most the run's 4 steps (rl.rollouts x rl.updates_per_rollout); got 5"),
    ("rl", "launch.processes=3", "rl.prompts_per_rollout", "a multiple of the 3 data ranks; got 32; use rl.prompts_per_rollout=30 or 33"),
    ("rl", "rl.updates_per_rollout=7", "rl.updates_per_rollout", "divides the 512 responses of a rollout"),
    ("rl", "rl.sampling.temperature=0", "rl.sampling.temperature", "above 0, the likeliest token has no probability to learn from"),
    ("eval", "launch.processes=2 parallel.tensor=2", "parallel.tensor", "1, every rank of this command holds whole weights; got 2; use"),
    ("export", "launch.processes=2 parallel.context=2", "parallel.context", "1, every rank of this command holds whole weights; got 2"),
    ("chat", "launch.processes=2", "launch.processes", "1, a conversation has one terminal; got 2; use launch.processes=1"),
    ("sft", "model.expert_bias_update_rate=-1", "model.expert_bias_update_rate", "a number, at least 0; got -1"),
    ("sft", "model.mtp_loss_coef=much", "model.mtp_loss_coef", "a number, at least 0; got 'much'; use model.mtp_loss_coef=0.3"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "overrides", "where", "message"), BAD, ids=[f"{row[0]} {row[1]}" for row in BAD])
def test_a_broken_rule_names_key_value_and_a_way_out_that_works(command, overrides, where, message) -> None:
    found = violations(command, *overrides.split())
    assert [item.where for item in found] == [where]
    text = str(found[0])
    assert message in text and "\n" not in text and text.count("; ") >= 2
    for key, values in found[0].fixes:
        for value in values:
            mended = violations(command, *overrides.split(), f"{key}={str(value).lower() if isinstance(value, bool) else value}")
            assert mended == [], f"{key}={value} does not mend {text}"


HINTED = [
    ("pretrain", "data.train={t: 0}", "data.train: a weight above 0 for t; got 0; give a positive weight"),
    ("rl", "reward.weights.acuracy=1", "reward.weights: a registered reward; got 'acuracy'; did you mean accuracy? use one of accuracy, code, format"),
    ("rl", "reward.weights={no_such.Reward: 1}", "reward.weights: a dotted reward is imported; got 'no_such.Reward'; No module named 'no_such'"),
    ("sft", "model.hidden_size=3", "model.hidden_size: a field that alters no weight, the checkpoint decides the others; got 3; use one of "),
]  # fmt: skip


@pytest.mark.parametrize(("command", "override", "message"), HINTED)
def test_a_broken_rule_without_a_nearest_value_gives_a_hint(command, override, message) -> None:
    assert [str(item) for item in violations(command, override)][0].startswith(message)


def test_no_data_and_no_reward_are_refused() -> None:
    config = composition("sft", ["init=a", "trainer.steps=5"]).config
    assert [item.where for item in cross_violations(config)] == ["data.train"]
    found = violations("rl", "reward.weights={}")
    assert [item.where for item in found] == ["reward.weights"]


def test_all_broken_rules_come_in_one_error_a_line_each() -> None:
    with pytest.raises(UserError) as caught:
        compose("pretrain", [*PRETRAIN, "model.top_k=9999", "trainer.micro_batch_size=5", "optim.min_lr=1"])
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "model.top_k",
        "trainer.global_batch_size",
        "optim.min_lr",
    ]


def test_started_ranks_count_instead_of_launch_processes(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert violations("pretrain", "parallel.tensor=2", "parallel.pipeline=2") == []
    assert "divides WORLD_SIZE 4" in str(violations("pretrain", "parallel.tensor=4", "parallel.pipeline=2")[0])


@pytest.mark.parametrize("name", ["tiny", "small", "deepseek_v3", "deepseek_v2_lite", "moonlight_16b"])
def test_presets_keep_the_rules(name) -> None:
    check_model(preset("model", name))


def test_a_model_without_experts_needs_no_routing_rules() -> None:
    check_model(ModelConfig(num_layers=2, first_k_dense=2, top_k=3, num_groups=5))
    with pytest.raises(UserError, match=r"model\.num_groups"):
        check_model(ModelConfig(num_layers=2, first_k_dense=2, top_k=3, num_groups=5, num_mtp_layers=1))


def test_arithmetic_of_ways_out() -> None:
    assert divisors(12) == (1, 2, 3, 4, 6, 12)
    assert near(divisors(64), 6) == (2, 4, 8) and near((1,), 9) == (1,)
    assert multiples(8, 20) == (16, 24) and multiples(8, 3) == (8,)
