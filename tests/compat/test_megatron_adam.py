"""The bends of the distributed optimizer's load: each works, and each is still needed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from tests.train.cases import MODEL, OPTIM, one_rank


@pytest.fixture(scope="module")
def optimizer_class():
    one_rank()
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return DistributedOptimizer


@pytest.fixture
def part(optimizer_class):
    """A distributed optimizer with moments."""
    from r1mega.train.trainee import Trainee

    trainee = Trainee(MODEL, OPTIM, one_rank(), "fp32")
    trainee.allocate_moments()
    return trainee.optimizer.chained_optimizers[0]


def original(bent, name: str):
    """Upstream's function behind a bend."""
    return inspect.getclosurevars(bent).nonlocals[name]


def held_by_an_optimizer():
    weight, main = torch.zeros(3), torch.zeros(3)
    state = {main: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(3)}}
    fake = SimpleNamespace(
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        model_param_group_index_map={weight: (0, 0)},
        optimizer=SimpleNamespace(param_groups=[{"params": [main]}], state=state),
    )
    return fake, weight, main, state


GIVEN = {"param": torch.tensor([1.0, 2.0, 3.0]), "exp_avg": torch.tensor([4.0, 5.0, 6.0])}


def test_states_without_a_tensor_in_the_checkpoint_are_left_alone(optimizer_class) -> None:
    fake, weight, main, state = held_by_an_optimizer()
    optimizer_class._set_main_param_and_optimizer_states(fake, weight, GIVEN)
    assert torch.equal(main, GIVEN["param"]) and torch.equal(state[main]["exp_avg"], GIVEN["exp_avg"])
    assert state[main]["step"] == 4


def test_upstream_still_wants_a_tensor_for_every_state(optimizer_class) -> None:
    fake, weight, *_ = held_by_an_optimizer()
    with pytest.raises(KeyError, match="step"):
        original(optimizer_class._set_main_param_and_optimizer_states, "put")(fake, weight, GIVEN)


def counters(part) -> list[int]:
    return [state["step"].data_ptr() for state in part.optimizer.state.values()]


def test_every_parameter_counts_its_own_steps_after_a_load(part) -> None:
    part.load_state_dict(part.state_dict())
    assert len(set(counters(part))) == len(counters(part)) > 1


def test_upstream_still_shares_one_counter(optimizer_class, part) -> None:
    original(optimizer_class.load_state_dict, "load")(part, part.state_dict())
    assert len(counters(part)) > 1 and len(set(counters(part))) == 1
