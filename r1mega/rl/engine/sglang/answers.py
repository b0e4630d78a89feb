"""What an SGLang server answers to /generate, checked and typed: token ids, log-probabilities, and why it ended. No text.

In: the JSON object, and what was asked. Out: :class:`Piece`. Raises :class:`EngineError` that says which promise is broken; nothing
wrong goes on to the loop.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1mega.rl.engine.contract import RoutingRefused
from r1mega.rl.engine.sglang.client import EngineError, Server

if TYPE_CHECKING:
    import torch


class RoutingError(EngineError, RoutingRefused):
    """An answer whose record of experts is not what was asked for, and whose response may be whole."""


WAY_OUT = "serve with an SGLang that r1mega doctor engine=sglang engine.url=URL finds whole"


@dataclass(frozen=True)
class Routing:
    """What routed experts must look like. ``layers``: all, dense ones too; ``top_k``; ``num_experts``."""

    layers: int
    top_k: int
    num_experts: int


@dataclass(frozen=True)
class Piece:
    """A part of a response, sampled under one version of the weights: no request spans an update.

    ``reason``: "stop", "length" or "abort" (by us: the rest is asked for again). ``label``: weight_version, as the server says it.
    ``routed_experts``: int16 [positions, layers, top_k] from the position that was asked for on.
    """

    token_ids: list[int]
    logprobs: list[float]
    reason: str
    label: str = ""
    routed_experts: torch.Tensor | None = None
    sampling_mask: list[list[int]] | None = None


def read(
    server: Server,
    answer: dict[str, Any],
    *,
    prompt_size: int,
    limit: int,
    eos_id: int,
    routing: Routing | None = None,
    routed_from: int = 0,
    masked: bool = False,
) -> Piece:
    """The piece that an answer holds.

    ``prompt_size``: tokens that were sent; ``limit``: the most that may come; ``routed_from``: first position whose experts were
    asked for; ``masked``: the kept tokens were asked for, and the log-probabilities are theirs.
    """

    def refuse(rule: str, got: Any, kind: type[EngineError] = EngineError) -> EngineError:
        return kind(server.url, "/generate", 200, f"{rule}; it gave {got}", WAY_OUT)

    about = answer.get("meta_info")
    if not isinstance(about, dict) or not isinstance(about.get("finish_reason"), dict):
        raise refuse("an answer has meta_info with a finish_reason", str(answer)[:200])
    finish = about["finish_reason"]
    reason = finish.get("type")
    if reason == "abort" and finish.get("status_code"):
        raise EngineError(server.url, "/generate", int(finish["status_code"]), str(finish.get("message")))
    if reason not in ("stop", "length", "abort"):
        raise refuse("a response ends by stop, length or abort", repr(reason))
    token_ids, triples = answer.get("output_ids"), about.get("output_token_logprobs")
    if reason == "abort" and not triples:
        token_ids, triples = [], []  # it was in the queue: older prompts' fields are absent
    if not isinstance(token_ids, list) or not isinstance(triples, list):
        raise refuse("output_ids and output_token_logprobs are lists", f"{type(token_ids).__name__}, {type(triples).__name__}")
    if len(triples) != len(token_ids):
        raise refuse("each token has its log-probability", f"{len(token_ids)} tokens and {len(triples)} log-probabilities")
    for place, (token, triple) in enumerate(zip(token_ids, triples, strict=True)):
        if triple[1] != token:
            raise refuse("log-probabilities are those of the tokens", f"token {token} and the one of {triple[1]} at {place}")
    logprobs = [triple[0] for triple in triples]
    if masked and token_ids:
        logprobs = about.get("output_token_sampling_logprobs")
        if not isinstance(logprobs, list) or len(logprobs) != len(token_ids):
            raise refuse("each token has a renormalised log-probability", "none, or another number of them")
    for place, value in enumerate(logprobs):
        if not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
            raise refuse("log-probabilities are finite and at most 0", f"{value} at {place}: the weights or the sampler are broken")
    if len(token_ids) > limit:
        raise refuse(f"at most {limit} tokens", f"{len(token_ids)}")
    if reason == "length" and len(token_ids) != limit:
        raise refuse(f"length means {limit} tokens", f"{len(token_ids)}; the server's context is shorter than prompt and response")
    if reason == "stop" and (not token_ids or token_ids[-1] != eos_id):
        last = token_ids[-1] if token_ids else "nothing"
        raise refuse(f"stop means the end of sequence {eos_id}", f"{last}; the server's config.json has another eos_token_id")
    if eos_id in token_ids[:-1]:
        raise refuse(f"a response ends at the end of sequence {eos_id}", f"more behind it, at {token_ids.index(eos_id)}")
    if token_ids and token_ids[-1] == eos_id:
        reason = "stop"  # SGLang says length, or abort, where that came in the same step
    if about.get("prompt_tokens") not in (None, prompt_size):
        raise refuse(f"it read {prompt_size} tokens", f"prompt_tokens {about['prompt_tokens']}: they were not taken as they are")
    experts = None
    if routing is not None and token_ids:
        experts = _experts(about.get("routed_experts"), prompt_size + len(token_ids) - 1 - routed_from, routing, refuse)
    mask = about.get("output_token_sampling_mask") if masked else None
    if masked and token_ids and (mask is None or len(mask) != len(token_ids)):
        raise refuse("each token has a sampling mask", "none, or another number of them")
    return Piece(token_ids, logprobs, reason, str(about.get("weight_version") or ""), experts, mask)


def _experts(text: Any, rows: int, routing: Routing, refuse) -> torch.Tensor:
    import torch

    wanted = rows * routing.layers * routing.top_k
    if not isinstance(text, str):
        told = f"{type(text).__name__}; start it with enable_return_routed_experts"
        raise refuse("routed experts come with each response", told, RoutingError)
    data = base64.b64decode(text)
    if len(data) != wanted * 4:
        rule = f"routed experts are int32 {[rows, routing.layers, routing.top_k]}"
        raise refuse(rule, f"{len(data)} bytes for {wanted * 4}", RoutingError)
    experts = torch.frombuffer(bytearray(data), dtype=torch.int32).view(rows, routing.layers, routing.top_k)
    low, high = (int(experts.min()), int(experts.max())) if wanted else (0, 0)
    if low < -1 or high >= routing.num_experts:
        raise refuse(f"experts are numbered below {routing.num_experts}", f"{low} to {high}", RoutingError)
    return experts.to(torch.int16)
