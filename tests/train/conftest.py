"""Token files and one finished run for the room's tests; both are read, never changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.cases import pretrain_config, write_data


@pytest.fixture(scope="session")
def train_data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def seed_run(train_data: Path) -> Path:
    """A run of one step, whose checkpoint others start from."""
    from r1mega.train.pretrain import pretrain

    out = train_data / "seed"
    pretrain(pretrain_config(train_data, out, 1))
    return out
