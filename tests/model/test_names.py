"""The table of names: regions that tile the real model's tensors, the full models' counts, and both directions to the bit."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.model.names import DERIVED, EMBEDDING, HEAD, SCALE, Part, from_hf, native_shapes, parts, to_hf
from r1mega.train.policy import Policy
from tests.model.test_build import meta_model, preset
from tests.train.cases import one_rank

BASE = ModelConfig(
    vocab_size=96,
    max_position_embeddings=256,
    hidden_size=48,
    num_layers=3,
    num_heads=3,
    q_lora_rank=None,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    first_k_dense=1,
    ffn_size=72,
    moe_ffn_size=24,
    num_experts=8,
    num_shared_experts=1,
    top_k=4,
    num_groups=4,
    topk_groups=2,
    init_std=0.1,
)
CASES = {
    "plain": {},
    "query_latent_and_mtp": {"q_lora_rank": 20, "num_mtp_layers": 1},
    "yarn": {"yarn": YarnConfig(factor=4.0, original_max_position_embeddings=64), "num_mtp_layers": 1},
    "yarn_mscale": {
        "yarn": YarnConfig(factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.5),
        "q_lora_rank": 30,
    },
    "one_group_eps": {"num_groups": 1, "topk_groups": 1, "top_k": 3, "rms_norm_eps": 1e-5, "routed_scaling_factor": 1.0},
    "all_moe_two_shared": {"first_k_dense": 0, "num_shared_experts": 2, "v_head_dim": 16},
    "two_dense_eight_groups": {
        "first_k_dense": 2,
        "num_experts": 16,
        "num_groups": 8,
        "topk_groups": 3,
        "top_k": 6,
        "num_mtp_layers": 1,
    },
    "tied_two_groups": {"tie_embeddings": True, "num_groups": 2, "topk_groups": 1, "top_k": 2, "rope_theta": 50000.0},
    "no_bias_one_group": {"use_expert_bias": False, "num_groups": 1, "topk_groups": 1, "top_k": 3},
    "top_one": {"top_k": 1, "num_groups": 1, "topk_groups": 1},
}
SHAPES = CASES | {
    "softmax": {"score_function": "softmax", "use_expert_bias": False, "norm_topk_prob": False, "num_groups": 1, "topk_groups": 1},
    "tied_mtp_padded": {"tie_embeddings": True, "num_mtp_layers": 1, "vocab_padding": 5},
    "all_dense_padded": {"first_k_dense": 3, "vocab_padding": 1},
    "no_shared": {"num_shared_experts": 0, "num_mtp_layers": 1},
}


def randomise(policy: Policy) -> None:
    """Expert biases and norm weights that are not what a fresh model has."""
    draw = torch.Generator().manual_seed(3)
    for name, tensor in policy.trainee.named_tensors():
        if name.endswith("expert_bias"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draw))
        elif "norm" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))


def folder_of(policy: Policy, folder: Path) -> Path:
    described = policy.published_config(bos_id=0, eos_id=1, pad_id=2)
    (folder / "config.json").write_text(json.dumps(described))
    tensors = {name: tensor.clone().contiguous() for name, tensor in policy.published_tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_logits(policy: Policy, folder: Path, length: int = 40) -> None:
    from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

    published = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(published) is DeepseekV3ForCausalLM
    vocab = policy.model_config.vocab_size
    tokens = torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = published(tokens).logits
    got = policy.score([SimpleNamespace(tokens_BS=tokens)], lambda logits, batch: logits)[0]
    assert want.std() > 0.05, "the logits say something"
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    policy = Policy(replace(BASE, **CASES[case]), None, one_rank(), "fp32")
    randomise(policy)
    assert_same_logits(policy, folder_of(policy, tmp_path))


def test_tiny_logits_are_those_of_transformers(tmp_path: Path) -> None:
    policy = Policy(preset("tiny"), None, one_rank(), "fp32")
    randomise(policy)
    assert_same_logits(policy, folder_of(policy, tmp_path))


def held_by(built: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters and expert biases of a model with their shapes."""
    buffers = ((name, buffer) for name, buffer in built.named_buffers() if name.endswith("expert_bias") and buffer is not None)
    return {name: tuple(tensor.shape) for name, tensor in (*built.named_parameters(), *buffers)}


@pytest.mark.parametrize("case", SHAPES)
def test_the_table_is_about_the_real_model(case: str) -> None:
    model = replace(BASE, **SHAPES[case])
    assert native_shapes(model) == held_by(meta_model(model))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_lite", "moonlight_16b"])
def test_the_table_is_about_the_real_full_model(name: str) -> None:
    model = preset(name)
    assert native_shapes(model) == held_by(meta_model(model))
    numbers = sum(math.prod(part.shape) for part in parts(model) if not part.copy)
    assert numbers == sum(math.prod(shape) for shape in native_shapes(model).values())


@pytest.mark.parametrize("case", SHAPES)
def test_regions_tile_every_native_tensor_once(case: str) -> None:
    model = replace(BASE, **SHAPES[case])
    shapes, table = native_shapes(model), parts(model, tied_head=True)
    written = {key: torch.zeros(shape) for key, shape in shapes.items()}
    assert len({part.name for part in table}) == len(table)
    for part in table:
        assert math.prod(part.shape) == math.prod(part.extent)
        if not part.copy:
            written[part.key][part.slices] += 1
    tokens = model.vocab_size - model.vocab_padding
    for key, times in written.items():
        if key in (EMBEDDING, HEAD):
            assert (times[:tokens] == 1).all() and (times[tokens:] == 0).all()
        else:
            assert (times == 1).all(), key


def scales(model: ModelConfig) -> int:
    return sum(part.role == "linear" for part in parts(model))


def test_the_full_models_have_their_published_number_of_tensors() -> None:
    model = preset("deepseek_v3")
    mtp = [part for part in parts(model) if part.name.startswith("model.layers.61.")]
    assert (len(parts(model)) - len(mtp), len(mtp)) == (45_395, 788)
    assert scales(model) == 45_808 and len(parts(model)) + scales(model) == 91_991  # the MTP layer's linears too, not eh_proj
    model = preset("moonlight_16b")
    derived = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(model.num_layers)]
    assert all(DERIVED.match(name) for name in derived) and len(parts(model)) + len(derived) == 5_344
    model = preset("deepseek_v2_lite")
    layer, expert = 2 + 5, 3  # norms; plain query, latent, its norm, values, output
    assert len(parts(model)) == 3 + 27 * layer + expert + 26 * (1 + expert * (64 + 1))
    assert len(parts(model)) == len(parts(preset("moonlight_16b"))) - 26, "without a bias"


def test_roles_shapes_and_places_of_v3() -> None:
    table = {part.name: part for part in parts(preset("deepseek_v3"))}
    expert, native = "model.layers.3.mlp.experts.255.", "decoder.layers.3.mlp.experts.weight"
    assert table[expert + "up_proj.weight"] == Part(
        expert + "up_proj.weight", native + "1", (255, 2048, 0), (1, 2048, 7168), (2048, 7168), "linear"
    )
    assert table[expert + "down_proj.weight"] == Part(
        expert + "down_proj.weight", native + "2", (255, 0, 0), (1, 7168, 2048), (7168, 2048), "linear"
    )
    roles = Counter(part.role for part in table.values())
    assert roles["bias"] == 59 and roles["linear"] == 45_808
    assert [name for name, part in table.items() if part.copy] == [
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    ]
    assert table["model.layers.61.eh_proj.weight"].role == "plain" and table["model.layers.61.eh_proj.weight"].shape == (
        7168,
        14336,
    )
    assert table["model.layers.61.shared_head.norm.weight"].key == "mtp.layers.0.final_layernorm.weight"
    for name, shape in {
        "q_a_proj": (1536, 7168),
        "q_a_layernorm": (1536,),
        "q_b_proj": (24576, 1536),
        "kv_a_proj_with_mqa": (576, 7168),
        "kv_a_layernorm": (512,),
        "kv_b_proj": (32768, 512),
        "o_proj": (7168, 16384),
    }.items():
        for layer in (0, 60, 61):
            assert table[f"model.layers.{layer}.self_attn.{name}.weight"].shape == shape
    order = list(table)
    assert order[0] == "model.embed_tokens.weight" and order.index("lm_head.weight") == 45_394
    assert order.index(expert + "up_proj.weight") == order.index(expert + "gate_proj.weight") + 1


def natives(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Random native tensors; padding rows are zero."""
    draw = torch.Generator().manual_seed(11)
    made = {key: torch.randn(shape, generator=draw) for key, shape in native_shapes(model).items()}
    for key in (EMBEDDING, HEAD):
        if key in made:
            made[key][model.vocab_size - model.vocab_padding :] = 0
    return made


@pytest.mark.parametrize("case", SHAPES)
def test_there_and_back_is_the_same_to_the_bit(case: str) -> None:
    model = replace(BASE, **SHAPES[case])
    made = natives(model)
    published = dict(to_hf(model, made.items()))
    assert published.keys() == {part.name for part in parts(model)}
    assert all(tensor.shape == part.shape for part in parts(model) for tensor in [published[part.name]])
    back = from_hf(model, reversed(list(published.items())))
    assert back.keys() == made.keys() and all(torch.equal(back[key], made[key]) for key in made)


def test_names_by_hand() -> None:
    model = replace(BASE, num_mtp_layers=1)
    made = natives(model)
    got = dict(to_hf(model, made.items()))
    stack, fused, width = made["decoder.layers.2.mlp.experts.weight1"], made["decoder.layers.0.mlp.linear_fc1.weight"], 24
    assert torch.equal(got["model.layers.2.mlp.experts.5.gate_proj.weight"], stack[5, :width])
    assert torch.equal(got["model.layers.2.mlp.experts.5.up_proj.weight"], stack[5, width:])
    assert torch.equal(got["model.layers.2.mlp.experts.5.down_proj.weight"], made["decoder.layers.2.mlp.experts.weight2"][5])
    assert torch.equal(got["model.layers.0.mlp.gate_proj.weight"], fused[:72])
    assert torch.equal(got["model.layers.0.mlp.up_proj.weight"], fused[72:])
    assert torch.equal(got["model.layers.3.embed_tokens.weight"], made[EMBEDDING])
    assert torch.equal(got["model.layers.3.shared_head.head.weight"], made[HEAD])
    for name in ("enorm", "hnorm", "eh_proj"):
        assert torch.equal(got[f"model.layers.3.{name}.weight"], made[f"mtp.layers.0.{name}.weight"])
    inner = made["mtp.layers.0.transformer_layer.mlp.shared_experts.linear_fc1.weight"]
    assert torch.equal(got["model.layers.3.mlp.shared_experts.up_proj.weight"], inner[24:])
    assert got["model.embed_tokens.weight"].data_ptr() == made[EMBEDDING].data_ptr(), "views, no copies"
    tied = replace(BASE, tie_embeddings=True, num_mtp_layers=1)
    got = dict(to_hf(tied, [(HEAD, torch.zeros(96, 48)), (EMBEDDING, made[EMBEDDING])]))
    assert list(got) == [
        "model.embed_tokens.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    ]


def test_the_columns_of_eh_proj_lie_as_the_embedding_and_then_the_hidden_state() -> None:
    """DeepSeek's (V3 2.2, eq. 21 has the two the other way round; its code and SGLang's take enorm's half first)."""
    policy = Policy(replace(BASE, num_mtp_layers=1), None, one_rank(), "fp32")
    randomise(policy)
    block = policy.trainee.module.mtp.layers[0]
    draw = torch.Generator().manual_seed(1)
    hidden, embedded = (torch.randn(5, 1, 48, generator=draw) for _ in range(2))
    weight = dict(policy.published_tensors())["model.layers.3.eh_proj.weight"]
    with torch.no_grad():
        got = block._concat_embeddings(hidden, embedded)
        want = block.enorm(embedded) @ weight[:, :48].T + block.hnorm(hidden) @ weight[:, 48:].T
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_every_tensor_needs_a_row_and_its_whole_shape() -> None:
    for name in ("decoder.layers.0.self_attention.linear_qkv.weight", "extra.weight", "decoder.layers.0.enorm.weight"):
        with pytest.raises(UserError, match=f"got {name}; add its row"):
            list(to_hf(BASE, [(name, torch.zeros(1))]))
    with pytest.raises(UserError, match=r"weight1 is \[8, 48, 48\]; got \[4, 48, 48\]; give whole tensors"):
        list(to_hf(BASE, [("decoder.layers.1.mlp.experts.weight1", torch.zeros(4, 48, 48))]))


def published(model: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in to_hf(model, natives(model).items())}


def test_a_published_checkpoint_is_whole_and_has_nothing_more() -> None:
    gate = "model.layers.1.mlp.experts.2.gate_proj.weight"
    whole = published(BASE)
    with pytest.raises(UserError, match=f"every tensor of the config and no other; got missing {gate}; use the config"):
        from_hf(BASE, [item for item in whole.items() if item[0] != gate])
    with pytest.raises(UserError, match="got unknown model.layers.1.mlp.experts.8.up_proj.weight; use the config"):
        from_hf(BASE, [*whole.items(), ("model.layers.1.mlp.experts.8.up_proj.weight", whole[gate])])
    with pytest.raises(UserError, match=f"got {gate} twice"):
        from_hf(BASE, [*whole.items(), (gate, whole[gate])])
    with pytest.raises(UserError, match=rf"{gate} is \[24, 48\] by the config; got \[48, 24\]"):
        from_hf(BASE, {**whole, gate: whole[gate].T}.items())
    with pytest.raises(UserError, match=f"one dtype, torch.float32; got torch.bfloat16 of {gate}"):
        from_hf(BASE, {**whole, gate: whole[gate].bfloat16()}.items())
    with pytest.raises(UserError, match=f"got unknown {gate}{SCALE}; take the scales into the weights first"):
        from_hf(BASE, [*whole.items(), (gate + SCALE, torch.ones(1, 1))])
    with pytest.raises(UserError, match=r"missing model.embed_tokens.weight, .* and \d+ more"):
        from_hf(BASE, [])


def test_mtp_that_the_config_and_the_files_do_not_share_has_its_own_way_out() -> None:
    model = replace(BASE, num_mtp_layers=1)
    with pytest.raises(UserError, match="got missing model.layers.3.* set num_nextn_predict_layers to 0 in config.json"):
        from_hf(model, published(BASE).items())
    with pytest.raises(UserError, match="got unknown model.layers.3.* set num_nextn_predict_layers to 1 in config.json"):
        from_hf(BASE, published(model).items())


def test_copies_may_be_missing_and_must_repeat_their_owner() -> None:
    model = replace(BASE, num_mtp_layers=1)
    whole, copy = published(model), "model.layers.3.shared_head.head.weight"
    without = {name: tensor for name, tensor in whole.items() if name != copy}
    assert torch.equal(from_hf(model, without.items())[HEAD], whole["lm_head.weight"])
    other = whole[copy].clone()
    other[3, 4] = torch.nextafter(other[3, 4], torch.tensor(9.0))
    with pytest.raises(UserError, match=f"{copy} repeats output_layer.weight; got other numbers"):
        from_hf(model, {**whole, copy: other}.items())
    tied = replace(BASE, tie_embeddings=True)
    whole = published(tied)
    assert "lm_head.weight" not in whole
    from_hf(tied, {**whole, "lm_head.weight": whole["model.embed_tokens.weight"]}.items())
    with pytest.raises(UserError, match="lm_head.weight repeats embedding"):
        from_hf(tied, {**whole, "lm_head.weight": whole["model.embed_tokens.weight"] + 1}.items())


def test_a_bf16_bias_becomes_fp32_and_what_the_config_says_is_passed_over() -> None:
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    whole = {name: tensor.bfloat16() for name, tensor in published(BASE).items()}
    whole["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    native = from_hf(BASE, whole.items())
    assert native.keys() == native_shapes(BASE).keys()
    got = native["decoder.layers.1.mlp.router.expert_bias"]
    assert got.dtype == torch.float32 and torch.equal(got, whole[bias].float())
    assert native[EMBEDDING].dtype == torch.bfloat16


def test_padding_rows_are_neither_published_nor_seen_in_logits() -> None:
    model = replace(BASE, vocab_padding=6)
    assert published(model)["lm_head.weight"].shape == (90, 48)
    policy = Policy(model, None, one_rank(), "fp32")
    stage = policy.trainee.module
    tokens = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    scored = []
    for padding in (0, 6):
        stage.vocab_padding = padding
        scored += policy.score([SimpleNamespace(tokens_BS=tokens)], lambda logits, batch: logits)
    assert scored[1].shape == (2, 7, 90) and torch.equal(scored[1], scored[0][..., :90])


def test_padding_of_several_tensor_ranks_lies_at_the_end_of_the_last() -> None:
    one_rank()
    from r1mega.model.forward import _num_tokens

    def kept(padding: int) -> list[int]:
        groups = [SimpleNamespace(size=lambda: 4, rank=lambda rank=rank: rank) for rank in range(4)]
        return [_num_tokens(SimpleNamespace(vocab_padding=padding, pg_collection=SimpleNamespace(tp=tp)), 8) for tp in groups]

    assert kept(0) == [8, 8, 8, 8] and kept(3) == [8, 8, 8, 5]
    assert kept(8) == [8, 8, 8, 0] and kept(13) == [8, 8, 3, 0]
