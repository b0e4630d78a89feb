"""Calls of code that may hang, from an event loop: in threads of their own, under a time limit. In: a function; out: what it
returns.

A thread that does not come back is left behind and ends with its call, or with the process. No executor of the standard library
does that: they wait for their threads at the end of the process.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

MOST_LEFT = 64
"""Threads left behind that still hang; then no call is made any more."""


class Calls:
    """At most ``workers`` calls at once; others wait, and their time does not run."""

    def __init__(self, workers: int):
        self._count = workers
        self._free: list[_Worker] = []
        self._left: list[_Worker] = []
        self._gate: asyncio.Semaphore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(
        self, seconds: float, function: Callable[..., Any], *arguments: Any, late: Callable[[Any], Any] | None = None
    ) -> Any:
        """What the function returns; raises what it raises, and TimeoutError after ``seconds`` or where too many calls hang.

        ``late``: gets, in a thread, what the function returns after all, when nobody waits for it any more.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._gate, self._loop = asyncio.Semaphore(self._count), loop
        async with self._gate:
            self._left = [worker for worker in self._left if worker.thread.is_alive()]
            if len(self._left) >= MOST_LEFT:
                raise TimeoutError(f"not called: {MOST_LEFT} earlier calls hang")
            worker = self._free.pop() if self._free else _Worker()
            answer = worker.ask(loop, function, arguments, late)
            try:
                async with asyncio.timeout(seconds):
                    value, error = await answer
            except BaseException as ended:  # the limit, or this task was cancelled
                if answer.done() and not answer.cancelled():  # in the same moment
                    _hand_on(late, answer.result())
                worker.end()
                self._left.append(worker)
                raise TimeoutError(f"no answer in {seconds:g} s") if isinstance(ended, TimeoutError) else ended from None
            self._free.append(worker)
        if error is not None:
            raise error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}") from error
        return value

    def close(self) -> None:
        """End the threads that are idle; safe to call twice."""
        while self._free:
            self._free.pop().end()


class _Worker:
    """One thread that makes calls one after the other."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="environment", daemon=True)
        self.thread.start()

    def ask(
        self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any], arguments: tuple, late: Callable[[Any], Any] | None
    ) -> asyncio.Future:
        """A future of (value, error)."""
        future = loop.create_future()
        self._jobs.put((loop, future, function, arguments, late))
        return future

    def end(self) -> None:
        """After the call that runs, if one does."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, future, function, arguments, late = job
            try:
                answer = (function(*arguments), None)
            except BaseException as error:  # noqa: BLE001 - whoever asked gets it
                answer = (None, error)
            try:
                loop.call_soon_threadsafe(_answer, future, answer, late)
            except RuntimeError:  # the loop is closed: nobody waits
                _hand_on(late, answer)
            del job, future, function, arguments, late, answer


def _answer(future: asyncio.Future, answer: tuple[Any, BaseException | None], late: Callable[[Any], Any] | None) -> None:
    if not future.done():
        future.set_result(answer)
    else:
        _hand_on(late, answer)


def _hand_on(late: Callable[[Any], Any] | None, answer: tuple[Any, BaseException | None]) -> None:
    """What was returned too late."""
    if late is not None and answer[1] is None:
        threading.Thread(target=late, args=answer[:1], name="environment-late", daemon=True).start()
