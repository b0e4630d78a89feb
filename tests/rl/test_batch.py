"""Rows to microbatches, by hand."""

from __future__ import annotations

import torch

from r1mega.rl.batch import RolloutRow, microbatches
from r1mega.rl.types import Completion

PAD = 9
LONG = RolloutRow(
    [1, 2, 3],
    Completion([4, 5], [-0.5, -0.25], "stop"),
    advantage=1.5,
    old=torch.tensor([-0.4, -0.2]),
    ref=torch.tensor([-1.0, -2.0]),
)
SHORT = RolloutRow([1], Completion([6], [-3.0], "length"), advantage=-0.5)
MIDDLE = RolloutRow([1, 2], Completion([7], [-1.5], "length"), advantage=0.25, old=torch.tensor([-1.0]))


def test_one_microbatch_by_hand() -> None:
    (batch,) = microbatches([LONG, SHORT], 2, PAD, torch.device("cpu"))
    assert batch.rows == [SHORT, LONG], "rows of like length together"
    assert batch.tokens_BS.tolist() == [[1, 6, 9, 9], [1, 2, 3, 4]]
    assert batch.targets_BS.tolist() == [[6, 9, 9, 9], [2, 3, 4, 5]]
    assert batch.mask_BS.tolist() == [[True, False, False, False], [False, False, True, True]]
    torch.testing.assert_close(batch.old_BS, torch.tensor([[0, 0, 0, 0], [0, 0, -0.4, -0.2]]))
    assert batch.ref_BS is None, "SHORT has no reference: zeros in its place would be log-probabilities of 0"
    (scored,) = microbatches([LONG], 2, PAD, torch.device("cpu"))
    assert scored.ref_BS.tolist() == [[0, 0, -1.0, -2.0]]
    assert batch.advantage_B.tolist() == [-0.5, 1.5]
    assert (batch.tokens_BS.dtype, batch.mask_BS.dtype, batch.old_BS.dtype, batch.advantage_B.dtype) == (
        torch.int64,
        torch.bool,
        torch.float32,
        torch.float32,
    )
    first, second = batch.split(torch.arange(8.0).view(2, 4))
    assert first.tolist() == [0.0] and second.tolist() == [6.0, 7.0]


def test_microbatches_are_as_wide_as_their_longest_row() -> None:
    batches = microbatches([LONG, SHORT, MIDDLE], 2, PAD, torch.device("cpu"))
    assert [batch.rows for batch in batches] == [[SHORT, MIDDLE], [LONG]]
    assert [tuple(batch.tokens_BS.shape) for batch in batches] == [(2, 2), (1, 4)]
    assert SHORT.size == 2 and MIDDLE.size == 3 and LONG.size == 5
