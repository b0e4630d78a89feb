"""What pipeline ranks really idle: recorded events of real steps, stretched by stage times, against the simulator."""

from __future__ import annotations

import pytest

from r1mega.mesh import close_mesh
from r1mega.registry import lookup
from r1mega.testing import parity
from r1mega.testing.parity import Case
from r1mega.testing.ranks import run_ranks

RANKS, MICROBATCHES = 4, 8
SECONDS = {"F": 0.3, "I": 0.3, "W": 0.3, "B": 0.6}
"""Added to the real work of a rank's whole share of the model, whose jitter on two cores it dwarfs; a schedule with two stages a rank has half of it in each."""


def record(names: list[str]) -> dict[str, tuple[list, float, float]]:
    """One rank's part: for each schedule, this rank's events of one step, after one step that warms up."""
    from r1mega.model.forward import token_losses
    from r1mega.train.fit import masked_sum

    found = {}
    for name in names:
        case = Case(
            name, {"pipeline": RANKS}, pipeline=lookup("pipeline", name)(), micro_batch_size=1, length=8, model={"num_layers": 8}
        )
        trainee = parity.build(case, "cpu")
        executor, chunks = trainee.executor, len(trainee.pipeline.placement[0])
        parts = parity.rows_of(case, 0, trainee.mesh.device.torch_device)
        for events in (None, []):
            trainee.mesh.barrier()
            executor.events = events
            executor.stretch = (lambda action, chunks=chunks: SECONDS[action.work] / chunks) if events is not None else None
            trainee.step(parts, token_losses, masked_sum, 1e-3, lambda loss, norm: "")
        found[name] = executor.events
        close_mesh()
    return found


@pytest.mark.slow
def test_zero_bubble_schedules_idle_as_simulated_and_less_than_1f1b() -> None:
    from r1mega.train.pipeline.simulate import mean_seconds, simulate
    from r1mega.train.pipeline.timeline import bubble_share

    names = ["1f1b", "zb1p", "dualpipev"]
    by_rank = run_ranks(record, RANKS, names, timeout_seconds=300)
    shares = {}
    for name in names:
        events = [found[name] for found in by_rank]
        pipeline = lookup("pipeline", name)().build(RANKS)
        simulated = simulate(pipeline, MICROBATCHES, mean_seconds(events)).bubble_share
        shares[name] = bubble_share(events)
        print(f"{name}: recorded {shares[name]:.3f}, simulated {simulated:.3f}")
        assert shares[name] == pytest.approx(simulated, rel=0.1)
    assert shares["zb1p"] < shares["1f1b"] and shares["dualpipev"] < shares["1f1b"]
