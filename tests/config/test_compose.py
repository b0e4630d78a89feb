"""Composition, its errors, saved configs, presets. No torch."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from r1mega import registry
from r1mega.config.compose import compose, composition, config_dir, load_config, model_from_dict, preset, save_config
from r1mega.config.data import ProblemSourceConfig
from r1mega.config.errors import UserError
from r1mega.config.knob import at_least, knob
from r1mega.config.model import ModelConfig
from r1mega.config.rules import check
from r1mega.config.schema import SCHEMAS, keys

PRETRAIN = ("data.train={runs/data/text:1}", "trainer.steps=3000", "data.sequence_length=512")
RL = ("init=a", "rl.rollouts=3", "data.problems=p.jsonl")
EVERY = {
    "prepare": ("problems.sums.dataset=chain_sum", "problems.sums.options.max_terms=3", "text=[stdlib]"),
    "pretrain": PRETRAIN,
    "sft": ("init=a", "trainer.steps=5", "data.train={s:1}", "model.mtp_loss_coef=0.1"),
    "rl": RL,
    "eval": ("checkpoint=a", "data.problems=p.jsonl", "keep=kept.jsonl"),
    "export": ("checkpoint=a",),
    "report": ("run=runs/quickstart",),
    "why": ("run=runs/a", "step=3", "sample=1.0.2"),
    "timeline": ("pipeline=interleaved", "pipeline.chunks=3"),
    "bench": ("bench=step", "model.num_experts=64", "precision=bf16", "baseline=b.json"),
    "chat": ("checkpoint=a", "prompt='what is 1 + 1, then?'"),
}


@dataclasses.dataclass(frozen=True)
class Mine:
    """A choice of this test."""

    scale: float = knob(1.0, "a factor", "1", **at_least(0))


@pytest.fixture
def mine(monkeypatch):
    """``advantage=from_a_test``, for one test."""
    monkeypatch.setattr(registry, "_choices", {kind: dict(held) for kind, held in registry._choices.items()})
    registry.register("advantage", "from_a_test")(Mine)


def error_of(command: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose(command, overrides)
    return str(caught.value)


@pytest.mark.parametrize("command", EVERY)
def test_every_command_composes_and_round_trips(command, tmp_path) -> None:
    made = composition(command, EVERY[command])
    assert type(made.config) is SCHEMAS[command]
    check(made.config)
    path = save_config(made.config, tmp_path / "run", overrides=made.overrides, choices=made.choices)
    assert load_config(tmp_path / "run") == made.config
    body = yaml.safe_load(path.read_text())
    assert body["command"] == command and body["overrides"] == list(EVERY[command])
    assert body["choices"].keys() >= made.choices.keys()
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_groups_defaults_and_interpolations() -> None:
    cfg = compose("rl", [*RL, "name=first", "precision=bf16"])
    assert cfg.out == "runs/first" and cfg.precision.dtype == "bf16" and cfg.optim.lr == 3e-6
    assert cfg.reward.weights == {"accuracy": 1.0, "format": 1.0}
    for kind, name in (("advantage", "grpo"), ("policy_loss", "grpo"), ("engine", "local")):
        assert registry.name_of(kind, getattr(cfg, kind)) == name
    assert compose("eval", EVERY["eval"]).sampling.temperature == 0.6
    assert compose("export", ["checkpoint=a", "out=x"]).target == "x/hf"
    assert compose("report", ["run=runs/a"]).target == "runs/a/report.html"


def test_open_mappings_grow_shrink_and_keep_their_types() -> None:
    cfg = compose("rl", [*RL, "reward.weights.accuracy=2", "~reward.weights.format", "model.mtp_loss_coef=0"])
    assert cfg.reward.weights == {"accuracy": 2.0} and cfg.model == {
        "expert_bias_update_rate": 0.0,
        "seq_aux_loss_coef": 0.0,
        "mtp_loss_coef": 0,
    }
    cfg = compose("prepare", ["problems.sums.num_train=7", "problems={more:{kind:jsonl,path:x.jsonl}}"])
    assert cfg.problems["sums"] == ProblemSourceConfig(num_train=7)
    assert cfg.problems["more"].path == "x.jsonl" and list(cfg.problems) == ["sums", "more"]
    cfg = compose("pretrain", [*PRETRAIN, "data.train={runs/b.x-1/text:0.5}"])
    assert cfg.data.train == {"runs/data/text": 1.0, "runs/b.x-1/text": 0.5}


def test_hydra_writes_nothing_and_leaves_the_global_state_alone(tmp_path, monkeypatch) -> None:
    import logging

    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    compose("rl", RL)
    assert os.listdir(tmp_path) == [] and not GlobalHydra.instance().is_initialized()
    assert logging.getLogger().handlers == handlers


def test_a_registered_choice_is_an_option_with_typed_knobs(mine, tmp_path) -> None:
    cfg = compose("rl", [*RL, "advantage=from_a_test", "advantage.scale=3"])
    assert cfg.advantage == Mine(scale=3.0)
    save_config(cfg, tmp_path)
    assert load_config(tmp_path) == cfg
    assert error_of("rl", *RL, "advantage=from_a_test", "advantage.scale=-1").startswith("advantage.scale: at least 0; got -1.0")
    assert "did you mean advantage.scale?" in error_of("rl", *RL, "advantage=from_a_test", "advantage.scal=1")


def test_a_dotted_choice_is_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "their_rewards.py").write_text(
        "from dataclasses import dataclass\n"
        "from r1mega.config.knob import knob\n"
        "@dataclass(frozen=True)\n"
        "class Centred:\n"
        "    by: float = knob(0.5, 'what is taken away', '1')\n"
        "plain = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = compose("rl", [*RL, "advantage=their_rewards.Centred", "advantage.by=0.25"])
    assert type(cfg.advantage).__name__ == "Centred" and cfg.advantage.by == 0.25
    save_config(cfg, tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["choices"]["advantage"] == "their_rewards.Centred"
    assert load_config(tmp_path / "run") == cfg
    assert "a choice is a frozen dataclass; got their_rewards.plain" in error_of("rl", *RL, "advantage=their_rewards.plain")
    assert "no_such_module" in error_of("rl", *RL, "advantage=no_such_module.Mine")


BAD = [
    ("pretrian", (), "command: no such command; got 'pretrian'; did you mean pretrain?"),
    ("pretrain", ("optim.lrr=1",), "optim.lrr: no such key of pretrain; got 'optim.lrr=1'; did you mean optim.lr?"),
    ("pretrain", ("lr=1",), "lr: no such key of pretrain; got 'lr=1'; did you mean optim.lr?"),
    ("pretrain", ("trainer.stepz=1",), "did you mean trainer.steps?"),
    ("pretrain", ("model.num_head=1",), "did you mean model.num_heads?"),
    ("pretrain", ("+zz=1",), "zz: no such key of pretrain"),
    ("pretrain", ("model=tinny",), "model: no such choice; got 'tinny'; did you mean tiny?"),
    ("pretrain", ("model=null",), "model: a choice is a name"),
    ("pretrain", ("trainer.steps=abc",), "trainer.steps: a whole number (steps); got 'abc'; write trainer.steps=10"),
    ("pretrain", ("trainer.steps=2.5",), "trainer.steps: a whole number (steps); got '2.5'"),
    ("pretrain", ("optim.lr=fast",), "optim.lr: a number; got 'fast'; for example optim.lr=0.00022"),
    ("pretrain", ("debug=perhaps",), "debug: true or false; got 'perhaps'; write debug=true or debug=false"),
    ("pretrain", ("seed=null",), "seed: a whole number; got 'null'"),
    ("pretrain", ("trainer=3",), "trainer: a section; got '3'; give its keys, trainer.KEY=value"),
    ("pretrain", ("data.train=x",), "data.train: a mapping; got 'x'; write data.train={name:value}"),
    ("prepare", ("text=x",), "text: a list; got 'x'; write text=[a,b]"),
    ("pretrain", ("steps",), "arguments: group=choice or key=value, nothing positional; got 'steps'; write key=steps"),
    ("pretrain", ("--multirun",), "arguments: group=choice or key=value; got '--multirun'"),
    ("pretrain", ("name='a b",), "name: a value in Hydra's grammar"),
    ("pretrain", ("seed=1,2",), "seed: one value; got '1,2'; for a list write seed=[a,b]"),
    ("pretrain", ("hydra.run.dir=x",), "hydra.run.dir: a key of the command"),
    ("pretrain", ("~optim.lr",), "optim.lr: a fixed key"),
    ("pretrain", ("out=runs/${nam}",), "out: an interpolation names a key; got Interpolation key 'nam' not found"),
    ("sft", ("model=tiny",), "model: a mapping; got 'tiny'"),
    ("rl", ("engine=locla",), "engine: no such choice; got 'locla'; did you mean local?"),
    ("rl", ("advantage.scale_by_sdt=false",), "did you mean advantage.scale_by_std?"),
    ("rl", ("reward.weights.accuracy=x",), "reward.weights.accuracy: a number; got 'x'"),
    ("recipe", (), "recipe: a choice is needed; got none; give recipe=NAME"),
    ("prepare", ("problems.sums.num_trian=1",), "did you mean problems.sums.num_train?"),
    ("prepare", ("problems={sums:{num_trian:1}}",), "problems.sums.num_trian: no such key of prepare"),
    ("prepare", ("problems.sums.num_train=x",), "problems.sums.num_train: a whole number (problems); got 'x'"),
]


@pytest.mark.parametrize(("command", "overrides", "expected"), BAD, ids=[f"{row[0]}-{'-'.join(row[1])}" for row in BAD])
def test_bad_input_is_one_line_of_the_grammar(command, overrides, expected) -> None:
    text = error_of(command, *(PRETRAIN if command == "pretrain" else RL if command == "rl" else ()), *overrides)
    assert expected in text
    assert "\n" not in text and text.count("; ") >= 2


def test_all_bad_arguments_are_named_together() -> None:
    lines = error_of("pretrain", *PRETRAIN, "optim.lrr=1", "trainer.stepz=2").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["optim.lrr", "trainer.stepz"]


def test_missing_values_are_named_with_their_meaning() -> None:
    lines = error_of("rl").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["data.problems", "init", "rl.rollouts"]
    assert lines[2] == "rl.rollouts: a value is needed (rollouts of the run, unit rollouts); got none; give rl.rollouts=VALUE"


def test_a_recipe_from_a_folder_of_ones_own_names_the_run(tmp_path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "two_steps.yaml").write_text(
        "description: two stages\n"
        "stages:\n"
        "  data: {command: prepare, overrides: ['text=[stdlib]']}\n"
        "  base: {command: pretrain, needs: [data], overrides: ['data.train={{data}/text:1}']}\n"
    )
    search = f"hydra.searchpath=['file://{tmp_path}']"
    cfg = compose("recipe", [search, "recipe=two_steps"])
    assert (cfg.name, cfg.out) == ("two_steps", "runs/two_steps")
    assert list(cfg.recipe["stages"]) == ["data", "base"] and cfg.recipe["stages"]["base"]["needs"] == ["data"]
    assert compose("recipe", [search, "recipe=two_steps", "name=other"]).out == "runs/other"
    assert compose("recipe", [search, "recipe=two_steps", "recipe.stages.base.needs=[]"]).recipe["stages"]["base"]["needs"] == []
    save_config(cfg, tmp_path / "run")
    assert load_config(tmp_path / "run") == cfg
    assert "did you mean two_steps?" in error_of("recipe", search, "recipe=two_step")
    (tmp_path / "recipe" / "broken.yaml").write_text("stages: [\n")
    assert "broken.yaml: YAML; got " in error_of("recipe", search, "recipe=broken")


@pytest.mark.parametrize("content", ["a: [", "3", "command: pretrain", "{command: pretrain, choices: {}, config: {nonsense: 1}}"])
def test_a_damaged_saved_config_is_refused(content, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml: .*; got .*; "):
        load_config(tmp_path)


def test_no_saved_config_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path)


def test_resolved_text_with_a_dollar_is_not_resolved_again(tmp_path) -> None:
    cfg = compose("chat", ["checkpoint=a", r"prompt='price \${x} {y}'"])
    assert cfg.prompt == "price ${x} {y}"
    save_config(cfg, tmp_path)
    assert load_config(tmp_path).prompt == "price ${x} {y}"


def test_model_from_dict() -> None:
    model = preset("model", "deepseek_v2_lite")
    assert model_from_dict(dataclasses.asdict(model)) == model
    for bad in ({"hidden": 3}, {"hidden_size": "wide"}, {"yarn": {"factr": 2.0}}):
        with pytest.raises(UserError, match="^model: keys and types of this version; got "):
            model_from_dict(bad)


def test_presets_hold_the_published_figures() -> None:
    v3, lite, moonlight, small = (preset("model", name) for name in ("deepseek_v3", "deepseek_v2_lite", "moonlight_16b", "small"))
    assert (v3.num_layers, v3.hidden_size, v3.num_heads, v3.num_experts, v3.top_k, v3.first_k_dense) == (61, 7168, 128, 256, 8, 3)
    assert (v3.q_lora_rank, v3.yarn.factor, v3.routed_scaling_factor, v3.num_mtp_layers) == (1536, 40.0, 2.5, 1)
    assert (lite.score_function, lite.norm_topk_prob, lite.ffn_size, lite.yarn.mscale) == ("softmax", False, 10944, 0.707)
    assert (moonlight.rope_theta, moonlight.rms_norm_eps, moonlight.routed_scaling_factor) == (50000.0, 1e-5, 2.446)
    assert parameters(v3) == 671_026_419_200 and parameters(moonlight) == 15_960_110_208
    assert round(parameters(lite) / 1e9, 4) == 15.7065
    assert 0.68e9 < parameters(small) < 0.74e9
    assert (
        preset("optim", "v3").lr == 2.2e-4
        and preset("optim", "r1_sft").min_lr == 5e-6
        and preset("optim", "r1_rl").decay == "constant"
    )
    with pytest.raises(UserError, match="did you mean deepseek_v3"):
        preset("model", "deepsek_v3")
    with pytest.raises(UserError, match="did you mean model"):
        preset("modle", "tiny")


def parameters(m: ModelConfig) -> int:
    """Weights without MTP and, where the gate has one, expert biases; counted by hand from the shapes."""
    head = m.qk_nope_head_dim + m.qk_rope_head_dim
    queries = (
        m.hidden_size * m.num_heads * head if m.q_lora_rank is None else m.q_lora_rank * (m.hidden_size + 1 + m.num_heads * head)
    )
    latents = m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
    values = m.kv_lora_rank * m.num_heads * (m.qk_nope_head_dim + m.v_head_dim) + m.num_heads * m.v_head_dim * m.hidden_size
    layer = queries + latents + values + 2 * m.hidden_size
    expert = 3 * m.hidden_size * m.moe_ffn_size
    moe = (m.num_experts + m.num_shared_experts) * expert + m.num_experts * m.hidden_size + m.num_experts * m.use_expert_bias
    dense = 3 * m.hidden_size * m.ffn_size
    layers = m.num_layers * layer + m.first_k_dense * dense + (m.num_layers - m.first_k_dense) * moe
    return layers + (1 if m.tie_embeddings else 2) * m.vocab_size * m.hidden_size + m.hidden_size


def test_every_yaml_file_composes() -> None:
    for path in sorted(config_dir().glob("*/*.yaml")):
        group, name = path.parent.name, path.stem
        if group == "recipe":
            assert composition("recipe", [f"recipe={name}"]).config.name == name
        elif group == "reward":
            compose("rl", [*RL, f"reward={name}"])
        elif group == "runtime":
            compose("rl", [*RL, f"runtime={name}"])
        elif group == "rl":
            compose("rl", [*RL, f"rl={name}", "rl.rollouts=500"])
        elif group == "parallel":  # their rules want ranks: tests/config/test_parallel_rules.py
            assert composition("pretrain", [*PRETRAIN, f"parallel={name}"]).choices["parallel"] == name
        else:
            wanted = ["model.moe_ffn_size=128"] if group == "precision" else []
            wanted += ["device=cuda"] if name == "fp8_te" else []
            compose("pretrain", [*PRETRAIN, f"{group}={name}", "trainer.steps=3000", *wanted])


def test_every_default_keeps_its_own_rule() -> None:
    for cls in SCHEMAS.values():
        for key in keys(cls):
            field = next((item for item in dataclasses.fields(key.cls or cls) if item.name == key.path), None)
            rule = field.metadata["rule"] if field else None
            assert rule is None or key.default in (None, "???") or rule(key.default), key.path


def test_config_dir_is_the_checkouts() -> None:
    assert config_dir() == Path(__file__).resolve().parents[2] / "configs"
