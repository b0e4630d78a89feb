"""Work of one rank that the others wait for: what it raises, all raise; what takes long, they wait for without a stall."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

from r1mega.config.errors import UserError

AGREE_SECONDS = 0.5
"""Between two looks of several ranks at each other while one of them waits."""


def together(mesh: Any, work: Callable[[], Any]) -> Any:
    """``work()`` of this rank; where one rank's fails, all raise."""
    found, failure = None, ""
    try:
        found = work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are told
        if mesh.world_size == 1:
            raise
        if not isinstance(error, UserError):
            traceback.print_exc()  # only its words travel
        failure = told(error)
    mesh.agree(failure)
    return found


def patiently(mesh: Any, work: Callable[[], Any]) -> Any:
    """As :func:`together`, for work that may outlast ``launch.stall_timeout_seconds``: it runs in a thread, and the ranks meet
    again and again until all of them are done."""
    if mesh.world_size == 1:
        return work()
    box: list[Callable[[], Any]] = []

    def run() -> None:
        try:
            found = work()
            box.append(lambda: found)
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
            box.append(lambda error=error: _raise(error))

    thread = threading.Thread(target=run, name="patiently", daemon=True)
    thread.start()
    is_everyone_done = False
    while not is_everyone_done:
        thread.join(AGREE_SECONDS)
        is_everyone_done = all(mesh.gather_everywhere(bool(box)))
    return together(mesh, box[0])


def told(error: BaseException) -> str:
    """An error in words."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _raise(error: BaseException) -> None:
    raise error
