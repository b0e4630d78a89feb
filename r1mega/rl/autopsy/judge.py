"""The independent judge: transformers' DeepseekV3 in fp32, with the weights of the rollout, or with some of them changed.

In: rows of token ids. Out: log-probabilities of the response tokens, fp32 on the CPU; which experts each token went through; what
any module made. Counts its forward passes, so that a search can be bounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from r1mega.rl.autopsy.evidence import Row
from r1mega.rl.engine import EngineRuntime, LocalEngine
from r1mega.rl.engine import weights as places

PASS_TOKENS = 8192
"""Of one forward pass, padding included."""


class Judge:
    """``model``: transformers' ``DeepseekV3ForCausalLM``; ``passes``: forward passes of a batch of rows made so far."""

    def __init__(self, hf_config: dict[str, Any], weights: Mapping[str, torch.Tensor], device: str, temperature: float):
        runtime = EngineRuntime(hf_config=hf_config, device=device, dtype="float32")
        self.model = LocalEngine(dtype="float32").build(runtime).model
        places.load(self.model, ((name, tensor.to(device)) for name, tensor in weights.items()))
        self.places = places.destinations(self.model)
        self.device, self.temperature, self.passes = torch.device(device), temperature, 0

    def tensor(self, name: str) -> torch.Tensor:
        """The published tensor as the judge has it now, fp32: its memory."""
        return self.places[name]

    @contextlib.contextmanager
    def edited(self, changes: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, these published tensors are others; names that the judge does not have are passed over."""
        changes = {name: value for name, value in changes.items() if name in self.places}
        before = {name: self.places[name].clone() for name in changes}
        try:
            for name, value in changes.items():
                self.places[name].copy_(value)
            yield
        finally:
            for name, value in before.items():
                self.places[name].copy_(value)

    @contextlib.contextmanager
    def hooked(self, hooks: Mapping[str, Any]) -> Iterator[None]:
        """Inside, ``hooks[path](module, inputs, output)`` is called after the module at ``path``."""
        modules = dict(self.model.named_modules())
        handles = [modules[path].register_forward_hook(hook) for path, hook in hooks.items() if path in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def logits(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        """Of each row in order, fp32 ``[response, V]``: what its response tokens were predicted by."""
        for batch in _batches(rows):
            yield from self._logits(batch)

    def _logits(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        self.passes += 1
        longest = max(len(row.prompt) + len(row.tokens) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)  # a causal model's tokens never see the padding behind them
        for idx, row in enumerate(rows):
            tokens[idx, : len(row.prompt) + len(row.tokens)] = torch.tensor(row.prompt + row.tokens)
        hidden_BSD = self.model.model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        for hidden_SD, row in zip(hidden_BSD, rows, strict=True):
            yield self.model.lm_head(hidden_SD[len(row.prompt) - 1 : len(row.prompt) + len(row.tokens) - 1]).float()

    def score(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Log-probabilities of the response tokens at the sampling temperature, over their supports where rows have them."""
        return [logprobs(logits, row, self.temperature).cpu() for logits, row in zip(self.logits(rows), rows, strict=True)]

    def score_with(self, changes: Mapping[str, torch.Tensor], rows: Sequence[Row]) -> list[torch.Tensor]:
        """:meth:`score` with other tensors."""
        with self.edited(changes):
            return self.score(rows)

    def routing(self, row: Row) -> dict[int, torch.Tensor]:
        """Layer to the experts of each token but the last, int64 ``[S - 1, K]``, in no order."""
        found: dict[int, torch.Tensor] = {}

        def keep(layer: int):
            def hook(module, inputs, output) -> None:
                found[layer] = output[2].view(-1, output[2].shape[-1])[:-1].cpu()

            return hook

        paths = [path for path in dict(self.model.named_modules()) if path.endswith(".mlp.gate")]
        with self.hooked({path: keep(int(path.split(".")[2])) for path in paths}):
            list(self.logits([row]))
        return found


def logprobs(logits_TV: torch.Tensor, row: Row, temperature: float, *, with_support: bool = True) -> torch.Tensor:
    """Of the row's tokens in softmax(logits / temperature), fp32 ``[T]``, over the support that each was drawn from."""
    scaled = logits_TV / temperature
    if with_support and row.support:
        kept = torch.ones_like(scaled, dtype=torch.bool)
        for step, ids in enumerate(row.support):
            if ids:
                kept[step] = False
                kept[step, torch.tensor(ids, device=kept.device)] = True
        scaled = scaled.masked_fill(~kept, float("-inf"))
    targets = torch.tensor(row.tokens, device=scaled.device)
    return torch.log_softmax(scaled, dim=-1).gather(1, targets[:, None])[:, 0]


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in order, cut where a padded batch would be too large."""
    batch: list[Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.prompt) + len(row.tokens))
        if batch and (len(batch) + 1) * longest > PASS_TOKENS:
            yield batch
            batch, longest = [], len(row.prompt) + len(row.tokens)
        batch.append(row)
    if batch:
        yield batch
