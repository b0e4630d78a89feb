"""Every registered dispatcher against the contract on 1, 2 and 4 ranks, the example's too; a wrong one is rejected; refusals."""

from __future__ import annotations

import datetime
import importlib.util
import re
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from r1mega import registry
from r1mega.config.errors import UserError
from r1mega.mesh import Axis
from r1mega.model.dispatch import AllGather, AllToAll, DeepEP, Dispatched, ExpertRanks, Local
from r1mega.model.dispatch.alltoall import AllToAllDispatcher
from r1mega.testing.dispatch_contract import ALONE, check_dispatcher, expert_axes
from r1mega.testing.ranks import run_ranks

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "custom_dispatcher" / "ring_dispatcher.py"
SPREAD = ("allgather", "alltoall")
"""The package's own that go over ranks on any machine."""


def example() -> types.ModuleType:
    name = "ring_dispatcher"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLE)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass(frozen=True)
class Dropping:
    """Wrong: the first row of each rank's answer is lost on the way back."""

    def build(self, ranks: ExpertRanks):
        class Drops(AllToAllDispatcher):
            def combine(self, rows_RD, route):
                keep = torch.ones(len(rows_RD), 1, dtype=rows_RD.dtype)
                keep[:1] = 0
                return super().combine(rows_RD * keep, route)

        return Drops(ranks)


@dataclass(frozen=True)
class Unscaled:
    """Wrong: the gradient of the probabilities is lost."""

    def build(self, ranks: ExpertRanks):
        class Cuts(AllToAllDispatcher):
            def dispatch(self, hidden_TD, probs_TE, routing_map_TE):
                return super().dispatch(hidden_TD, probs_TE.detach() + 0 * probs_TE, routing_map_TE)

        return Cuts(ranks)


@dataclass(frozen=True)
class Padding:
    """Wrong: an expert gets a row that nobody sent."""

    def build(self, ranks: ExpertRanks):
        class Pads(AllToAllDispatcher):
            def dispatch(self, *tokens):
                sent = super().dispatch(*tokens)
                counts = sent.tokens_per_expert.clone()
                counts[-1] += 1
                rows = torch.cat([sent.rows_RD, sent.rows_RD.new_zeros(1, sent.rows_RD.shape[1])])
                return Dispatched(rows, counts, torch.cat([sent.probs_R, sent.probs_R.new_zeros(1)]), sent.route)

            def combine(self, rows_RD, route):
                return super().combine(rows_RD[:-1], route)

        return Pads(ranks)


@dataclass(frozen=True)
class Forgetful:
    """Wrong: the way back is kept in the dispatcher, where the next microbatch overwrites it."""

    def build(self, ranks: ExpertRanks):
        class Keeps(AllToAllDispatcher):
            def dispatch(self, *tokens):
                sent = super().dispatch(*tokens)
                self.last = sent.route
                return replace(sent, route=None)

            def combine(self, rows_RD, route):
                return super().combine(rows_RD, self.last)

        return Keeps(ranks)


WRONG = {
    Dropping: "dispatcher Dropping, top 2: rank .*: output: equal to local's within 1e-11",
    Unscaled: "dispatcher Unscaled, top 2: rank .*: gradient of probs: equal to local's",
    Padding: "dispatcher Padding, top 2: rank .*: rows_RD: expert [0-9]+ gets the tokens that chose it",
    Forgetful: "dispatcher Forgetful, two microbatches at once: rank .*: output: equal to local's",
}


def on_four_ranks() -> dict[str, str]:
    """Every dispatcher in every layout of four ranks, and what the contract says of wrong ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    layouts = {sizes: expert_axes(*sizes) for sizes in ((2, 1), (4, 1), (1, 2), (2, 2), (1, 4))}
    for axes in layouts.values():
        for choice in (*(registry.lookup("dispatcher", name)() for name in SPREAD), example().Ring()):
            check_dispatcher(choice, *axes)
    for name in SPREAD:
        check_dispatcher(registry.lookup("dispatcher", name)(), *layouts[2, 2], dtype=torch.float32)
        check_dispatcher(registry.lookup("dispatcher", name)(), *layouts[2, 2], dtype=torch.bfloat16)
    said = {}
    for wrong in WRONG:
        try:
            check_dispatcher(wrong(), *layouts[2, 2])
        except AssertionError as error:
            said[wrong.__name__] = str(error)
    return said


@pytest.mark.slow
def test_every_dispatcher_keeps_the_contract_on_two_and_four_ranks_and_wrong_ones_are_rejected_on_all() -> None:
    assert {*SPREAD, "local", "deepep"} == {name for name in registry.choices("dispatcher") if name != "ring"}
    told = run_ranks(on_four_ranks, 4, timeout_seconds=240)
    for said in told:
        for wrong, message in WRONG.items():
            assert wrong.__name__ in said, f"{wrong.__name__} was not rejected"
            assert re.search(message, said[wrong.__name__]), said[wrong.__name__]


@pytest.mark.parametrize("name", ["local", *SPREAD])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_dispatcher_keeps_the_contract_alone(name, dtype) -> None:
    check_dispatcher(registry.lookup("dispatcher", name)(), dtype=dtype)


def test_the_example_keeps_the_contract_alone_and_is_short() -> None:
    check_dispatcher(example().Ring())
    assert len(EXAMPLE.read_text().splitlines()) < 150


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_dispatcher_is_rejected_alone(wrong) -> None:
    with pytest.raises(AssertionError, match=WRONG[wrong]):
        check_dispatcher(wrong())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["local", *SPREAD])
def test_every_dispatcher_keeps_the_contract_alone_on_a_gpu(name) -> None:
    check_dispatcher(registry.lookup("dispatcher", name)(), dtype=torch.float64, device="cuda")
    check_dispatcher(registry.lookup("dispatcher", name)(), dtype=torch.bfloat16, device="cuda")


TWO = Axis(0, 2, (0, 1), None)


@pytest.mark.parametrize(
    "choice, axes, message",
    [
        (
            Local(),
            (TWO, ALONE),
            "dispatcher: local needs all experts on each rank; got parallel.expert=2; use parallel.expert=1 or",
        ),
        (Local(), (ALONE, TWO), "dispatcher: local needs all experts on each rank; got parallel.expert_tensor=2; use"),
        (DeepEP(), (TWO, ALONE), "dispatcher: deepep needs Hopper GPUs; got device=cpu; use dispatcher=alltoall"),
    ],
)
def test_a_dispatcher_that_cannot_run_here_says_what_is_missing(choice, axes, message) -> None:
    with pytest.raises(UserError) as caught:
        choice.build(ExpertRanks(8, *axes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_deepep_says_which_of_capability_package_and_layout_is_missing(monkeypatch) -> None:
    from r1mega.model.dispatch import deepep

    capability = [8, 0]
    monkeypatch.setattr(deepep, "allocation_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: types.SimpleNamespace(get_device_capability=lambda d: capability)
    )

    def told(*axes) -> str:
        with pytest.raises(UserError) as caught:
            DeepEP().build(ExpertRanks(8, *axes))
        return str(caught.value)

    assert "capability 9.0 or above; got 8.0; use dispatcher=alltoall" in told(TWO, ALONE)
    capability[:] = [9, 0]
    assert "needs the package deep_ep; got none; install" in told(TWO, ALONE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "got parallel.expert=1; use parallel.expert=2" in told(ALONE, ALONE)
    assert "got parallel.expert_tensor=2; use parallel.expert_tensor=1" in told(TWO, TWO)


def test_one_process_of_all_dispatchers_gives_the_same_bits() -> None:
    """With the layer's experts in one place, the choice of a dispatcher changes nothing at all."""
    draw = torch.Generator().manual_seed(3)
    hidden, probs = torch.randn(9, 5, generator=draw), torch.rand(9, 8, generator=draw)
    chosen = torch.rand(9, 8, generator=draw) < 0.4
    results = []
    for choice in (Local(), AllToAll(), AllGather()):
        dispatcher = choice.build(ExpertRanks(8, ALONE, ALONE))
        sent = dispatcher.dispatch(hidden, probs, chosen)
        results.append((sent.rows_RD, sent.probs_R, dispatcher.combine(sent.rows_RD * sent.probs_R.unsqueeze(1), sent.route)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
