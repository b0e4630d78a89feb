"""A response in pieces, interrupted by pauses and deaths of servers: how it is drawn, and under which weights each piece was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from r1mega.rl.engine.sglang import answers
from r1mega.rl.types import Completion


@dataclass
class Made:
    """A response as far as it is there."""

    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    experts: list[Any] = field(default_factory=list)
    mask: list[list[int]] | None = None

    def add(self, piece: answers.Piece, version: int) -> None:
        """Append a piece that was drawn under ``version``."""
        if not piece.token_ids:
            return
        start, end = len(self.token_ids), len(self.token_ids) + len(piece.token_ids)
        if self.spans and self.spans[-1][0] == version:
            start = self.spans.pop()[1]
        self.spans.append((version, start, end))
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        if piece.routed_experts is not None:
            self.experts.append(piece.routed_experts)
        if piece.sampling_mask is not None:
            self.mask = (self.mask or []) + piece.sampling_mask

    def completion(self, reason: str) -> Completion:
        """The whole. Pieces' routed experts follow one another: each was asked for from the last token of the one before on."""
        experts = None
        if self.experts:
            import torch

            experts = torch.cat(self.experts)
        return Completion(self.token_ids, self.logprobs, reason, tuple(self.spans), experts, self.mask)


def sampling_params(sampling: Any, limit: int, eos_id: int) -> dict[str, Any]:
    """SGLang's, every one said that a server could have another default for."""
    return {
        "max_new_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": getattr(sampling, "top_p", 1.0),
        "top_k": getattr(sampling, "top_k", 0) or -1,
        "min_p": getattr(sampling, "min_p", 0.0),
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop_token_ids": [eos_id],
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }
