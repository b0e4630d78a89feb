"""Log-probabilities over the sampled support (keep-sampling-mask), and the fp32 head, against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from r1mega.config.run import PrecisionConfig
from r1mega.mesh import close_mesh
from r1mega.model.outputs import Hidden
from r1mega.rl.batch import RolloutRow, microbatches
from r1mega.rl.logprobs import token_logprobs
from r1mega.rl.loop import rl
from r1mega.rl.types import Completion
from tests.rl.test_loop import config, digits, place  # noqa: F401  fixtures
from tests.train.cases import lines

SUPPORT = torch.tensor(
    [
        [[3, 1, -1, -1], [0, 1, 2, 3], [-1, -1, -1, -1], [10, -1, -1, -1]],
        [[7, 3, 5, -1], [4, 4, 4, 4], [2, 9, -1, 0], [-1, 6, 1, -1]],
    ],
    dtype=torch.int32,
)
TARGETS = torch.tensor([[1, 3, 8, 10], [7, 4, 9, 6]])


def naive(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A position at a time: the softmax of the kept logits alone."""
    logprobs, entropies = [], []
    for row, targets, kept in zip(logits, TARGETS, SUPPORT, strict=True):
        for z, target, ids in zip(row, targets, kept, strict=True):
            ids = sorted({idx for idx in ids.tolist() if idx >= 0}) or list(range(len(z)))
            logp = torch.log_softmax(z[ids] / temperature, 0)
            logprobs.append(logp[ids.index(target.item())])
            entropies.append(-(logp.exp() * logp).sum())
    return torch.stack(logprobs).view(TARGETS.shape), torch.stack(entropies).view(TARGETS.shape)


@pytest.mark.parametrize("block", [13, 1 << 22])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_distribution_is_that_of_the_support(monkeypatch, temperature, block):
    monkeypatch.setattr("r1mega.rl.logprobs.BLOCK_ELEMENTS", block)
    monkeypatch.setattr("r1mega.rl.logprobs.PRODUCT_ELEMENTS", 3 * block)
    torch.manual_seed(0)
    weights = torch.randn(2, 4)

    def graded(leaves, logprobs, entropy):
        for leaf in leaves:
            leaf.grad = None
        (logprobs * weights).sum().backward()
        return logprobs.detach(), entropy.detach(), [leaf.grad for leaf in leaves]

    logits = (torch.randn(2, 4, 11) * 3).requires_grad_()
    want = graded([logits], *naive(logits, temperature))
    got = graded([logits], *token_logprobs(logits, TARGETS, temperature, support_BSK=SUPPORT))
    torch.testing.assert_close(got, want)
    assert (got[0][1, 1], got[1][1, 1]) == (0, 0), "of one token alone"

    hidden, head = torch.randn(2, 4, 5).requires_grad_(), torch.randn(13, 5).requires_grad_()  # two rows are padding
    want = graded([hidden, head], *naive((hidden @ head.t())[..., :11], temperature))
    got = graded([hidden, head], *token_logprobs(Hidden(hidden, head, 11), TARGETS, temperature, support_BSK=SUPPORT))
    torch.testing.assert_close(got, want)


def test_a_target_outside_its_support_was_impossible():
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    logprobs, _ = token_logprobs(logits, torch.tensor([[0, 1]]), support_BSK=torch.tensor([[[1, 2], [1, 2]]]))
    assert logprobs[0].tolist() == [float("-inf"), pytest.approx(-0.6931472)]
    logprobs[0, 1].backward()
    assert logits.grad.isfinite().all() and not logits.grad[0, 0].any()


def test_masks_of_completions_reach_their_positions():
    masked = Completion([4, 5], [-0.5, 0.0], "stop", sampling_mask=[[4, 7, 9], [5]])
    rows = [RolloutRow([1, 2], masked), RolloutRow([1, 2, 3], Completion([6], [-1.0], "stop"))]
    (batch,) = microbatches(rows, 2, 0, torch.device("cpu"))
    own = batch.rows.index(rows[0])
    assert batch.support_BSK[own].tolist() == [[-1] * 3, [4, 7, 9], [5, -1, -1]]
    assert (batch.support_BSK[1 - own] == -1).all() and batch.support_BSK.dtype == torch.int32
    assert microbatches(rows[1:], 2, 0, torch.device("cpu"))[0].support_BSK is None


def test_what_a_head_in_fp32_is_for():
    """bf16 rounds logits to 8 bits; the products of bf16 operands summed in fp32 are the fp32 head's."""
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 6, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    targets = torch.randint(0, 100, (3, 6))
    want = torch.log_softmax(hidden.float() @ head.float().t(), -1).gather(2, targets[..., None]).squeeze(2)
    everything = torch.arange(100).expand(3, 6, 100)
    masked, _ = token_logprobs(Hidden(hidden, head, 100), targets, support_BSK=everything)
    torch.testing.assert_close(masked, want)
    whole, _ = token_logprobs(Hidden(hidden, head, 100), targets)
    rounded, _ = token_logprobs(hidden @ head.t(), targets)
    assert (whole - want).abs().max() < 1e-4 < 1e-2 < (rounded - want).abs().max()


def test_the_knob_gives_the_loop_an_fp32_head(place, digits, tmp_path):  # noqa: F811
    """In fp32 it changes the order of sums only; the loop then never sees logits."""
    settings = config(place, tmp_path / "run", rollouts=1)
    settings.precision = replace(PrecisionConfig(), fp32_head=True)
    seen = []

    def spied(output, *args, **kwargs):
        seen.append(type(output))
        return token_logprobs(output, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r1mega.rl.learner.token_logprobs", spied)
        rl(settings)
    close_mesh()
    (line,) = lines(tmp_path / "run")
    assert set(seen) == {Hidden} and line["rollout_diff_max"] < 1e-4 and line["grad_norm"] > 0
