"""A checkpoint to start from, and runs from it."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from r1mega.mesh import close_mesh
from r1mega.train.pretrain import pretrain
from tests.rl.autopsy.cases import config, opened, write_problems
from tests.train.cases import pretrain_config, write_data


@pytest.fixture(scope="session")
def autopsy_place(tmp_path_factory) -> Path:
    """Problems and a checkpoint (``seed``)."""
    close_mesh()
    folder = write_data(tmp_path_factory.mktemp("autopsy"))
    write_problems(folder)
    pretrain(pretrain_config(folder, folder / "seed", 2))
    return folder


@pytest.fixture
def begin(autopsy_place: Path, tmp_path: Path):
    """``begin(**settings)``: a run before its first push."""
    numbers = count()
    with ExitStack() as stack:

        def make(**settings: Any):
            return opened(config(autopsy_place, tmp_path / f"run{next(numbers)}", **settings), stack)

        yield make
