"""What every registered choice of a kind must do, as one check a kind; a newcomer is tested by existing.

Each check takes a choice (or its class), raises AssertionError naming the broken promise, returns nothing.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from r1mega.rl.loss import LossInput


def check_advantage(choice: object) -> None:
    """Equal rewards give 0; equivariant under permutation of responses and prompts; masked responses get 0 and do not count.

    Equal in the group, where the baseline is the group's; in the whole batch, where ``choice.baseline`` says "batch". Rewards that
    are moved by a constant (a constant a group, where the baseline is the group's) give the same advantages.
    """
    advantages = choice.build()
    baseline = getattr(choice, "baseline", "group")
    assert baseline in ("group", "batch"), "a baseline is over the group or the batch"
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 2.0, 1.0], [0.3, 0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 2.0, 0.5, 0.25]])
    got = advantages(rewards_PG)
    assert got.shape == rewards_PG.shape and got.dtype == torch.float32, "advantages are fp32 of the rewards' shape"
    assert (got[0].diff().sign() == rewards_PG[0].diff().sign()).all(), "a higher reward has a higher advantage"
    same = torch.full((2, 5), 0.7)
    assert torch.equal(advantages(same), torch.zeros(2, 5)), "equal rewards give exactly 0"
    shift_P1 = torch.tensor([[0.5], [0.5], [0.5]])
    if baseline == "group":
        assert (got[1] == 0).all(), "equal rewards in a group give exactly 0"
        shift_P1 = torch.tensor([[0.5], [-2.0], [4.0]])
    torch.testing.assert_close(advantages(rewards_PG + shift_P1), got)
    responses, prompts = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 1])
    torch.testing.assert_close(advantages(rewards_PG[:, responses]), got[:, responses])
    torch.testing.assert_close(advantages(rewards_PG[prompts]), got[prompts])
    mask_PG = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
    masked = advantages(rewards_PG, mask_PG)
    assert (masked[~mask_PG] == 0).all(), "a masked response gets 0"
    for other in (1e6, float("nan")):
        torch.testing.assert_close(masked, advantages(torch.where(mask_PG, rewards_PG, other), mask_PG))
    torch.testing.assert_close(advantages(rewards_PG[[0, 2]], mask_PG[[0, 2]]), masked[[0, 2]])
    nobody = advantages(rewards_PG, torch.zeros(3, 5))
    assert torch.equal(nobody, torch.zeros(3, 5)), "where nothing counts, all is 0"


def check_policy_loss(cls: type, **knobs: object) -> None:
    """REINFORCE's gradient at ratio 1 without KL; masked tokens contribute 0; the same however the minibatch lies in memory.

    That is: cut into microbatches, moved along the row, in wider rows, each row cut over context ranks. ``knobs``: of the choice,
    where they are not its defaults.
    """
    torch.manual_seed(0)
    now, mask = -torch.rand(4, 6) - 0.1, torch.rand(4, 6) < 0.6
    mask[:, 0] = True
    advantages = torch.tensor([0.7, -1.1, 0.4, -0.2])
    sizes = {"num_sequences": 4, "num_tokens": int(mask.sum()), "max_tokens": 9}
    fields = {field.name for field in dataclasses.fields(cls)}
    off = {name: 0.0 for name in ("kl_coef", "distill_coef") if name in fields}
    free = cls(**{**knobs, **off}).build()

    def gradient_at_one(logprobs_BS: torch.Tensor, advantages_B: torch.Tensor) -> torch.Tensor:
        leaf = logprobs_BS.clone().requires_grad_()
        given = LossInput(leaf, logprobs_BS, advantages_B, mask, rollout_BS=logprobs_BS, ref_BS=-torch.rand(4, 6), **sizes)
        free(given)[0].backward()
        return leaf.grad

    share = gradient_at_one(torch.full((4, 6), -1.0), torch.ones(4))  # -sum_t w_t A log p_t, with w_t read off at A = 1
    torch.testing.assert_close(gradient_at_one(now, advantages), share * advantages[:, None])
    assert (share[mask] < 0).all(), "every response token is pushed up by a positive advantage"

    loss = cls(**knobs).build()
    old, rollout, ref, teacher = (now + size * torch.randn(4, 6) for size in (0.3, 0.4, 0.3, 0.3))
    whole_lengths = mask.sum(dim=1)

    def gradient(garbage: float = 0.0, rows: slice = slice(0, 4), place: torch.Tensor | None = None, whole=None):
        """Loss, gradient at the response's places and statistics of some rows, or of some columns with the whole rows' sums."""
        columns = torch.arange(6) if place is None else place
        filled = [torch.where(mask, values, garbage * sign)[rows] for values, sign in zip(
            (now, old, rollout, ref, teacher), (1, -1, 1, -1, 1), strict=True)]  # fmt: skip
        held, mask_BS = filled, mask[rows]
        if place is not None and whole is None:  # spread out in a wider row of garbage
            wide = [torch.full((values.shape[0], 11), garbage) for values in filled]
            mask_BS = torch.zeros(mask_BS.shape[0], 11, dtype=torch.bool)
            mask_BS[:, columns] = mask[rows]
            for target, values in zip(wide, filled, strict=True):
                target[:, columns] = values
            held = wide
        elif place is not None:
            held, mask_BS = [values[:, columns] for values in filled], mask_BS[:, columns]
        leaf = held[0].clone().requires_grad_()
        extra = {} if whole is None else {"lengths_B": whole_lengths[rows], "over_sequence": whole}
        given = LossInput(
            leaf, held[1], advantages[rows], mask_BS, rollout_BS=held[2], ref_BS=held[3], teacher_BS=held[4], **extra, **sizes
        )
        value, stats = loss(given)
        value.backward()
        assert (leaf.grad[~mask_BS] == 0).all(), "no gradient at masked tokens"
        return value.detach(), leaf.grad[:, columns] if place is not None and whole is None else leaf.grad, stats

    value, grad, stats = gradient()
    for garbage in (50.0, float("inf"), float("nan")):
        again, grad_again, stats_again = gradient(garbage)
        assert torch.equal(value, again) and torch.equal(grad, grad_again), "masked tokens contribute 0, whatever they hold"
        assert stats == stats_again, "masked tokens are in no statistic"
    parts = [gradient(rows=rows) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], value)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)
    spread, grad_spread, _ = gradient(float("nan"), place=torch.tensor([0, 2, 3, 7, 9, 10]))
    torch.testing.assert_close(spread, value)
    torch.testing.assert_close(grad_spread, grad)

    columns = (torch.tensor([0, 5]), torch.tensor([1, 2, 3, 4]))
    for pieces in (columns, columns[::-1]):
        both = _over_context(lambda part, whole, pieces=pieces: gradient(place=pieces[part], whole=whole))
        torch.testing.assert_close(both[0][0] + both[1][0], value)
        joined = torch.empty_like(grad)
        for (_, own, _), piece in zip(both, pieces, strict=True):
            joined[:, piece] = own
        torch.testing.assert_close(joined, grad)
        for name, total in stats.sums().items():
            torch.testing.assert_close(both[0][2].sums()[name] + both[1][2].sums()[name], total, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(torch.maximum(both[0][2].maxima(), both[1][2].maxima()), stats.maxima())


def _over_context(run: Callable[[int, Callable], Any]) -> list[Any]:
    """``run(part, over_sequence)`` of two context ranks, as threads that add up what they hand over."""
    barrier, box = threading.Barrier(2, timeout=60), [None, None]

    def of(part: int) -> Any:
        def over_sequence(values: torch.Tensor) -> torch.Tensor:
            box[part] = values
            barrier.wait()
            total = box[0] + box[1]
            barrier.wait()
            return total

        return run(part, over_sequence)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of, range(2)))


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


class ScriptedEngine:
    """Draws the same turns in each episode, cut at the longest length; ``requests``: what it was asked."""

    version = 0

    def __init__(self, tokenizer: Any, turns: Sequence[str]):
        self.tokenizer, self.turns = tokenizer, [[*tokenizer.encode(turn), tokenizer.eos_id] for turn in turns]
        self.requests: list[Any] = []

    async def complete(self, request: Any) -> Any:
        """The next turn of the script, from the start after the last one."""
        from r1mega.rl.types import Completion

        whole = self.turns[len(self.requests) % len(self.turns)]
        self.requests.append(request)
        ids = whole[: request.sampling.max_new_tokens]
        return Completion(ids, [-0.5] * len(ids), "stop" if ids == whole else "length")


def check_environment(choice: object, turns: Sequence[str], tokenizer: Any = None, seconds: float = 60.0) -> None:
    """The same turns give the same episode, beside others too; closed twice; limits of turns and tokens kept; who put what is
    known.

    ``turns``: of a policy, such as make the environment answer; each but the last should go on. ``tokenizer``: None: a small one.
    """
    from r1mega.config.run import SamplingConfig
    from r1mega.data.problems import Problem
    from r1mega.rl.environment.play import Player, play_all

    if tokenizer is None:
        from r1mega.data.tokenizer import train_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            tokenizer = train_tokenizer(["a small one"], folder, vocab_size=300)
    environment = choice.build()
    assert isinstance(environment.max_turns, int) and environment.max_turns >= 1, "at least one turn"
    problem = Problem("1", "What is 1700 + 29?", "1729", "numbers", {})
    pair = [environment.begin(problem), environment.begin(problem)]
    questions = [episode.reset() for episode in pair]
    assert questions[0] == questions[1] and isinstance(questions[0], str), "the same problem, the same question, as text"
    for turn in turns[: environment.max_turns]:
        first, second = (episode.step(turn) for episode in pair)
        assert first == second, f"the same turns give the same step; got {first} and {second}"
        assert isinstance(first.observation, str | None) and math.isfinite(first.reward), "a text or None, and a number"
        if first.observation is None:
            break
    for episode in (*pair, *pair):
        episode.close()

    def play(limit: int, context: int | None = None) -> tuple[Any, list[Any]]:
        engine = ScriptedEngine(tokenizer, turns)
        player = Player(environment, engine, tokenizer, SamplingConfig(max_new_tokens=limit), context, seconds)
        (played,) = play_all(player, [problem], [5])
        return played, engine.requests

    whole, requests = play(100_000)
    assert whole.failure == "" and 1 <= whole.turns == len(requests) <= environment.max_turns, "no more turns than max_turns"
    size = len(whole.completion.token_ids)
    for limit in {1, 2, size // 3, size // 2, size - 1, size + 1} - {0}:
        for context in (None, len(whole.prompt) + limit)[: 1 + (limit == size // 2)]:
            played, requests = play(limit if context is None else 100_000, context)
            tokens = played.completion.token_ids
            own = [True] * len(tokens) if played.own is None else played.own
            assert len(tokens) <= limit, f"at most max_new_tokens {limit}; got {len(tokens)}"
            assert len(own) == len(tokens) == len(played.completion.logprobs), "each token is somebody's"
            assert tokens == whole.completion.token_ids[: len(tokens)], "a shorter episode is the start of a longer one"
            assert own[-1], "the last turn is the policy's: what nobody reads is not kept"
            assert all(own[start:end] == [True] * (end - start) for _, start, end in played.completion.versions)
            before: list[int] = []
            for request in requests:
                assert request.prompt[: len(before)] == before, "tokens of earlier turns stay as they were drawn"
                before = request.prompt
            assert (whole.prompt + tokens)[: len(before)] == before
            special = {token for token, added in tokenizer.backend.get_added_tokens_decoder().items() if added.special}
            seen = [token for token, mine in zip(tokens, own, strict=True) if not mine and token in special]
            assert len(seen) == 2 * (played.turns - 1), "special tokens stand around an observation, not in it"
    again, _ = play(100_000)
    assert again == whole, "the same turns give the same episode"
    if hasattr(environment, "close"):
        environment.close()
        environment.close()


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
