"""RL over ranks that share a model or a sequence: an update from given rows is one rank's, and they agree on the rollout."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.config.run import ParallelConfig
from r1mega.mesh import close_mesh
from r1mega.rl.batch import RolloutRow, microbatches
from r1mega.rl.loop import turn
from r1mega.rl.loss import GspoLoss
from r1mega.rl.run import Place, Run
from r1mega.rl.setup import open_run_mesh
from r1mega.rl.types import Completion
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint
from r1mega.train.gathering import whole_tensors
from r1mega.train.policy import Policy
from tests.rl.test_loop import Digits, config, place, same  # noqa: F401  place is a fixture
from tests.train.cases import MODEL, OPTIM, lines, one_rank

pytestmark = pytest.mark.slow  # starts two ranks with engines for half a minute

TOLERANCE = 1e-5
LAYOUTS = {
    "allgather": {"context": 2},
    "ring": {"context": 2, "context_exchange": "ring"},
    "tensor": {"tensor": 2},
    "tensor and expert": {"tensor": 2, "expert": 2},
    "pipeline": {"pipeline": 2},
}
BALANCE_OFF = {"expert_bias_update_rate": 0.0, "seq_aux_loss_coef": 0.0}
"""As configs/rl.yaml: the balance would count the padding, of which context ranks want more."""


OF_SEQUENCES = GspoLoss(
    clip_low=0.05, clip_high=0.05, kl_coef=0.001, correction="truncate", correction_level="sequence", correction_veto=1e-3
)
"""A loss whose ratio, weight and veto are sums over whole rows."""


def rows(equal: bool) -> list[RolloutRow]:
    """Eight responses of chance, of many lengths, or all of thirteen tokens with their prompts."""
    draw = torch.Generator().manual_seed(7)
    made = []
    for number in range(8):
        prompt, response = (5, 8) if equal else (3 + number % 3, 1 + number)
        ids = torch.randint(20, MODEL.vocab_size, (prompt + response,), generator=draw).tolist()
        completion = Completion(ids[prompt:], [-5.0] * response, "length")
        made.append(RolloutRow(ids[:prompt], completion, advantage=float(torch.randn((), generator=draw))))
    return made


def opened(place: Path, out: Path, model: dict[str, Any], stack: ExitStack, loss: Any = None, **degrees: Any) -> Run:  # noqa: F811
    settings = config(place, out, micro_batch_size=3)
    settings.model, settings.parallel = model, ParallelConfig(**degrees)
    settings.policy_loss = loss or settings.policy_loss
    run = Run(settings, open_run_mesh(settings), checkpoint.resolve(place / "seed"), Digits(), stack)
    stack.enter_context(run.saver)
    return run


def updated(place: Path, out: Path, **degrees: Any) -> list[dict[str, Any]]:  # noqa: F811
    """Two updates on given rows, thrice: without the balance on rows of many lengths, with it on equal rows, with sequences' ratios."""
    found = []
    cases = ((BALANCE_OFF, False, None), ({"seq_aux_loss_coef": 0.05}, True, None), (BALANCE_OFF, False, OF_SEQUENCES))
    for number, (model, equal, loss) in enumerate(cases):
        with ExitStack() as stack:
            run = opened(place, out / str(number), model, stack, loss, **degrees)
            batch = rows(equal)
            run.learner.score(batch)
            before = [(row.old, row.ref) for row in batch]
            results = run.learner.train(batch, 0)
            run.learner.score(batch)
            numbers = [(result.loss, result.grad_norm, result.stats, result.aux_loss) for result in results]
            found.append(
                {"before": before, "after": [(row.old, row.ref) for row in batch], "numbers": numbers, "weights": whole(run)}
            )
    return found


def rolled_out(place: Path, out: Path, **degrees: Any) -> dict[str, Any]:  # noqa: F811
    """A whole loop: what was drawn, how much of it here, the weights at the end."""
    with ExitStack() as stack:
        run = opened(place, out, BALANCE_OFF, stack, **degrees)
        drawn, shares = [], []

        def counted(prompts, *args):
            shares.append(len(prompts))
            return true(prompts, *args)

        take, value = run.take, run.value
        if run.engine is not None:
            true, run.engine.generate = run.engine.generate, counted

        def kept():
            made = take()
            drawn.append([sample.completion for sample in made.samples])
            return made

        def valued(made):
            found = value(made)
            drawn.append([row.advantage for row in found[0]])
            return found

        run.take, run.value = kept, valued
        run.push()
        for _ in range(2):
            turn(run)
        run.finish()
        with run.policy.as_reference():
            reference = whole(run)
        return {"drawn": drawn, "shares": shares, "weights": whole(run), "reference": reference}


def whole(run: Run) -> dict[str, torch.Tensor]:
    """All weights, whole on every rank."""
    return {name: tensor.clone() for name, tensor in whole_tensors(run.policy.trainee, everywhere=True)}


def two_ranks(place: Path, out: Path) -> dict[str, Any]:  # noqa: F811
    """Everything that two ranks do."""
    found: dict[str, Any] = {}
    for name, degrees in LAYOUTS.items():
        found[name] = updated(place, out / name, **degrees)
        close_mesh()
    found["loop"] = rolled_out(place, out / "loop", context=2)
    close_mesh()
    for axis in ("tensor", "expert", "pipeline"):
        found[f"{axis} loop"] = rolled_out(place, out / axis, **{axis: 2})
        close_mesh()
    return found


@pytest.fixture(scope="module")
def one(place: Path) -> list[dict[str, Any]]:  # noqa: F811
    close_mesh()
    found = updated(place, place / "one")
    close_mesh()
    return found


@pytest.fixture(scope="module")
def two(place: Path) -> list[dict[str, Any]]:  # noqa: F811
    return run_ranks(two_ranks, 2, place, place / "context")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_are_those_of_one_rank(one, two, layout: str) -> None:
    for rank in two:
        for ours, theirs in zip(rank[layout], one, strict=True):
            for when in ("before", "after"):
                for mine, other in zip(ours[when], theirs[when], strict=True):
                    for got, want in zip(mine, other, strict=True):
                        assert got.shape == want.shape and len(got)
                        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
            for got, want in zip(ours["numbers"], theirs["numbers"], strict=True):
                assert got[0] == pytest.approx(want[0], abs=TOLERANCE) and got[1] == pytest.approx(want[1], abs=TOLERANCE)
                assert got[2] == pytest.approx(want[2], abs=1e-4) and got[2]["num_tokens"] == want[2]["num_tokens"] > 0
                assert got[3] == pytest.approx(want[3], abs=TOLERANCE)
            assert ours["weights"].keys() == theirs["weights"].keys()
            for name, tensor in ours["weights"].items():
                torch.testing.assert_close(
                    tensor, theirs["weights"][name], atol=TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
                )
        assert rank[layout][1]["numbers"][0][3] > 0, "the balance was on"
    for result in one[2]["numbers"]:
        assert 0 < result[2]["max_weight"] <= 2 and result[2]["weight_sum"] not in (0, result[2]["num_tokens"]), (
            "weights were at work"
        )
    moved = [(row[0] - row[1]).abs().max() for row in one[0]["after"]]
    assert max(moved) > 1e-3, "two updates moved the policy from its reference"


def test_ranks_share_the_generating_and_agree(two, place: Path) -> None:  # noqa: F811
    first, second = (rank["loop"] for rank in two)
    assert first["shares"] == second["shares"] == [4, 4], "half of 8 responses each, twice"
    assert first["drawn"] == second["drawn"] and len(first["drawn"]) == 4
    responses = first["drawn"][0]
    assert len(responses) == 8 and responses[:4] != responses[4:]
    assert same(first["weights"], second["weights"])
    told = lines(place / "context/loop")
    assert [line["rollout"] for line in told] == [1, 2] and all(line["rollout_diff_max"] < 1e-4 for line in told)


@pytest.mark.parametrize("axis", ["tensor", "expert", "pipeline"])
def test_ranks_that_hold_parts_agree_on_a_whole_run(two, place: Path, axis: str) -> None:  # noqa: F811
    first, second = (rank[f"{axis} loop"] for rank in two)
    if axis == "expert":
        assert first["shares"] == second["shares"] == [4, 4] and first["drawn"] != second["drawn"], "two data ranks"
    else:
        assert (first["shares"], second["shares"]) == ([8, 8], []), "the first generates for both"
        assert first["drawn"] == second["drawn"]
    assert same(first["weights"], second["weights"])
    told = lines(place / "context" / axis)
    assert [line["rollout"] for line in told] == [1, 2] and all(line["rollout_diff_max"] < 1e-4 for line in told)
    assert all(line["push_proof"] == "checksum" for line in told)


@pytest.mark.parametrize("axis", ["tensor", "expert", "pipeline"])
def test_the_reference_comes_back_under_another_layout(two, place: Path, axis: str) -> None:  # noqa: F811
    close_mesh()
    policy = Policy(MODEL, OPTIM, one_rank(), "fp32")
    policy.copy_to_reference()  # who has one gets the checkpoint's
    policy.load(checkpoint.resolve(place / "context" / axis), weights_only=False)
    held = two[0][f"{axis} loop"]
    assert same(named(policy), held["weights"]) and not same(held["weights"], held["reference"])
    with policy.as_reference():
        assert same(named(policy), held["reference"])


def named(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.trainee.named_tensors()}


def test_places_share_the_groups_whatever_the_number_of_ranks() -> None:
    from types import SimpleNamespace

    def mesh(data, context, tensor):
        axes = {
            name: SimpleNamespace(rank=rank, size=size) for name, (rank, size) in {"context": context, "tensor": tensor}.items()
        }
        axes["pipeline"] = SimpleNamespace(rank=0, size=1)
        return SimpleNamespace(axes=axes, data_rank=data[0], data_size=data[1])

    for data, context, tensor, groups in ((1, 1, 1, 4), (2, 2, 1, 4), (2, 3, 2, 4), (1, 2, 2, 6)):
        places = [
            Place.of(mesh((d, data), (c, context), (t, tensor)), groups)
            for d in range(data)
            for c in range(context)
            for t in range(tensor)
        ]
        working = [each for each in places if each.generates]
        assert sorted(each.number for each in working) == list(range(working[0].count)), "each number once"
        assert sum(each.share for each in working) == groups and sum(each.writes for each in places) == data


def test_rows_are_padded_to_what_the_layout_cuts() -> None:
    from r1mega.model.context import ContextPart

    row = RolloutRow([1, 2, 3], Completion([4, 5, 6], [-1.0] * 3, "stop"), old=torch.tensor([-0.1, -0.2, -0.3]))
    parts = [ContextPart(rank, 2, object()) for rank in range(2)]
    early, late = (microbatches([row], 1, 9, torch.device("cpu"), part, 8)[0] for part in parts)
    assert early.tokens_BS.tolist() == [[1, 2, 9, 9]] and early.targets_BS.tolist() == [[2, 3, 9, 9]]
    assert late.tokens_BS.tolist() == [[3, 4, 5, 6]] and late.targets_BS.tolist() == [[4, 5, 6, 9]]
    assert late.mask_BS.tolist() == [[True, True, True, False]] and not early.mask_BS.any()
    torch.testing.assert_close(late.old_BS, torch.tensor([[-0.1, -0.2, -0.3, 0]]))
    assert early.lengths_B.tolist() == late.lengths_B.tolist() == [3] and early.whole_mask_BS.shape == (1, 8)
