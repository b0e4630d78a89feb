"""Marks: a test marked ``gpu`` is skipped where torch sees no GPU. Files that share a real SGLang server run in one process.

Nothing else is shared here: a room's fixtures stand beside its tests.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadFileScheduling

ONE_SERVER = ("test_sglang_grpo.py", "test_sglang_server.py", "test_push_server.py")
"""Files that ask for the session's server."""


class _Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "one server" if file.endswith(ONE_SERVER) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadFileScheduling | None:
    """``--dist loadfile`` with one process for the files of one server."""
    return _Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return  # torch is not imported for tests that do not need it
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
