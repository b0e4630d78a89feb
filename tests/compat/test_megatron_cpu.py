"""The bends for a CPU: each works, and each is still needed. Upstream's side is read from its source where the bend hides it."""

from __future__ import annotations

import importlib
import inspect
import logging
import types

import pytest
import torch

from r1mega.compat import megatron_cpu
from tests.train.cases import one_rank


@pytest.fixture(scope="module", autouse=True)
def bent() -> None:
    one_rank()


def module(name: str) -> types.ModuleType:
    return importlib.import_module(f"megatron.core.{name}")


def test_torch_in_megatrons_modules_answers_for_the_cpu_and_torch_itself_does_not() -> None:
    inside = module("tensor_parallel.layers").torch
    assert inside.cuda.current_device() == torch.device("cpu") and not inside.cuda.is_available()
    made = inside.empty(2, device=inside.cuda.current_device()), inside.zeros(2, device="cuda"), inside.ones(2, pin_memory=True)
    assert all(tensor.device.type == "cpu" for tensor in made)
    with inside.cuda.stream(inside.cuda.Stream()):
        assert inside.cuda.current_stream().synchronize() is None
    inside.cuda.manual_seed(5)
    state = inside.cuda.get_rng_state()
    drawn = torch.rand(3)
    inside.cuda.set_rng_state(state)
    assert torch.equal(drawn, torch.rand(3))
    assert inside is not torch and torch.cuda.current_device is not inside.cuda.current_device


def test_megatron_still_names_cuda_everywhere() -> None:
    for name in ("tensor_parallel.layers", "transformer.moe.router", "models.common.embeddings.rotary_pos_embedding"):
        assert "torch.cuda.current_device()" in inspect.getsource(module(name))
    if not torch.backends.cuda.is_built():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.cuda.current_device()


def constants(code: types.CodeType) -> set[str]:
    found = set()
    for value in code.co_consts:
        for item in value if isinstance(value, tuple) else (value,):
            found |= {item} if isinstance(item, str) else constants(item) if isinstance(item, types.CodeType) else set()
    return found


@pytest.mark.parametrize(
    "owner, function",
    [
        ("optimizer", "Float16OptimizerWithFloat16Params.__init__"),
        ("distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
    ],
)
def test_optimizers_compare_with_the_cpus_type_names_and_upstream_still_with_cudas(owner, function) -> None:
    bent = module(f"optimizer.{owner}")
    for part in function.split("."):
        bent = getattr(bent, part)
    assert "torch.FloatTensor" in constants(bent.__code__) and "torch.cuda.FloatTensor" not in constants(bent.__code__)
    assert "torch.cuda.FloatTensor" in inspect.getsource(bent)


def test_the_rng_tracker_forks_without_a_warning_and_upstream_still_has_one(caplog) -> None:
    random = module("tensor_parallel.random")
    assert logging.getLogger(random.__name__).level == logging.ERROR
    before = torch.get_rng_state()
    with random.get_cuda_rng_tracker().fork():
        inside = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before), "the generator is put back"
    with random.get_cuda_rng_tracker().fork():
        assert not torch.equal(inside, torch.rand(2)), "the tracker goes on where it was"
    assert not caplog.records
    assert "CPU RNG state changed within GPU RNG context" in inspect.getsource(random)


def test_split_sizes_become_arrays_and_upstream_still_leaves_cpu_tensors() -> None:
    sizes = torch.tensor([3, 5])
    bent = module("transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu
    assert bent(sizes, as_numpy=True).tolist() == [3, 5] and not torch.is_tensor(bent(sizes, as_numpy=True))
    assert bent(sizes, record_stream=True) is sizes and bent(None, as_numpy=True) is None
    assert torch.is_tensor(module("transformer.moe.moe_utils").maybe_move_tensor_to_cpu(sizes, as_numpy=True))


def test_a_shared_embedding_stays_where_it_is_and_upstream_still_moves_it() -> None:
    setup = module("models.common.language_module.language_module").LanguageModule.setup_embeddings_and_output_layer
    assert "cuda" not in setup.__code__.co_names and "cpu" in setup.__code__.co_names
    assert "weight.data.cuda()" in inspect.getsource(setup)


def test_small_functions_run_plain_and_jit_fuser_still_compiles() -> None:
    plain = (
        module("fusions.fused_bias_dropout").bias_dropout_add_fused_train,
        module("transformer.moe.router").TopKRouter._apply_expert_bias,
    )
    assert not any(hasattr(function, "_torchdynamo_orig_callable") for function in plain)
    assert all("@jit_fuser" in inspect.getsource(function) for function in plain)
    fuse = module("jit").jit_fuser
    assert hasattr(fuse(lambda value: value), "_torchdynamo_orig_callable")


def test_a_second_call_bends_nothing_twice() -> None:
    assert megatron_cpu.apply() == 0
