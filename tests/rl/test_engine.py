"""The local engine against transformers' own full forward pass, its stops, its weights' table, and the contract of every choice."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from r1mega.config.errors import UserError
from r1mega.config.run import SamplingConfig
from r1mega.registry import choices
from r1mega.rl.engine import EngineRuntime, LocalEngine, Request, generate
from r1mega.rl.engine.inprocess import draw
from r1mega.testing.contracts import check_engine, checkpoint_tensors

EOS = 3
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
YARN |= {"mscale_all_dim": 1.0, "rope_theta": 10000.0}
MLP, GATE_BIAS = "model.layers.1.mlp", "model.layers.1.mlp.gate.e_score_correction_bias"


def config(**changes) -> dict:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "max_position_embeddings": 256,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.2,
        "rope_scaling": YARN,
    } | changes


def model(hf_config: dict, seed: int = 0) -> DeepseekV3ForCausalLM:
    torch.manual_seed(seed)
    made = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(dict(hf_config))).eval()
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return made


def engine(source: DeepseekV3ForCausalLM, hf_config: dict, eos_id: int = EOS, **knobs):
    made = LocalEngine(**knobs).build(EngineRuntime(hf_config, eos_id=eos_id))
    made.load_weights(checkpoint_tensors(source), version=5)
    return made


def rescore(source, prompt, completion, temperature):
    """Log-probabilities of a response's tokens by one full forward pass without a cache."""
    with torch.no_grad():
        logits = source(torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


PROMPTS = [[5, 9, 11], [7], [5, 9, 11], [8, 8, 2, 40, 41, 42, 43, 44, 45], [1, 60], [5, 9, 11]]


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": 20}, {"rope_interleave": False, "rope_scaling": None}, {"tie_word_embeddings": True}]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_logprobs_are_those_of_a_full_forward_pass(changes, temperature):
    hf_config = config(**changes)
    source = model(hf_config)
    completions = engine(source, hf_config).generate(PROMPTS, SamplingConfig(temperature, 80), seed=1)
    assert len({tuple(c.token_ids) for c in completions}) == len(PROMPTS), "responses to one prompt differ"
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), rescore(source, prompt, completion, temperature), atol=2e-5, rtol=0
        )


def test_stop_and_length():
    hf_config = config()
    completions = engine(model(hf_config), hf_config).generate(PROMPTS * 8, SamplingConfig(1.0, 40), seed=2)
    reasons = {c.finish_reason for c in completions}
    assert reasons == {"stop", "length"}
    for c in completions:
        assert len(c.token_ids) == len(c.logprobs)
        assert EOS not in c.token_ids[:-1]
        assert (c.token_ids[-1] == EOS) == (c.finish_reason == "stop")
        assert len(c.token_ids) == 40 or c.finish_reason == "stop"


def test_batching_does_not_change_what_is_drawn():
    hf_config = config()
    source = model(hf_config)
    sampling = SamplingConfig(1.0, 70)
    want = engine(source, hf_config).generate(PROMPTS * 3, sampling, seed=4)
    got = engine(source, hf_config, max_batch=4, prefill_tokens=10).generate(PROMPTS * 3, sampling, seed=4)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    torch.manual_seed(99)
    again = engine(source, hf_config).generate(PROMPTS * 3, sampling, seed=4)
    assert again == want
    assert engine(source, hf_config).generate(PROMPTS * 3, sampling, seed=5) != want


def test_threads_decode_batches_side_by_side_and_are_put_back(monkeypatch):
    hf_config = config()
    made = engine(model(hf_config), hf_config)
    sampling, before, seen = SamplingConfig(1.0, 30), torch.get_num_threads(), []
    decode = made._decode
    monkeypatch.setattr(
        made,
        "_decode",
        lambda prompts, rows, *rest: seen.append((len(rows), torch.get_num_threads())) or decode(prompts, rows, *rest),
    )
    try:
        torch.set_num_threads(1)
        want = made.generate(PROMPTS * 8, sampling, seed=4)
        torch.set_num_threads(2)
        got = made.generate(PROMPTS * 8, sampling, seed=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert seen == [(48, 1), (24, 1), (24, 1)]


def test_requests_with_limits_of_their_own_are_one_batch(monkeypatch):
    made = engine(model(config()), config())
    prompts, limits = [[4, 5, 6], [7], [8, 9], [4, 5, 6]], [3, 24, 1, 9]
    whole = made.generate(prompts, SamplingConfig(max_new_tokens=24), [1, 2, 3, 4])
    batches = []
    decode = made._decode
    monkeypatch.setattr(made, "_decode", lambda prompts, rows, *rest: batches.append(len(rows)) or decode(prompts, rows, *rest))
    asked = [
        Request(prompt, SamplingConfig(max_new_tokens=limit), seed)
        for prompt, limit, seed in zip(prompts, limits, range(1, 5), strict=True)
    ]
    for one, long, limit in zip(generate(made, asked), whole, limits, strict=True):
        assert one.token_ids == long.token_ids[:limit] and one.logprobs == pytest.approx(long.logprobs[:limit], abs=1e-5)
        assert one.finish_reason == ("stop" if EOS in one.token_ids else "length")
    assert batches == [4]
    with pytest.raises(UserError, match=r"fit max_position_embeddings 256; got 250 \+ 7"):
        made.generate([[4] * 250, [4]], SamplingConfig(max_new_tokens=1), [1, 2], [7, 250])


def test_temperature_zero_takes_the_likeliest_token():
    hf_config = config()
    source = model(hf_config)
    made = engine(source, hf_config)
    first, second = (made.generate(PROMPTS, SamplingConfig(0.0, 12), seed) for seed in (1, 2))
    assert first == second
    for prompt, completion in zip(PROMPTS, first, strict=True):
        text = prompt + completion.token_ids
        with torch.no_grad():
            best = source(torch.tensor([text])).logits[0].argmax(-1).tolist()
        assert completion.token_ids == best[len(prompt) - 1 : -1] and set(completion.logprobs) == {0.0}


def test_draw_follows_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens, logprobs = draw(probs.log().expand(1000, 4), uniform, 1.0)
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 300, 200]
    torch.testing.assert_close(logprobs, probs[tokens].log())
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3), edges, 1.0)[0].tolist() == [1, 1]
    for temperature in (0.0, 1.0):
        with pytest.raises(RuntimeError, match="not finite"):
            draw(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0.5], dtype=torch.float64), temperature)


@pytest.mark.parametrize("spoil, says", [
    (lambda names: names.pop(f"{MLP}.experts.5.up_proj.weight"), f"missing {MLP}.experts.5.up_proj.weight"),
    (lambda names: names.pop(GATE_BIAS), f"missing {GATE_BIAS}"),
    (lambda names: names.update({f"{MLP}.experts.8.up_proj.weight": torch.zeros(16, 32)}), f"unknown {MLP}.experts.8.up_proj"),
    (lambda names: names.update({"model.norm.weight": torch.ones(1)}), r"model.norm.weight is \[32\]; got \[1\]"),
])  # fmt: skip
def test_a_load_that_is_not_complete_is_named_and_leaves_no_usable_weights(spoil, says):
    hf_config = config()
    source = model(hf_config)
    made = engine(source, hf_config)
    assert made.version == 5
    names = dict(checkpoint_tensors(source))
    spoil(names)
    with pytest.raises(UserError, match=says):
        made.load_weights(names.items(), version=6)
    assert made.version == -1
    with pytest.raises(UserError, match="load_weights"):
        made.generate([[1]], SamplingConfig(1.0, 1), seed=0)


def test_twice_is_an_error_and_mtp_layers_are_passed_over():
    hf_config = config()
    source = model(hf_config)
    made = engine(source, hf_config)
    tensors = list(checkpoint_tensors(source))
    with pytest.raises(UserError, match="twice"):
        made.load_weights(tensors + tensors[-1:], version=6)
    made.load_weights(itertools.chain(tensors, [("model.layers.3.eh_proj.weight", torch.zeros(32, 64))]), version=7)
    assert made.version == 7


def test_new_weights_take_the_place_of_old_ones():
    hf_config = config()
    made = engine(model(hf_config, seed=0), hf_config)
    made.load_weights(checkpoint_tensors(model(hf_config, seed=1)), version=6)
    fresh = engine(model(hf_config, seed=1), hf_config)
    sampling = SamplingConfig(1.0, 20)
    assert made.generate(PROMPTS, sampling, 3) == fresh.generate(PROMPTS, sampling, 3)


def test_bf16_keeps_the_expert_bias_in_fp32():
    hf_config = config()
    source = model(hf_config)
    made = LocalEngine(dtype="bfloat16").build(EngineRuntime(hf_config, eos_id=EOS))
    made.load_weights(checkpoint_tensors(source), version=0)
    bias = made.model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, source.model.layers[1].mlp.gate.e_score_correction_bias)
    assert made.model.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16
    (completion,) = made.generate([[5, 6]], SamplingConfig(1.0, 20), 1)
    made.model.set_experts_implementation("eager")
    error = torch.tensor(completion.logprobs) - rescore(made.model, [5, 6], completion, 1.0)
    assert error.abs().mean() < 0.1


def test_requests_that_cannot_be_served_are_errors():
    hf_config = config()
    made = engine(model(hf_config), hf_config)
    assert made.generate([], SamplingConfig(1.0, 1), 0) == []
    with pytest.raises(UserError, match="empty prompt at 1"):
        made.generate([[1], []], SamplingConfig(1.0, 1), 0)
    with pytest.raises(UserError, match="max_position_embeddings 256; got 6 [+] 251"):
        made.generate([[1] * 6], SamplingConfig(1.0, 251), 0)
    with pytest.raises(UserError, match="model_type"):
        LocalEngine().build(EngineRuntime({"model_type": "llama"}))


@pytest.mark.parametrize("name", sorted(choices("engine").keys() - {"sglang"}))  # tests/rl/engine has a server for it
def test_contract(name):
    hf_config = config()
    check_engine(choices("engine")[name](), hf_config, model(hf_config), eos_id=EOS)
