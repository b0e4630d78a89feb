"""``rl=``: the published numbers, what the user says over them, and that help and completion know what a preset brings along."""

from __future__ import annotations

import pytest

from r1mega import registry
from r1mega.config.completion import candidates
from r1mega.config.compose import compose, composition, load_config, save_config
from r1mega.config.errors import UserError
from r1mega.config.groups import config_dir
from r1mega.config.help import command_help
from r1mega.config.rl import RolloutConfig
from r1mega.config.rules import check

RL = ["init=x", "data.problems=y"]
R1 = {
    "advantage": "grpo",
    "policy_loss": "grpo",
    "policy_loss.clip_low": 10,
    "policy_loss.clip_high": 10,
    "policy_loss.kl_coef": 0.001,
    "policy_loss.kl_kind": "k3",
    "policy_loss.aggregation": "sequence",
    "optim.lr": 3e-6,
    "optim.decay": "constant",
    "rl.prompts_per_rollout": 512,
    "rl.group_size": 16,
    "rl.updates_per_rollout": 16,
    "rl.sampling.max_new_tokens": 32768,
    "rl.sampling.temperature": 1.0,
    "rl.ref_refresh_updates": 400,
    "rl.overlong.cache_tokens": 0,
    "rl.dynamic_sampling.by": "",
}
PUBLISHED = {
    "r1_zero": R1 | {"rl.rollouts": 650, "reward.weights": {"accuracy": 1.0, "format": 1.0}},
    "r1_stage1": R1 | {"reward.weights": {"accuracy": 1.0, "format": 1.0, "language": 1.0}},
    "r1_stage2": R1
    | {"rl.rollouts": 106, "rl.sampling.temperature": 0.7, "reward.weights": {"accuracy": 1.0, "format": 1.0, "language": 1.0}},
    "dapo": {
        "advantage": "grpo",
        "policy_loss": "dapo",
        "policy_loss.clip_low": 0.2,
        "policy_loss.clip_high": 0.28,
        "policy_loss.kl_coef": 0,
        "policy_loss.aggregation": "token",
        "policy_loss.dual_clip": 0,
        "optim.lr": 1e-6,
        "optim.warmup_steps": 20 * 16,
        "optim.decay": "constant",
        "reward.weights": {"accuracy": 2.0, "format": 0.0},
        "rl.prompts_per_rollout": 512,
        "rl.group_size": 16,
        "rl.updates_per_rollout": 16,
        "rl.sampling.max_new_tokens": 20480,
        "rl.overlong.cache_tokens": 4096,
        "rl.overlong.penalty": 1.0,
        "rl.overlong.mask_truncated": False,
        "rl.dynamic_sampling.by": "accuracy",
    },
    "gspo": {
        "advantage": "grpo",
        "policy_loss": "gspo",
        "policy_loss.clip_low": 3e-4,
        "policy_loss.clip_high": 4e-4,
        "policy_loss.kl_coef": 0,
        "policy_loss.aggregation": "sequence",
        "rl.updates_per_rollout": 4,
    },
}


def value(config, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return registry.name_of(path, config) if path in registry.KINDS else config


def test_every_preset_has_its_numbers_here() -> None:
    assert {path.stem for path in (config_dir() / "rl").glob("*.yaml")} == {*PUBLISHED, "default"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name, tmp_path) -> None:
    rollouts = [] if "rl.rollouts" in PUBLISHED[name] else ["rl.rollouts=100"]
    made = composition("rl", [*RL, f"rl={name}", *rollouts])
    check(made.config)
    assert {path: value(made.config, path) for path in PUBLISHED[name]} == PUBLISHED[name]
    save_config(made.config, tmp_path, overrides=made.overrides, choices=made.choices)
    assert load_config(tmp_path) == made.config and made.choices["policy_loss"] == PUBLISHED[name]["policy_loss"]


def test_the_default_changes_nothing() -> None:
    made = compose("rl", [*RL, "rl.rollouts=5"])
    assert made.rl == RolloutConfig(rollouts=5) and made == compose("rl", [*RL, "rl=default", "rl.rollouts=5"])


def test_what_the_user_says_wins() -> None:
    said = ["policy_loss=cispo", "reward=r1", "optim.lr=2e-6", "rl.group_size=8", "rl.rollouts=200", "advantage=reinforce++"]
    for line in (["rl=dapo", *said], [*said, "rl=dapo"]):
        made = compose("rl", [*RL, *line])
        assert registry.name_of("policy_loss", made.policy_loss) == "cispo" and made.policy_loss.clip_high == 4.0
        assert registry.name_of("advantage", made.advantage) == "reinforce++"
        assert made.reward.weights == {"accuracy": 1.0, "format": 1.0} and made.optim.lr == 2e-6 and made.rl.group_size == 8
        assert made.rl.overlong.cache_tokens == 4096
    made = compose("rl", [*RL, "rl=gspo", "rl.rollouts=9", "policy_loss.clip_low=1e-3", "policy_loss.correction=truncate"])
    assert made.policy_loss.clip_low == 1e-3 and registry.name_of("policy_loss", made.policy_loss) == "gspo"


def test_a_preset_of_the_users_brings_a_choice_of_the_users(tmp_path) -> None:
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /advantage: rloo\nrl:\n  group_size: 4\npolicy_loss:\n  kl_coef: 0.5\n"
    )
    made = compose("rl", [*RL, f"hydra.searchpath=[{tmp_path}]", "rl=mine", "rl.rollouts=3"])
    assert (value(made, "advantage"), made.rl.group_size, made.policy_loss.kl_coef) == ("rloo", 4, 0.5)
    (tmp_path / "rl" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /advantage: rlo\n")
    with pytest.raises(UserError, match="advantage: no such choice; got 'rlo'; did you mean rloo"):
        compose("rl", [*RL, f"hydra.searchpath=[{tmp_path}]", "rl=mine", "rl.rollouts=3"])
    (tmp_path / "rl" / "mine.yaml").write_text("# @package _global_\ndefaults: [\n")
    with pytest.raises(UserError, match="YAML"):
        compose("rl", [*RL, f"hydra.searchpath=[{tmp_path}]", "rl=mine", "rl.rollouts=3"])


def test_help_and_completion_follow_a_preset() -> None:
    text = command_help("rl", "reinforce", config_dir(), ["rl=dapo"])
    assert "policy_loss=cispo | dapo | grpo | gspo (now dapo)" in text and "reward=dapo | r1 | r1_language (now dapo)" in text
    assert "rl=dapo | default | gspo | r1_stage1 | r1_stage2 | r1_zero (now dapo)" in text
    assert "rl.sampling.max_new_tokens=20480 " in text and "policy_loss.clip_high=0.28 " in text and "override" not in text
    assert "policy_loss.clip_high=10.0 " in command_help("rl", "reinforce", config_dir(), ["policy_loss=grpo", "rl=dapo"])
    assert [word for word, _ in candidates(["rl"], "rl=d")] == ["rl=dapo", "rl=default"]
    docs = dict(candidates(["rl", "rl=gspo"], "policy_loss.clip_high"))
    assert docs["policy_loss.clip_high="].endswith("default 0.0004")
    assert dict(candidates(["rl", "rl=dapo"], "optim.lr"))["optim.lr="].endswith("default 1e-06")


@pytest.mark.parametrize("said, names", [
    (["rl.overlong.cache_tokens=300"], "rl.overlong.cache_tokens: at most rl.sampling.max_new_tokens 256; got 300; use .*=51"),
    (["rl.dynamic_sampling.by=accurcy"], "rl.dynamic_sampling.by: a reward of the run.*got 'accurcy'; did you mean accuracy"),
    (["rl.valid.every=5"], "rl.valid.every: 0 without held-out problems; got 5; .*or give rl.valid.problems=FILE"),
    (["rl.valid.every=5", "rl.valid.problems=x", "rl.valid.verifier=acuracy"], "rl.valid.verifier: a reward of .*mean accuracy.*use one of accuracy, format"),
    (["rl.valid.problems=x"], "rl.valid.every: above 0 with held-out problems; got 0; .*rl.valid.every=10"),
    (["rl.valid.every=5", "rl.valid.problems=x", "reward.by_source={gsm8k: 1}"], "reward.by_source"),
    (["policy_loss.correction=mask", "policy_loss.correction_low=3"], "policy_loss.correction_low: .*policy_loss.correction_high 2.0"),
    (["policy_loss.dual_clip=0.5"], "policy_loss.dual_clip: 0 or above 1; got 0.5"),
    (["policy_loss.distill_coef=1"], "policy_loss.distill_coef: 0 without a teacher; got 1.0; .*or give teacher=CHECKPOINT"),
    (["teacher=x"], "teacher: null where policy_loss.distill_coef is 0; got x"),
    (["policy_loss.kl_kind=k4"], "policy_loss.kl_kind: one of k1, k2, k3, unbiased; got k4"),
    (["rl=dap"], "rl: no such choice; got 'dap'; did you mean dapo"),
    (["rl=r1_stage1", "rl.rollouts=null"], "rl.rollouts"),
])  # fmt: skip
def test_wrong_values_name_their_way_out(said, names) -> None:
    with pytest.raises(UserError, match=names):
        compose("rl", [*RL, "rl.rollouts=5", *said])


def test_an_fp32_head_is_rls() -> None:
    assert compose("rl", [*RL, "rl.rollouts=5", "precision=bf16", "precision.fp32_head=true"]).precision.fp32_head
    with pytest.raises(UserError, match="precision.fp32_head: false but for rl"):
        compose("eval", ["checkpoint=x", "data.problems=y", "precision.fp32_head=true"])
