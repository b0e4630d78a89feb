"""What works in batches, asked one item at a time: items that arrive together are one batch. In one event loop.

A batch begins when every coroutine that can run has run, so that all responses of a rollout, and later all turns that wait, decode
side by side; what arrives meanwhile is the next batch. Between batches the work can be paused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

IDLE_TURNS = 3
"""Turns of the event loop without a new item after which a batch begins."""


class Batcher:
    """``work(items) -> results``, one an item in order, runs in a thread, one call at a time."""

    def __init__(self, work: Callable[[Sequence[Any]], list[Any]]):
        self._work = work
        self._waiting: list[tuple[Any, asyncio.Future]] = []
        self._runner: asyncio.Task | None = None
        self._paused = False

    async def ask(self, item: Any) -> Any:
        """The item's result, when its batch is done. A failure of the batch is everyone's in it."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._begin()
        return await future

    async def pause(self) -> None:
        """Wait for the batch that runs; none begins until :meth:`resume`."""
        self._paused = True
        if self._runner is not None:
            await asyncio.wait([self._runner])

    async def resume(self) -> None:
        """Go on with what waits."""
        self._paused = False
        self._begin()

    def _begin(self) -> None:
        if self._runner is None and self._waiting and not self._paused:
            self._runner = asyncio.create_task(self._run())
            self._runner.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self._runner = None
        if not task.cancelled() and task.exception() is None:
            self._begin()

    async def _run(self) -> None:
        quiet, seen = 0, len(self._waiting)
        while quiet < IDLE_TURNS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            seen = len(self._waiting)
        batch, self._waiting = [entry for entry in self._waiting if not entry[1].done()], []
        try:
            done = await asyncio.to_thread(self._work, [item for item, _ in batch]) if batch else []
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, done, strict=True):
            if not future.done():
                future.set_result(result)
