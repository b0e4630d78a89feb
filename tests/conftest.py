"""Marks: a test marked ``gpu`` is skipped where torch sees no GPU. Nothing else is shared here: a room's fixtures stand beside its tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return  # torch is not imported for tests that do not need it
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
