"""The engine in this process at work: load weights, then decode batches of rows until each has ended; in and out: token ids.

Prefills each distinct prompt once and shares its cache among its responses; removes finished rows from the batch, so that the tail
is cheap. Which token is drawn depends on a row's seed and its probabilities alone; batching matters only as far as it changes the
last bits of a probability.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from r1mega.config.errors import UserError
from r1mega.config.run import SamplingConfig
from r1mega.rl.engine import weights
from r1mega.rl.engine.batcher import Batcher
from r1mega.rl.engine.contract import EngineRuntime, Request
from r1mega.rl.engine.local import LocalEngine
from r1mega.rl.engine.mla import ExpertTap, LatentCache, prefill, step
from r1mega.rl.types import Completion

DRAWN_STEPS = 64
"""Steps whose random numbers are drawn at once."""
SMALLEST_SHARE = 16
"""Rows a thread at least, when a batch is shared out to threads."""
SHRINK_SHARE = 0.1
"""Finished rows are removed when they are more than this share: removing copies the rest of the cache."""


class InProcessEngine:
    """See :class:`r1mega.rl.engine.contract.Engine`; ``model`` is transformers' ``DeepseekV3ForCausalLM``."""

    sleeps = False

    def __init__(self, choice: LocalEngine, runtime: EngineRuntime):
        if runtime.hf_config.get("model_type", "deepseek_v3") != "deepseek_v3":
            raise UserError(
                f"engine=local: model_type deepseek_v3; got {runtime.hf_config['model_type']}; use an engine that serves it"
            )
        self.choice, self.runtime, self.version = choice, runtime, -1
        self.device = torch.device(runtime.device)
        self.dtype = getattr(torch, runtime.dtype if choice.dtype == "as_is" else choice.dtype)
        config = DeepseekV3Config.from_dict(dict(runtime.hf_config))
        self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model.set_experts_implementation("grouped_mm")
        for module in self.model.modules():
            if hasattr(
                module, "e_score_correction_bias"
            ):  # fp32 in every format, as transformers itself has it after loading files
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        self.model.to(self.device).eval().requires_grad_(False)
        self._tap = ExpertTap(self.model) if choice.routed_experts else None
        batcher = Batcher(self._complete)
        self.complete, self.pause, self.resume = batcher.ask, batcher.pause, batcher.resume

    async def sleep(self) -> None:
        """Nothing: its memory is the trainer's process's."""

    async def wake_weights(self) -> None:
        """Nothing."""

    async def wake(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is left behind."""

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        """One batch of requests, those with the same sampling together."""
        done: list[Completion | None] = [None] * len(requests)
        by_sampling: dict[tuple, list[int]] = {}
        for place, request in enumerate(requests):
            by_sampling.setdefault(dataclasses.astuple(request.sampling), []).append(place)
        for places in by_sampling.values():
            prompts, seeds = [requests[place].prompt for place in places], [requests[place].seed for place in places]
            for place, completion in zip(places, self.generate(prompts, requests[places[0]].sampling, seeds), strict=True):
                done[place] = dataclasses.replace(completion, versions=((self.version, 0, len(completion.token_ids)),))
        return done

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy all weights by Hugging Face name; see :func:`r1mega.rl.engine.weights.load`. After a failure ``version`` is -1."""
        self.version = -1
        weights.load(self.model, named_tensors)
        self.version = version

    def generate(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int | Sequence[int]) -> list[Completion]:
        """One response to each prompt, in order; at temperature 0 the likeliest token, with log-probability 0.

        ``seed``: one a prompt; of a single number, row r of the call draws what the pair (number, r) says.

        Raises UserError before the first complete load, for an empty prompt, and where prompt and response exceed
        max_position_embeddings; RuntimeError when the weights give logits that are not finite.
        """
        if self.version < 0:
            raise UserError(
                "engine=local: generates from complete weights; got none, or a load that failed; call load_weights first"
            )
        if not prompts:
            return []
        seeds = [f"{seed}/{row}" for row in range(len(prompts))] if isinstance(seed, int) else list(map(str, seed))
        lengths, context = [len(prompt) for prompt in prompts], self.model.config.max_position_embeddings
        if 0 in lengths:
            raise UserError(f"engine.prompts: at least one token; got an empty prompt at {lengths.index(0)}; add bos")
        if max(lengths) + sampling.max_new_tokens > context:
            raise UserError(
                f"sampling.max_new_tokens: prompt and response fit max_position_embeddings {context}; "
                f"got {max(lengths)} + {sampling.max_new_tokens}; lower it or extend the model's context"
            )
        by_length = sorted(range(len(prompts)), key=lengths.__getitem__)  # equal lengths together: less padding, no mask
        side = self._batches_side_by_side(len(prompts))
        size = -(-min(self.choice.max_batch, len(prompts)) // side)
        batches = [by_length[start : start + size] for start in range(0, len(prompts), size)]
        completions: list[Completion | None] = [None] * len(prompts)
        with _threads(side) as run:
            for rows, done in zip(batches, run(lambda rows: self._decode(prompts, rows, sampling, seeds), batches), strict=True):
                for row, completion in zip(rows, done, strict=True):
                    completions[row] = completion
        return completions

    def _batches_side_by_side(self, num_rows: int) -> int:
        """Batches decoded at once: on a CPU, one a thread. Threads inside one operation would meet after each, and a small model's
        operations are too short for that; batches never meet."""
        if self.device.type != "cpu":
            return 1
        return max(1, min(torch.get_num_threads(), num_rows // SMALLEST_SHARE, self.choice.max_batch))

    @torch.inference_mode()
    def _decode(self, prompts: list[list[int]], rows: list[int], sampling: SamplingConfig, seeds: list[str]) -> list[Completion]:
        tap = self._tap
        with tap.hearing() if tap else contextlib.nullcontext({}) as heard:
            return self._decode_heard([prompts[row] for row in rows], sampling, [seeds[row] for row in rows], heard)

    def _decode_heard(
        self, prompts: list[list[int]], sampling: SamplingConfig, seeds: list[str], heard: dict[int, torch.Tensor]
    ) -> list[Completion]:
        """``heard``: where the tap writes the experts of this thread's last forward pass."""
        rows, limit, tap = range(len(prompts)), sampling.max_new_tokens, self._tap
        logits_BV, cache, of_prompts = self._prefill(prompts, limit, heard)
        if tap:
            experts = torch.full((len(rows), limit, tap.layers, tap.top_k), -1, dtype=torch.int16, device=self.device)
        positions = torch.arange(cache.largest, device=self.device)[None]
        cos, sin = self.model.model.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), positions)
        live_B = torch.arange(len(rows), device=self.device)
        tokens = torch.zeros(len(rows), limit, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(len(rows), limit, dtype=torch.float32, device=self.device)
        length_B = torch.full((len(rows),), limit, device=self.device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for now in range(limit):
            if now % DRAWN_STEPS == 0:
                uniform = _uniform(seeds, now // DRAWN_STEPS).to(self.device)
            drawn_B, logprob_B = draw(logits_BV, uniform[live_B, now % DRAWN_STEPS], sampling.temperature)
            tokens[live_B, now], logprobs[live_B, now] = drawn_B, logprob_B
            stopped_B = (drawn_B == self.runtime.eos_id) & ~ended[live_B]
            length_B[live_B[stopped_B]] = now + 1
            ended[live_B] |= stopped_B
            going_B = ~ended[live_B]
            num_going = int(going_B.sum())
            if num_going == 0 or now + 1 == limit:
                break
            if num_going < (1 - SHRINK_SHARE) * len(live_B):
                keep = going_B.nonzero()[:, 0]
                cache.keep(keep)
                live_B, drawn_B = live_B[keep], drawn_B[keep]
            logits_BV = step(self.model, cache, drawn_B, (cos[0], sin[0]))
            if tap:
                experts[live_B, now] = tap.record(heard, len(live_B), 1, self.device)[:, 0]
        lengths = length_B.tolist()
        routed = [None] * len(rows)
        if tap:
            routed = [torch.cat([of_prompts[row], experts[row, : lengths[row] - 1].cpu()]) for row in rows]
        return [
            Completion(row_tokens[:length], row_logprobs[:length], "stop" if stop else "length", routed_experts=record)
            for row_tokens, row_logprobs, length, stop, record in zip(
                tokens.tolist(), logprobs.tolist(), lengths, ended.tolist(), routed, strict=True
            )
        ]

    def _prefill(
        self, prompts: list[list[int]], limit: int, heard: dict[int, torch.Tensor]
    ) -> tuple[torch.Tensor, LatentCache, list[torch.Tensor]]:
        """Logits [B, V] and cache after the prompts, each distinct one read once, in passes of at most ``prefill_tokens``; and the
        experts of each prompt's tokens, on the host, where there is a tap."""
        distinct = {tuple(prompt): None for prompt in prompts}
        for idx, prompt in enumerate(distinct):
            distinct[prompt] = idx
        largest = max(map(len, prompts)) + limit
        parts, waiting, experts = [], [], []
        for prompt in [*distinct, None]:
            if waiting and (prompt is None or (len(waiting) + 1) * max(len(prompt), len(waiting[-1])) > self.choice.prefill_tokens):
                parts.append(prefill(self.model, waiting, self.runtime.pad_id, largest))
                if self._tap:
                    record = self._tap.record(heard, len(waiting), max(map(len, waiting)), self.device).cpu()
                    experts += [record[row, : len(read)] for row, read in enumerate(waiting)]
                waiting = []
            if prompt is not None:
                waiting.append(list(prompt))
        cache = LatentCache.joined([part for _, part in parts])
        shared = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=self.device)
        cache.keep(shared)
        of_prompts = [experts[distinct[tuple(prompt)]] for prompt in prompts] if self._tap else []
        return torch.cat([logits for logits, _ in parts])[shared], cache, of_prompts


@contextlib.contextmanager
def _threads(count: int) -> Iterator[Callable]:
    """A ``map`` over ``count`` threads with one intra-op thread each; the builtin, and torch's threads as they are, if it is 1."""
    if count == 1:
        yield map
        return
    before = torch.get_num_threads()
    try:
        # Each thread has its own intra-op setting; the call also stores the default of threads to come, which is put back below.
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(before)


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from softmax(logits / temperature) by inversion, and its log-probability there (fp32).

    ``logits_BV``: fp32; ``uniform_B``: fp64 in [0, 1). The token is the first whose cumulative probability (fp64) exceeds the
    uniform number times the total, so one of probability 0 is never drawn. Temperature 0: the likeliest token, with 0.
    """
    if temperature == 0:
        best_B = logits_BV.argmax(dim=-1)
        if not torch.isfinite(logits_BV.gather(1, best_B[:, None])).all():
            raise RuntimeError("engine: the logits are not finite; the weights are broken")
        return best_B, torch.zeros_like(logits_BV[:, 0])
    probs_BV = torch.softmax(logits_BV / temperature, dim=-1)
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    if not torch.isfinite(total_B1).all():
        raise RuntimeError("engine: the logits are not finite; the weights are broken")
    drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * total_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)
    return drawn_B1[:, 0], probs_BV.gather(1, drawn_B1)[:, 0].log()


def _uniform(seeds: list[str], block: int) -> torch.Tensor:
    """fp64 [rows, DRAWN_STEPS] in [0, 1): a row is a function of its seed and the block alone."""
    generator, rows = torch.Generator(), torch.empty(len(seeds), DRAWN_STEPS, dtype=torch.float64)
    for row, seed in enumerate(seeds):
        # torch's CPU generator takes 32 bits of a seed: hash, so that neighbouring seeds and blocks share nothing.
        digest = hashlib.blake2b(f"{seed}/{block}".encode(), digest_size=4).digest()
        torch.rand(
            DRAWN_STEPS, dtype=torch.float64, generator=generator.manual_seed(int.from_bytes(digest, "little")), out=rows[row]
        )
    return rows
