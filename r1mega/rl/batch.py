"""Responses to microbatches: prompt and response in one row, padded on the right, rows of like length together.

Positions are those of predictions: column s predicts token s + 1, so ``targets_BS`` is the row moved by one and ``mask_BS`` is true
where the target is a response token. Of several context ranks each holds its parts of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from r1mega.model.context import ALONE, ContextPart
from r1mega.model.replay import absent
from r1mega.rl.loss import LossInput
from r1mega.rl.types import Completion


@dataclass
class RolloutRow:
    """One response with all that training needs of it.

    ``old``, ``ref`` and ``teacher``: float32 log-probabilities of the response tokens by the trainer before the update, the
    reference and a teacher. ``counts``: false for a response that no loss shall see (``rl.overlong.mask_truncated``).
    ``own``: a bool a response token, false where an environment put it; None: the policy drew every one. ``replay``: the experts
    that the trainer itself chose when it scored the row, ``[size - 1, layers, top_k]``, in this rank's layers; with r2.
    """

    prompt: list[int]
    completion: Completion
    advantage: float = 0.0
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    counts: bool = True
    own: list[bool] | None = None
    replay: torch.Tensor | None = None

    @property
    def num_trained(self) -> int:
        """Response tokens that the policy drew."""
        return len(self.completion.token_ids) if self.own is None else sum(self.own)

    @property
    def size(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.completion.token_ids)


@dataclass
class RolloutBatch:
    """One microbatch: ``tokens_BS, targets_BS`` int64, ``mask_BS`` bool, the rest float32.

    ``mask_BS``: response tokens that the loss counts; ``rollout_BS``: the engine's log-probabilities; ``ref_BS``, ``teacher_BS``:
    None where a row has none; ``support_BSK``: int32, the tokens that each was drawn from, padded with -1, None where no row says.
    ``routing_BSLK``: experts that the tokens were read with, in every decoder layer, on the host, in the rows' records' dtype; what
    stands where there is none says :func:`r1mega.model.replay.absent`; None where no row has a record. It is larger than all the
    rest: ``B S L K`` bytes in uint8 (at most 255 experts), twice that in int16.
    ``[B, S]`` tensors hold the parts ``part`` of the rows, but ``whole_mask_BS``, all response tokens;
    ``lengths_B``: counted response tokens of the whole rows.
    """

    rows: list[RolloutRow]
    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    mask_BS: torch.Tensor
    old_BS: torch.Tensor
    rollout_BS: torch.Tensor
    ref_BS: torch.Tensor | None
    teacher_BS: torch.Tensor | None
    advantage_B: torch.Tensor
    lengths_B: torch.Tensor
    whole_mask_BS: torch.Tensor
    part: ContextPart = ALONE
    support_BSK: torch.Tensor | None = None
    routing_BSLK: torch.Tensor | None = None

    def split(self, values_BS: torch.Tensor) -> list[torch.Tensor]:
        """Values at the response tokens, a tensor a row, those of other context ranks' parts included."""
        return [row_S[mask_S] for row_S, mask_S in zip(self.part.gather(values_BS), self.whole_mask_BS, strict=True)]

    def loss_input(self, logprobs_BS: torch.Tensor, num_sequences: float, num_tokens: float, max_tokens: int) -> LossInput:
        """What a policy loss is given; the sizes are the minibatch's, see :class:`r1mega.rl.loss.inputs.LossInput`."""
        return LossInput(
            logprobs_BS,
            self.old_BS,
            self.advantage_B,
            self.mask_BS,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            ref_BS=self.ref_BS,
            rollout_BS=self.rollout_BS,
            teacher_BS=self.teacher_BS,
            lengths_B=self.lengths_B,
            max_tokens=max_tokens,
            over_sequence=self.part.sum,
        )


Record = Callable[[RolloutRow], "torch.Tensor | None"]
"""A row to its record of experts, ``[size - 1 or fewer, layers, top_k]``."""


def microbatches(
    rows: Sequence[RolloutRow],
    size: int,
    pad_id: int,
    device: torch.device,
    part: ContextPart = ALONE,
    multiple: int = 1,
    record: Record | None = None,
) -> list[RolloutBatch]:
    """Rows sorted by length and cut into microbatches of ``size``, ``part`` of each row in them.

    ``multiple``: what divides the whole rows' width; they are padded up to it (:attr:`r1mega.train.policy.Policy.row_multiple`).
    ``record``: which experts go with the rows; None: none.
    """
    ordered = sorted(rows, key=lambda row: row.size)
    starts = range(0, len(ordered), size)
    return [_batch(ordered[start : start + size], pad_id, device, part, multiple, record) for start in starts]


def _batch(
    rows: list[RolloutRow], pad_id: int, device: torch.device, part: ContextPart, multiple: int, record: Record | None
) -> RolloutBatch:
    longest = max(row.size for row in rows) - 1
    width = -(-longest // multiple) * multiple + 1
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask, counted = torch.zeros(2, len(rows), width - 1, dtype=torch.bool).unbind(0)
    old, rollout, ref, teacher = torch.zeros(4, len(rows), width - 1).unbind(0)
    for idx, row in enumerate(rows):
        tokens[idx, : row.size] = torch.tensor(row.prompt + row.completion.token_ids)
        place = slice(len(row.prompt) - 1, row.size - 1)
        mask[idx, place] = True
        counted[idx, place] = row.counts if row.own is None else torch.tensor(row.own) & row.counts
        rollout[idx, place] = torch.tensor(row.completion.logprobs, dtype=torch.float32)
        for values, held in ((old, row.old), (ref, row.ref), (teacher, row.teacher)):
            if held is not None:
                values[idx, place] = held.cpu()
    advantage = torch.tensor([row.advantage for row in rows], dtype=torch.float32)

    def own(values_BS: torch.Tensor) -> torch.Tensor:
        return part.cut(values_BS).to(device)

    return RolloutBatch(
        rows,
        tokens_BS=own(tokens[:, :-1].contiguous()),
        targets_BS=own(tokens[:, 1:].contiguous()),
        mask_BS=own(counted),
        old_BS=own(old),
        rollout_BS=own(rollout),
        ref_BS=None if any(row.ref is None for row in rows) else own(ref),
        teacher_BS=None if any(row.teacher is None for row in rows) else own(teacher),
        advantage_B=advantage.to(device),
        lengths_B=counted.sum(dim=1).to(device),
        whole_mask_BS=mask.to(device),
        part=part,
        support_BSK=None if (support := _support(rows, width - 1)) is None else own(support),
        routing_BSLK=None if record is None else _routing([record(row) for row in rows], width - 1, part),
    )


def _routing(records: list[torch.Tensor | None], width: int, part: ContextPart) -> torch.Tensor | None:
    """The records of the rows, one under the other; a token's are in the column where it is read."""
    first = next((held for held in records if held is not None), None)
    if first is None:
        return None
    whole = first.new_full((len(records), width, *first.shape[1:]), absent(first.dtype))
    for place, held in enumerate(records):
        if held is not None:
            whole[place, : len(held)] = held
    return part.cut(whole)


def _support(rows: list[RolloutRow], width: int) -> torch.Tensor | None:
    """The tokens that each response token was drawn from, int32 ``[B, S, K]``, -1 behind the last one and where nobody said."""
    sizes = [len(ids) for row in rows for ids in row.completion.sampling_mask or ()]
    if not sizes:
        return None
    support = torch.full((len(rows), width, max(sizes)), -1, dtype=torch.int32)
    for idx, row in enumerate(rows):
        for step, ids in enumerate(row.completion.sampling_mask or ()):
            support[idx, len(row.prompt) - 1 + step, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return support
