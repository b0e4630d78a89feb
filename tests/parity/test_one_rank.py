"""Every dispatcher and every schedule on one rank, whose groups are all of one: on the CPU, and the same on a GPU."""

from __future__ import annotations

import pytest

from r1mega import registry
from r1mega.mesh import close_mesh
from r1mega.testing.parity import Case, check


def cases() -> list[Case]:
    """All of the package's own choices but DeepEP, which refuses one rank."""

    def own(kind: str):
        return [
            (name, choice) for name, choice in sorted(registry.choices(kind).items()) if choice.__module__.startswith("r1mega.")
        ]

    schedules = [Case(name, pipeline=choice()) for name, choice in own("pipeline")]
    return schedules + [Case(name, dispatcher=choice()) for name, choice in own("dispatcher") if name != "deepep"]


def names() -> set[str]:
    return {case.name for case in cases()}


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_choice_on_one_rank(device: str) -> None:
    close_mesh()
    assert {"none", "1f1b", "interleaved", "zb1p", "dualpipev", "local", "allgather", "alltoall"} <= names()
    check(cases(), 1, device=device)
