"""Every dispatcher and every schedule on one rank, whose groups are all of one: on the CPU, and the same on a GPU."""

from __future__ import annotations

import pytest

from r1mega import registry
from r1mega.mesh import close_mesh
from r1mega.testing.parity import Case, check


def cases() -> list[Case]:
    """All registered choices but DeepEP, which refuses one rank."""
    schedules = [Case(name, pipeline=choice()) for name, choice in sorted(registry.choices("pipeline").items())]
    dispatchers = sorted(registry.choices("dispatcher").items())
    return schedules + [Case(name, dispatcher=choice()) for name, choice in dispatchers if name != "deepep"]


def names() -> set[str]:
    return {case.name for case in cases()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_choice_on_one_rank(device: str) -> None:
    close_mesh()
    assert {"none", "1f1b", "interleaved", "zb1p", "dualpipev", "local", "allgather", "alltoall"} <= names()
    check(cases(), 1, device=device)
