"""Dense FFN and shared experts: Megatron's own numbers and parameters, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from r1mega.config.run import ParallelConfig
from tests.train.cases import MODEL, one_rank


def built(cls, **changes):
    """One module of Megatron's class or ours, weights from one seed."""
    one_rank()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from r1mega.model.build import transformer_config

    config, groups = transformer_config(MODEL, ParallelConfig(), torch.float32), ProcessGroupCollection.use_mpu_process_groups()
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    shared = issubclass(cls, SharedExpertMLP)
    how = {"gate": True, "pg_collection": groups} if shared else {"tp_group": groups.tp, "ffn_hidden_size": MODEL.ffn_size}
    module = cls(replace(config, **changes), parts, **how)
    draw = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.2)
    return module


def outcome(module) -> dict[str, torch.Tensor]:
    hidden = torch.randn(5, 2, MODEL.hidden_size, generator=torch.Generator().manual_seed(2)).requires_grad_()
    output = module(hidden)
    if isinstance(output, tuple):
        output, bias = output
        assert bias is None
    output.square().sum().backward()
    return {"output": output, "hidden": hidden.grad} | {name: weight.grad for name, weight in module.named_parameters()}


@pytest.mark.parametrize("shared", [False, True])
def test_megatrons_own_numbers_and_names(shared) -> None:
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from r1mega.model.mlp import DenseMLP, SharedMLP

    ours, theirs = (outcome(built(cls)) for cls in ((SharedMLP, SharedExpertMLP) if shared else (DenseMLP, MLP)))
    assert list(ours) == list(theirs) and len(ours) == (5 if shared else 4)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


def test_other_activations_are_refused() -> None:
    from r1mega.model.mlp import DenseMLP

    with pytest.raises(ValueError, match="model.mlp: activation_func_clamp_value is None; got 7.0; leave it so"):
        built(DenseMLP, activation_func_clamp_value=7.0)
    with pytest.raises(ValueError, match="got per_token_scale; leave it out"):
        built(DenseMLP)(torch.zeros(1, 1, MODEL.hidden_size), torch.ones(1))


def test_the_model_has_them_in_its_slots() -> None:
    mesh = one_rank()
    from r1mega.model.build import build_stages, transformer_config
    from r1mega.model.mlp import DenseMLP, SharedMLP

    config = transformer_config(MODEL, mesh.parallel, torch.float32)
    dense, mixture = build_stages(MODEL, config, mesh.megatron_groups())[0].decoder.layers
    assert type(dense.mlp) is DenseMLP and type(mixture.mlp.shared_experts) is SharedMLP
