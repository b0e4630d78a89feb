"""The proof where a server reports no hashes: log-probabilities of fixed prompts, the engine's against the trainer's own.

It finds what moves logits beyond ``push.probe_tolerance``: a missing layer, swapped matrices, stale weights of a large step. It
does not find one flipped bit, and names no tensor.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from r1mega.config.errors import UserError
from r1mega.rl.push.contract import Score

if TYPE_CHECKING:
    from r1mega.rl.engine.sglang.client import Server

PROMPTS, LENGTH = 4, 24


class Probe:
    """``prompts``: of random token ids, the same every time: what servers have cached of the old weights is gone by then."""

    name = "probe"

    def __init__(self, score: Score, vocab_size: int, tolerance: float, timeout_seconds: float):
        self.score, self.tolerance, self.timeout = score, tolerance, timeout_seconds
        draw = random.Random(0)
        self.prompts = [[draw.randrange(vocab_size) for _ in range(LENGTH)] for _ in range(PROMPTS)]

    def check(self, servers: list[Server]) -> None:
        """Raise UserError that names the server whose log-probabilities are not the trainer's."""
        expected = self.score(self.prompts)
        for server in servers:
            worst = self._worst(server, expected)
            if not worst <= self.tolerance:  # NaN is a fault too
                raise UserError(
                    f"push.proof: {server.url} gives the trainer's log-probabilities within push.probe_tolerance "
                    f"{self.tolerance:g}; got a difference of {worst:.4g}; push again, or use push.proof=checksum"
                )

    def _worst(self, server: Server, expected: list[list[float]]) -> float:
        worst = 0.0
        for prompt, own in zip(self.prompts, expected, strict=True):
            body = {
                "input_ids": prompt,
                "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            answer = server.post("/generate", body, self.timeout)
            theirs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
            if len(theirs) != len(own):
                raise UserError(
                    f"push.proof: {server.url} gives a log-probability a token; got {len(theirs)} for {len(own)}; see its log"
                )
            gaps = [abs(here - there) if there is not None else math.nan for here, there in zip(own, theirs, strict=True)]
            worst = next((gap for gap in gaps if math.isnan(gap)), max(worst, *gaps))
            if math.isnan(worst):
                return worst
        return worst
