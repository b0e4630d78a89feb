"""Two trainer ranks and one server: a wrong expert is named on both, a walk that breaks off leaves nobody behind, a slow start is no stall."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.device import open_device
from r1mega.mesh import close_mesh, open_mesh
from r1mega.model.names import from_hf
from r1mega.rl.delivery import Delivery
from r1mega.rl.push import TensorPush
from r1mega.rl.together import patiently
from r1mega.rl.walk import walked
from r1mega.testing.ranks import run_ranks
from r1mega.train.policy import Policy
from tests.rl.push.cases import MODEL, weights
from tests.rl.push.stand_in import StandIn
from tests.train.cases import CPU

EXPERT = "model.layers.2.mlp.experts.9.down_proj.weight"
STALL_SECONDS = 6.0


class Engine:
    """What a delivery asks of an engine, over a server of this process."""

    sleeps = False

    def __init__(self, server: StandIn):
        self.server, self.servers, self.version = server, [server], -1

    def begin_push(self, urls) -> None:
        pass

    async def wait_for_all(self) -> None:
        """What has died answers again."""
        self.servers = [self.server]

    async def pause(self) -> None:
        pass

    resume = wake = pause


def one_rank_of_two(folder: Path) -> dict[str, str]:
    """Both ranks have half of the experts; the first one pushes. Returns what each push ended with."""
    mesh = open_mesh(open_device(CPU), ParallelConfig(expert=2), LaunchConfig(), 1)
    policy = Policy(MODEL, None, mesh, "fp32")
    server = StandIn(MODEL)
    engine = Engine(server) if mesh.is_first else None
    rollouts = SimpleNamespace(call=asyncio.run) if mesh.is_first else None
    learner = SimpleNamespace(mesh=mesh, policy=policy, score_prompts=None)
    config = policy.published_config(bos_id=0, eos_id=1, pad_id=2)
    with ExitStack() as stack:
        choice = TensorPush(bucket_bytes=300_000, proof="checksum")
        server.targets[0].load(weights(5, MODEL))  # as a server that starts has all parameters, of other numbers
        delivery = Delivery(choice, learner, engine, rollouts, config, folder, stack)
        said = {"whole": pushed(delivery, 1)}
        lost = {"times": 1}

        def without_one(pairs):
            is_it = EXPERT in dict(pairs) and lost["times"]
            lost["times"] -= is_it
            return [pair for pair in pairs if not (is_it and pair[0] == EXPERT)]

        for tensor in policy.trainee.named_tensors():
            tensor[1].mul_(1.5)
        server.before_load = without_one
        said["an expert is lost"] = pushed(delivery, 2)
        if engine:
            engine.servers = []
        said["again"] = pushed(delivery, 3)

    def twice(tensors) -> dict:
        next(iter(tensors))
        return {name: tensor.clone() for name, tensor in tensors}

    given = walked(policy, twice, everywhere=False)
    said["walked"] = str(sorted(from_hf(MODEL, given.items())) if given else given)
    everywhere = walked(policy, dict, everywhere=True)
    said["everywhere"] = str(sorted(from_hf(MODEL, everywhere.items())))
    close_mesh()
    return said


def pushed(delivery: Delivery, version: int) -> str:
    try:
        delivery.push(version)
    except UserError as error:
        return str(error)
    return "pushed"


def waits(rank_that_fails: int) -> tuple[str, float]:
    """The first rank works for longer than a stall may last; one rank's work fails. What is raised, and after how long."""
    launch = LaunchConfig(stall_timeout_seconds=STALL_SECONDS)
    mesh = open_mesh(open_device(CPU), ParallelConfig(), launch, 1)
    began = time.monotonic()

    def work() -> int:
        if mesh.is_first and rank_that_fails < 0:
            time.sleep(1.5 * STALL_SECONDS)
        if mesh.rank == rank_that_fails:
            raise UserError("the server does not start")
        return mesh.rank

    said = str(patiently(mesh, work)) if rank_that_fails < 0 else ""
    if rank_that_fails >= 0:
        with pytest.raises(UserError) as caught:
            patiently(mesh, work)
        said = str(caught.value)
    took = time.monotonic() - began
    close_mesh()
    return said, took


def both(folder: Path) -> tuple[dict[str, str], list[tuple[str, float]]]:
    """All cases in one start of two ranks."""
    return one_rank_of_two(folder), [waits(-1), waits(1)]


def test_two_ranks(tmp_path: Path) -> None:
    close_mesh()
    first, second = run_ranks(both, 2, tmp_path, timeout_seconds=300)
    for said, waited in (first, second):
        assert said["whole"] == "pushed" and said["again"] == "pushed"
        assert f"got wrong {EXPERT}:" in said["an expert is lost"], said
        assert waited[1][0] == "rank 1: the server does not start"
        assert waited[0][1] >= 1.5 * STALL_SECONDS
    assert [told[1][0][0] for told in (first, second)] == ["0", "1"]
    assert first[0]["walked"] == first[0]["everywhere"] == second[0]["everywhere"] and second[0]["walked"] == "None"
