"""The bend of the tensor parallel all-reduce: it works, and it is still needed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from tests.train.cases import one_rank

TWO = SimpleNamespace(size=lambda: 2)


@pytest.fixture
def mappings(monkeypatch):
    one_rank()
    from megatron.core.tensor_parallel import mappings

    # two ranks that hold the same: the sum is the double
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))
    return mappings


def test_a_tensor_that_is_not_contiguous_is_reduced(mappings) -> None:
    values = torch.arange(6.0).view(2, 3)
    assert torch.equal(mappings._reduce(values.clone(), TWO), 2 * values)
    assert torch.equal(mappings._reduce(values.clone().T, TWO), 2 * values.T)


def test_upstream_still_loses_the_sum(mappings) -> None:
    upstream = inspect.getclosurevars(mappings._reduce).nonlocals["reduce"]
    values = torch.arange(6.0).view(2, 3)
    assert torch.equal(upstream(values.clone(), TWO), 2 * values)
    assert torch.equal(upstream(values.clone().T, TWO), values.T)
