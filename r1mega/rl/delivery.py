"""How a run's engine gets the trainer's weights: pause, push, proof, resume, on all ranks together; who has the device's memory.

A failure of one rank is told to all before anyone goes on, and after it nothing is sampled any more. A server that dies while it is
pushed to is waited for, and everything is pushed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.rl.engine import Engine
from r1mega.rl.learner import Learner
from r1mega.rl.push import PushReport, PushRuntime
from r1mega.rl.rollouts import Rollouts
from r1mega.rl.together import patiently, together, told
from r1mega.rl.walk import walked

ATTEMPTS = 3
"""Times that a push is begun where servers die under it."""


class Delivery:
    """``engine``, ``rollouts``: this rank's, None where it does not generate; ``choice``: of kind ``push``; ``stack``: gets what is
    to be closed. ``pusher``: of a rank that sends: the first, or each with an engine in its process; ``report``: of its last
    push."""

    def __init__(
        self,
        choice: Any,
        learner: Learner,
        engine: Engine | None,
        rollouts: Rollouts | None,
        hf_config: dict[str, Any],
        folder: Path,
        stack: ExitStack,
    ):
        self.mesh, self.policy, self.engine, self.rollouts = learner.mesh, learner.policy, engine, rollouts
        self._is_local = self.mesh.broadcast_object(hasattr(engine, "load_weights"))
        self.pusher, self.report = None, None
        if engine is not None and (self.mesh.is_first or self._is_local):
            runtime = PushRuntime(
                engine,
                hf_config,
                servers=lambda: getattr(engine, "servers", ()),
                device=str(self.mesh.device.torch_device),
                folder=folder / "pushes",
                # a probe is scored by this rank alone: it must hold the whole model
                score=learner.score_prompts if self._holds_all else None,
            )
            self.pusher = choice.build(runtime)
            stack.callback(self.pusher.close)

    @property
    def _holds_all(self) -> bool:
        axes = self.mesh.axes
        return all(axes[axis].size == 1 for axis in ("tensor", "pipeline", "context", "expert", "expert_tensor"))

    @contextmanager
    def asleep(self, *, in_step: bool) -> Iterator[None]:
        """Inside, the engine has given its memory back, where it can and nothing runs ahead (``in_step``)."""
        is_sleeping = self.mesh.broadcast_object(in_step and self.mesh.is_first and self.engine.sleeps)
        if is_sleeping:
            self._on_first(lambda: self.engine.sleep(), meets=patiently)
        yield
        if is_sleeping:
            self.mesh.device.release_unused()  # each rank's, before the servers on its device take theirs again
            self.mesh.barrier()
            self._on_first(lambda: self.engine.wake_weights())

    def push(self, version: int) -> None:
        """Bring the weights of ``version`` and have them proven. Called by all ranks."""
        if self.rollouts is None:
            together(self.mesh, lambda: None)
        else:
            together(self.mesh, lambda: self.rollouts.call(self.engine.pause()))
        for attempt in range(ATTEMPTS):
            urls = self._urls()
            if not urls and not self._is_local:  # all have died, asleep perhaps
                self._on_first(lambda: self.engine.wait_for_all(), meets=patiently)
                urls = self._urls()
            if urls and self.engine is not None:
                self.engine.begin_push(urls)
            failure, is_lost = self._send(version)
            if not self.mesh.broadcast_object(is_lost and attempt + 1 < ATTEMPTS):
                break
            self._on_first(lambda: self.engine.wait_for_all(), meets=patiently)
        self.mesh.agree(failure)
        self._on_first(lambda: self.engine.wake())
        if self.rollouts is not None:
            self.engine.version = version
            self.rollouts.call(self.engine.resume())

    def _urls(self) -> list[str]:
        """Of the servers that answer, as the first rank knows them."""
        return self.mesh.broadcast_object([server.url for server in getattr(self.engine, "servers", ())])

    def _on_first(self, work: Callable[[], Any], meets: Callable[..., Any] = together) -> None:
        """A coroutine of the first rank's engine; all wait for it."""
        meets(self.mesh, lambda: self.rollouts.call(work()) if self.mesh.is_first else None)

    def _send(self, version: int) -> tuple[str, bool]:
        """One attempt: what failed, and whether a server was lost with it."""
        failure, is_lost = "", False
        send = None if self.pusher is None else lambda tensors: self.pusher.send(tensors, version)
        try:
            report = walked(self.policy, send, everywhere=self._is_local)
            self.report: PushReport | None = report or self.report
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are told
            if self.mesh.world_size == 1 and not isinstance(error, UserError):
                raise
            failure, is_lost = told(error), _is_of_a_death(error)
        return failure, is_lost


def _is_of_a_death(error: BaseException | None) -> bool:
    """True where a server that did not answer is behind an error."""
    while error is not None:
        if getattr(error, "is_lost", False):
            return True
        error = error.__cause__ or error.__context__
    return False
