"""The MoE layer: Megatron's own numbers on one and two ranks, experts cut along F, moved experts, late weight gradients, checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from r1mega import registry
from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.device import open_device
from r1mega.mesh import close_mesh, open_mesh
from r1mega.testing.ranks import run_ranks
from tests.train.cases import CPU, MODEL, one_rank

WEIGHTS = ("experts.weight1", "experts.weight2")
LENGTH, BATCH = 6, 2


def layer(parallel: ParallelConfig, dispatcher=None, *, megatron: bool = False, model=MODEL, dtype=torch.float32):
    """One MoE layer on the open mesh: ours with a dispatcher, or Megatron's with its own."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    from r1mega.model.build import transformer_config
    from r1mega.model.experts import GroupedExperts
    from r1mega.model.moe import mixture_spec

    config, groups = transformer_config(model, parallel, dtype), ProcessGroupCollection.use_mpu_process_groups()
    dense = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = MoESubmodules(
        experts=ModuleSpec(module=GroupedExperts), shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=dense)
    )
    if megatron:
        spec = ModuleSpec(module=MoELayer, submodules=parts, params={"pg_collection": groups})
    else:
        spec = mixture_spec(parts, groups, dispatcher)
    built = build_module(spec, config=config)
    built.set_layer_number(1)
    fill(built)
    return built


def fill(built) -> None:
    """The same weights in every layout: whole experts from one seed, then this rank's part."""
    for index, (name, weight) in enumerate(sorted(built.named_parameters())):
        draw = torch.Generator().manual_seed(index)
        shape = global_shape(name, weight)
        whole = 0.2 * torch.randn(shape, generator=draw)
        weight.data.copy_(own_part(built, name, whole) if name in WEIGHTS else whole)


def global_shape(name: str, weight) -> tuple[int, ...]:
    E, F, D = MODEL.num_experts, MODEL.moe_ffn_size, MODEL.hidden_size
    return {"experts.weight1": (E, 2 * F, D), "experts.weight2": (E, D, F)}.get(name, tuple(weight.shape))


def own_part(built, name: str, whole: torch.Tensor) -> torch.Tensor:
    """The slots of this rank, and of each its cut along F."""
    experts = built.experts
    here = whole[list(experts.local_experts())]
    part, parts = experts.expert_tensor_group.rank(), experts.expert_tensor_group.size()
    if name == "experts.weight2":
        return here.chunk(parts, 2)[part]
    return torch.cat([half.chunk(parts, 1)[part] for half in here.chunk(2, 1)], 1)


def tokens(rank: int) -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, MODEL.hidden_size, generator=torch.Generator().manual_seed(100 + rank))


def run(built, rank: int = 0) -> dict[str, torch.Tensor]:
    """Output and all gradients of one forward and backward pass on this rank's tokens."""
    hidden = tokens(rank).requires_grad_()
    output, bias = built(hidden)
    assert bias is None
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(rank))
    (output * weight).sum().backward()
    found = {"output": output.detach(), "hidden": hidden.grad} | {name: p.grad for name, p in built.named_parameters()}
    built.zero_grad()
    return found


def wanted(num_ranks: int) -> list[dict[str, torch.Tensor]]:
    """By one process with all experts: each rank's tokens on their own; the experts' gradients are the sums over the ranks."""
    results = [run(layer(ParallelConfig(), registry.lookup("dispatcher", "local")()), rank) for rank in range(num_ranks)]
    for name in WEIGHTS:
        total = sum(result[name] for result in results)
        for result in results:
            result[name] = total
    return results


def close(got: dict, want: dict, atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value is not None and got[name] is not None, name
        torch.testing.assert_close(got[name], value, atol=atol, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["local", "alltoall", "allgather"])
def test_one_rank_has_megatrons_numbers_to_the_last_bit_but_for_the_routers_own_gradient(name) -> None:
    """Which sums over a token's experts, and they come in another order there: by expert, not by score."""
    one_rank()
    ours, theirs = (
        layer(ParallelConfig(), registry.lookup("dispatcher", name)()),
        layer(ParallelConfig(), megatron=True),
    )
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    got, want = run(ours), run(theirs)
    near = ("hidden", "router.weight")
    assert [key for key in want if key not in near and not torch.equal(got[key], want[key])] == []
    close({key: got[key] for key in near}, {key: want[key] for key in near})
    assert torch.equal(ours.router.local_tokens_per_expert, theirs.router.local_tokens_per_expert)


def test_the_experts_numbers_are_those_of_the_plain_linears_to_the_last_bit() -> None:
    """The class that this one follows left the gradients to autograd."""
    import torch.nn.functional as F

    from r1mega.ops.swiglu import swiglu

    one_rank()
    experts = layer(ParallelConfig()).experts
    counts = torch.tensor([3, 0, 5, 1, 0, 0, 2, 4])
    rows, probs = torch.randn(15, MODEL.hidden_size), torch.rand(15)

    def plain(rows, probs, up, down):
        outputs = []
        pieces = zip(rows.split(counts.tolist()), probs.split(counts.tolist()), up.unbind(0), down.unbind(0), strict=True)
        for part, prob, first, second in pieces:
            outputs.append(F.linear(swiglu(F.linear(part, first), prob), second))
        return torch.cat(outputs)

    results = []
    for call in (lambda r, p: experts(r, counts, p)[0], lambda r, p: plain(r, p, experts.weight1, experts.weight2)):
        leaves = rows.clone().requires_grad_(), probs.clone().requires_grad_()
        output = call(*leaves)
        output.square().sum().backward()
        results.append((output, *(leaf.grad for leaf in leaves), experts.weight1.grad, experts.weight2.grad))
        experts.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_grouped_kernel_splits_its_gradient_as_autograd_does() -> None:
    from r1mega.model.experts import _GroupedLinears

    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 16, 8, generator=draw).bfloat16())
    offsets, weights = torch.tensor([3, 3, 8, 12], dtype=torch.int32), torch.randn(12, 16, generator=draw).bfloat16()
    results = []
    for call in (
        lambda rows: _GroupedLinears.apply(weight, rows, offsets),
        lambda rows: torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=offsets),
    ):
        rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        output = call(rows)
        (output * weights).sum().backward()
        results.append((output, rows.grad, weight.grad))
        weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("main_grad", [False, True])
def test_an_activation_that_is_made_again_gives_the_same_bits(main_grad) -> None:
    from r1mega.model.experts import _ActivatedLinears, _GroupedLinears
    from r1mega.ops.swiglu import swiglu

    draw = torch.Generator().manual_seed(0)
    start, offsets = torch.randn(4, 16, 8, generator=draw).bfloat16(), torch.tensor([3, 3, 8, 12], dtype=torch.int32)
    results, kept = [], []
    for call in (
        lambda weight, hidden, probs: _ActivatedLinears.apply(weight, hidden, probs, offsets),
        lambda weight, hidden, probs: _GroupedLinears.apply(weight, swiglu(hidden, probs), offsets),
    ):
        weight = torch.nn.Parameter(start.clone())
        if main_grad:
            weight.main_grad = torch.zeros(4, 16, 8)
        again = torch.Generator().manual_seed(1)
        hidden = torch.randn(12, 16, generator=again).bfloat16().requires_grad_()
        probs = torch.rand(12, generator=again).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
            output = call(weight, hidden, probs)
        kept.append(None)
        output.backward(torch.randn(12, 16, generator=again).bfloat16())
        results.append((output, hidden.grad, probs.grad, weight.main_grad if main_grad else weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ours, plain = kept[: kept.index(None)], kept[kept.index(None) :]
    assert (12, 8) not in ours and (12, 8) in plain  # the activation


@pytest.mark.parametrize("main_grad", [False, True])
def test_weight_gradients_can_come_later_and_are_the_same(main_grad) -> None:
    from r1mega.model.gradients import WeightGradients

    one_rank()
    built = layer(ParallelConfig())
    want = run(built)
    routed = [built.experts.weight1, built.experts.weight2]
    for weight in routed if main_grad else ():
        weight.main_grad = torch.ones_like(weight)  # what is there already stays
    store = WeightGradients()
    with store.collect("here"):
        got = run(built)
    close({k: v for k, v in got.items() if k not in WEIGHTS}, {k: v for k, v in want.items() if k not in WEIGHTS}, atol=0)
    assert all(got[name] is None for name in WEIGHTS) and all(weight.grad is None for weight in routed)
    store.run("here")
    for name, weight in zip(WEIGHTS, routed, strict=True):
        late = weight.main_grad - 1 if main_grad else weight.grad
        torch.testing.assert_close(late, want[name], atol=1e-6 if main_grad else 0, rtol=0)


def test_only_experts_of_the_kept_groups_get_rows() -> None:
    """Node-limited routing is the router's; the contract shows that every dispatcher sends what the router chose."""
    one_rank()
    built, seen = layer(ParallelConfig()), []
    inner = built.token_dispatcher

    def dispatch(hidden, probs, chosen):
        seen.append((chosen, inner.dispatch(hidden, probs, chosen)))
        return seen[-1][1]

    built.token_dispatcher = SimpleNamespace(dispatch=dispatch, combine=inner.combine)
    run(built)
    (chosen, sent), groups = seen[0], MODEL.num_groups
    used = chosen.view(len(chosen), groups, -1).any(-1).sum(1)
    assert used.max() == MODEL.topk_groups < groups
    assert sent.tokens_per_expert.tolist() == chosen.sum(0).tolist()


@pytest.mark.parametrize("option", [{"moe_expert_capacity_factor": 1.0}, {"moe_shared_expert_overlap": True}])
def test_options_that_the_layer_does_not_have_are_refused(option) -> None:
    from r1mega.model.build import transformer_config
    from r1mega.model.moe import MixtureOfExperts

    one_rank()
    config = transformer_config(MODEL, ParallelConfig(), torch.float32)
    for name, value in option.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"model.moe: {next(iter(option))} is not there; got"):
        MixtureOfExperts(config)


def test_moved_experts_compute_the_same_and_are_saved_in_logical_order() -> None:
    one_rank()
    built = layer(ParallelConfig())
    want, logical = run(built), [w.detach().clone() for w in (built.experts.weight1, built.experts.weight2)]
    built.experts.placement = (5, 2, 7, 0, 1, 6, 3, 4)
    fill(built)
    assert torch.equal(built.experts.weight1, logical[0][list(built.experts.placement)])
    got = run(built)
    order = list(built.experts.placement)
    for name in WEIGHTS:
        want[name] = want[name][order]
    close(got, want)
    state = built.experts.sharded_state_dict("experts.")
    for name, whole in zip(WEIGHTS, logical, strict=True):
        assert torch.equal(assemble(state[name].build()), whole)
        assert torch.equal(state[name].merge_fn([part.data for part in state[name].build()]), whole[order])


def assemble(*shards) -> torch.Tensor:
    """The global tensor of Megatron's sharded tensors; NaN where none lies."""
    whole = torch.full(shards[0][0].global_shape, float("nan"))
    for part in (part for group in shards for part in group):
        place = tuple(slice(start, start + size) for start, size in zip(part.global_offset, part.local_shape, strict=True))
        assert whole[place].isnan().all(), "no element is saved twice"
        whole[place] = part.data
    return whole


def test_a_stack_inside_a_stack_of_layers_keeps_its_place() -> None:
    """Megatron prepends an axis of layers where all are alike."""
    one_rank()
    experts = layer(ParallelConfig()).experts
    state = experts.sharded_state_dict("x.", ((0, 2, 5),))
    for name, inner in (("weight1", (8, 32, 32)), ("weight2", (8, 32, 16))):
        shards = state[f"x.{name}"].build()
        assert {s.global_shape for s in shards} == {(5, *inner)} and {s.global_offset[0] for s in shards} == {2}
        assert len({s.axis_fragmentations for s in shards}) == 1


def on_two_ranks() -> list[str]:
    """EP 2 and ETP 2, all dispatchers, Megatron's own for EP 2; what each rank saves."""
    rank = _rank()
    done = []
    mesh = open_mesh(open_device(CPU), ParallelConfig(), LaunchConfig(), 1)
    want = wanted(2)[mesh.rank]
    close_mesh()
    for degrees in ({"expert": 2}, {"expert_tensor": 2}):
        parallel = ParallelConfig(**degrees)
        mesh = open_mesh(open_device(CPU), parallel, LaunchConfig(), 1)
        kinds = {name: {"dispatcher": registry.lookup("dispatcher", name)()} for name in ("alltoall", "allgather")}
        if "expert" in degrees:
            kinds["megatron"] = {"megatron": True}
        for name, how in kinds.items():
            built = layer(parallel, **how)
            own = want | {key: own_part(built, key, want[key]) for key in WEIGHTS}
            close(run(built, rank), own)
            done.append(f"{name} {degrees}")
        state = built.experts.sharded_state_dict("experts.")
        for key in WEIGHTS:
            boxes = [None, None]
            dist.all_gather_object(boxes, state[key].build())
            draw = torch.Generator().manual_seed(sorted(n for n, _ in built.named_parameters()).index(key))
            whole = 0.2 * torch.randn(global_shape(key, dict(built.named_parameters())[key]), generator=draw)
            assert torch.equal(assemble(*boxes), whole), f"{key} {degrees}"
            assert {part.replica_id for box in boxes for part in box} == {(0, 0, 0)}
            done.append(f"{key} {degrees}")
        if "expert" in degrees:
            built = layer(parallel)
            built.experts.placement = (6, 1, 2, 3, 4, 5, 0, 7)  # two experts change ranks
            fill(built)
            own = want | {key: own_part(built, key, want[key]) for key in WEIGHTS}
            close(run(built, rank), own)
            done.append("moved")
        close_mesh()
    return done


def _rank() -> int:
    import os

    torch.set_num_threads(1)
    return int(os.environ["RANK"])


@pytest.mark.slow
def test_two_ranks_have_the_numbers_of_one_and_megatrons_whatever_is_cut() -> None:
    for done in run_ranks(on_two_ranks, 2, timeout_seconds=200):
        assert len(done) == 2 + 1 + 2 + 1 + 2 + 2, done
