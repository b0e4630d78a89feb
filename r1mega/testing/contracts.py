"""What every registered choice of a kind must do, as one check a kind; a newcomer is tested by existing.

Each check takes a choice (or its class), raises AssertionError naming the broken promise, returns nothing.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace

import torch


def check_advantage(choice: object) -> None:
    """Equal rewards give 0; equivariant under permutation of responses and prompts; masked responses get 0 and do not count."""
    advantages = choice.build()
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 2.0, 1.0], [0.3, 0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 2.0, 0.5, 0.25]])
    got = advantages(rewards_PG)
    assert got.shape == rewards_PG.shape and got.dtype == torch.float32, "advantages are fp32 of the rewards' shape"
    same = torch.full((2, 5), 0.7)
    assert torch.equal(advantages(same), torch.zeros(2, 5)), "equal rewards give exactly 0"
    responses, prompts = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 1])
    torch.testing.assert_close(advantages(rewards_PG[:, responses]), got[:, responses])
    torch.testing.assert_close(advantages(rewards_PG[prompts]), got[prompts])
    mask_PG = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
    masked = advantages(rewards_PG, mask_PG)
    assert (masked[~mask_PG] == 0).all(), "a masked response gets 0"
    torch.testing.assert_close(masked, advantages(torch.where(mask_PG, rewards_PG, 1e6), mask_PG))


def check_policy_loss(cls: type) -> None:
    """REINFORCE's gradient at ratio 1 without KL; masked tokens contribute 0; invariant to the split into microbatches."""
    torch.manual_seed(0)
    now, mask = -torch.rand(4, 5) - 0.1, torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    advantages = torch.randn(4)
    sizes = {"num_sequences": 4, "num_tokens": int(mask.sum())}
    fields = {field.name for field in dataclasses.fields(cls)}
    free = cls(**{"kl_coef": 0.0} if "kl_coef" in fields else {}).build()

    leaf = now.clone().requires_grad_()
    loss, _ = free(leaf, now, None, advantages, mask, **sizes)
    loss.backward()
    share = torch.ones(4, 5).requires_grad_()  # -sum_t w_t A log p_t, with w_t read off the same loss at A = 1
    free(share, share.detach(), None, torch.ones(4), mask, **sizes)[0].backward()
    torch.testing.assert_close(leaf.grad, share.grad * advantages[:, None])
    assert (share.grad[mask] < 0).all(), "every response token is pushed up by a positive advantage"

    choice = cls().build()
    old, ref = now + 0.3 * torch.randn(4, 5), now + 0.3 * torch.randn(4, 5)

    def gradient(rows: slice, garbage: float) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = torch.where(mask, now, garbage)[rows].clone().requires_grad_()
        loss, _ = choice(leaf, torch.where(mask, old, -garbage)[rows], ref[rows], advantages[rows], mask[rows], **sizes)
        loss.backward()
        return loss.detach(), leaf.grad

    whole, grad = gradient(slice(0, 4), 0.0)
    for garbage in (50.0, float("inf"), float("nan")):
        again, grad_again = gradient(slice(0, 4), garbage)
        assert torch.equal(whole, again) and torch.equal(grad, grad_again), "masked tokens contribute 0, whatever they hold"
    assert (grad[~mask] == 0).all(), "no gradient at masked tokens"
    parts = [gradient(rows, 0.0) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)


def check_reward(choice: object) -> None:
    """Deterministic; a range is declared and kept; garbage, in any script and of any length, scores low and never raises.

    Low: at most half of the range.
    """
    low, high = type(choice).value_range
    assert math.isfinite(low) and math.isfinite(high) and low < high, f"the declared range [{low}, {high}] is one"
    score = choice.build()
    problem = SimpleNamespace(id="1", question="What is 1700 + 29?", answer="1729", source="numbers", metadata={}, solution=None)
    draw = random.Random(0)
    alphabet = "1729<>/\\{}$%^,.- \n" + "thinkanswer\u0660\u200b\U0001f600\u7b54\u0301\u05d0`"
    garbage = ["", " ", "1729", "\x00", "\ud800", "<answer>" * 500, "</think>" * 500, "<answer>1/0</answer>", "9" * 10_000]
    garbage += ["".join(draw.choices(alphabet, k=60)) for _ in range(100)]
    tail = "</think><answer>{}</answer> and more"
    garbage += [tail.format(piece) for piece in garbage if piece != problem.answer]
    garbage += [mark * 20_000 for mark in ("\\(", "$", "`", "(A) ", "\u0301", "\u7b54", "'", "a ")]
    for response in garbage:
        value = score(problem, response)
        assert isinstance(value, float) and low <= value <= high, f"{value!r} is a float in the declared range [{low}, {high}]"
        assert value <= (low + high) / 2, f"garbage scores low; {response[:100]!r} got {value}"
        assert value == score(problem, response), "the same response gets the same value"
    good = "The sum is one thousand seven hundred and twenty-nine.</think><answer>1729</answer>"
    for response in (good, good.replace("sum", "\ud800"), good * 3, f"{'why ' * 20_000}{good}"):
        value = score(problem, response)
        assert isinstance(value, float) and low <= value <= high, f"{value!r} is a float in the declared range [{low}, {high}]"
        assert value == score(problem, response), "the same response gets the same value"


def check_engine(choice: object, hf_config: dict, model: torch.nn.Module, eos_id: int) -> None:
    """Log-probabilities agree with a rescoring by ``model``; stop and length honoured; the version reported is the one pushed.

    ``model``: a transformers ``DeepseekV3ForCausalLM`` in fp32 of ``hf_config``, whose weights are pushed.
    """
    from r1mega.config.run import SamplingConfig
    from r1mega.rl.engine import EngineRuntime

    engine = choice.build(EngineRuntime(hf_config, eos_id=eos_id))
    assert engine.version == -1, "an engine without weights says so"
    engine.load_weights(checkpoint_tensors(model), version=3)
    assert engine.version == 3, "the version reported is the version pushed"
    prompts = [[4, 5, 6], [7], [4, 5, 6], [8, 9]] * 4
    completions = engine.generate(prompts, SamplingConfig(temperature=0.8, max_new_tokens=24), seed=11)
    assert completions == engine.generate(prompts, SamplingConfig(temperature=0.8, max_new_tokens=24), seed=11), (
        "same seed, same response"
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        want = torch.log_softmax(logits / 0.8, dim=-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-4, rtol=0)
        assert eos_id not in completion.token_ids[:-1], "nothing follows the end of sequence"
        stopped = completion.token_ids[-1] == eos_id
        assert completion.finish_reason == ("stop" if stopped else "length"), "the reason is the one that holds"
        assert stopped or len(completion.token_ids) == 24, "a response ends by the end of sequence or at its limit"


def checkpoint_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor) of a transformers ``DeepseekV3ForCausalLM``, one matrix an expert."""
    for name, tensor in model.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
        elif kind == "down_proj":
            for expert, down in enumerate(tensor):
                yield f"{prefix}.{expert}.down_proj.weight", down
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield name, tensor
