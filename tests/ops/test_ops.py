"""All ops over their cases and the devices that are here: schema, values, gradients, the same bits twice, kernel against reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega.ops import library

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = library.all_ops()
BUILT = library.load()
EVERY = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases]
EVERY_DTYPE = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    for case in op.cases
    for dtype in op.dtypes
]
EXACT = [param for param in EVERY if param.values[0].exact and param.values[0].backward and torch.float64 in param.values[0].dtypes]
DIFFERENTIABLE = [param for param in EVERY_DTYPE if param.values[0].backward]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDING = 16
"""Units in the last place of fp32 that two orders of one sum may differ by, of a whole tensor's norm."""


def as_tuple(output) -> tuple:
    return () if output is None else tuple(output) if isinstance(output, tuple | list) else (output,)


def is_number(value) -> bool:
    """A tensor that has a gradient where its op has one."""
    return torch.is_tensor(value) and value.is_floating_point() and value.element_size() > 1


def flat(values) -> list:
    """Lists of tensors among the arguments, opened."""
    return [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]


def outcome(op, call, args) -> list[torch.Tensor]:
    """What an op returns, and the arguments that it changes, which are copied first."""
    own = [
        [part.clone() for part in arg] if isinstance(arg, list) else arg.clone() if torch.is_tensor(arg) else arg for arg in args
    ]
    returned = as_tuple(call(*own))
    schema = torch._C.parse_schema(f"r1mega::{op.schema}")
    changed = [value for value, argument in zip(own, schema.arguments, strict=True) if argument.alias_info is not None]
    return flat([*returned, *changed])


def same(left, right) -> bool:
    """The same bits, NaN included."""

    def bits(value):
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return value.contiguous().view(kinds[value.element_size()]) if value.is_floating_point() else value

    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(as_tuple(left), as_tuple(right), strict=True)
    )


def in_fp64(args) -> list:
    def wide(value):
        return value.double() if is_number(value) else value

    return [[wide(part) for part in arg] if isinstance(arg, list) else wide(arg) for arg in args]


def assert_as_near_as_plain_torch(found, plain, truth, more: float = 0.0) -> None:
    """Each tensor's distance from the truth is at most twice that of plain torch in the same dtype; not a number where it is not.

    ``more``: of the truth's norm, allowed above that.
    """
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        if torch.is_tensor(ours) and ours.is_floating_point() and ours.element_size() == 1:
            assert_as_plain_torch_or_one_step_off(ours, theirs)
            continue
        if ours is None or not is_number(ours):
            assert ours is theirs or torch.equal(ours, theirs)
            continue
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        usable = torch.isfinite(theirs)
        assert torch.equal(usable, torch.isfinite(ours)), "not finite in other places than plain torch"
        true = torch.where(usable, true.double(), 0.0)
        distance, allowed = (torch.linalg.vector_norm(torch.where(usable, one.double(), 0.0) - true) for one in (ours, theirs))
        assert distance <= 2 * allowed + (ROUNDING * torch.finfo(torch.float32).eps + more) * torch.linalg.vector_norm(true)


def assert_as_plain_torch_or_one_step_off(ours, theirs) -> None:
    """Payloads of FP8 whose numbers were not computed to the same bits: one in a thousand may lie on the other side of an edge."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    known = ~torch.isnan(theirs.float())
    assert torch.equal(known, ~torch.isnan(ours.float()))
    apart = (ours.view(torch.uint8).int() - theirs.view(torch.uint8).int())[known].abs()
    assert int((apart > 1).sum()) == 0 and int(apart.count_nonzero()) <= 1 + apart.numel() // 1000


def differentiable(args) -> list:
    """The floating arguments as leaves of the same strides."""
    return [arg.detach().requires_grad_() if is_number(arg) else arg for arg in args]


def gradients(call, args) -> list[torch.Tensor | None]:
    leaves = differentiable(args)
    outputs = [out for out in as_tuple(call(*leaves)) if is_number(out) and out.requires_grad]
    draw = torch.Generator().manual_seed(5)
    weights = [torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.device, out.dtype) for out in outputs]
    leaves = [leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, weights, allow_unused=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, case", EVERY)
def test_the_schema_the_fake_and_the_autograd_registration_hold(op, case, device) -> None:
    args = case.make(op.dtypes[0], torch.device(device))
    if any(torch.is_tensor(arg) and arg.is_floating_point() and arg.element_size() == 1 for arg in flat(args)):
        # opcheck compares arguments with what torch does not have for fp8, before and after; this does it by their bits
        before = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        torch.library.opcheck(op.packet, tuple(args), test_utils="test_faketensor")
        assert all(same(*pair) for pair in zip(before, args, strict=True) if torch.is_tensor(pair[0]))
    elif op.backward is None or case is not op.cases[0]:  # how autograd is registered is seen from one case
        torch.library.opcheck(op.packet, tuple(args), test_utils=("test_schema", "test_faketensor"))
    else:
        torch.library.opcheck(op.packet, tuple(differentiable(args)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, case, dtype", EVERY_DTYPE)
def test_values_are_the_references_twice_in_the_same_bits(op, case, dtype, device) -> None:
    args = case.make(dtype, torch.device(device))
    first, plain = outcome(op, op.packet, args), outcome(op, op.reference, args)
    assert same(first, outcome(op, op.packet, args))
    if op.exact:
        assert same(first, plain)
    else:
        more = op.tensor_core_error if device == "cuda" else 0.0
        assert_as_near_as_plain_torch(first, plain, outcome(op, op.reference, in_fp64(args)), more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, case", EXACT)
def test_gradients_are_those_of_finite_differences(op, case, device) -> None:
    args = differentiable(case.make(torch.float64, torch.device(device)))
    if case.name == "extreme values":
        pytest.skip("finite differences of numbers near 1e4 say nothing; their bits are compared below")
    many = sum(arg.numel() for arg in args if torch.is_tensor(arg)) > 1000  # then along random directions, not each number
    torch.autograd.gradcheck(lambda *a: [out for out in as_tuple(op.packet(*a)) if out.is_floating_point()], args, fast_mode=many)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, case, dtype", DIFFERENTIABLE)
def test_gradients_are_near_the_references_twice_in_the_same_bits(op, case, dtype, device) -> None:
    args = case.make(dtype, torch.device(device))
    first, second = gradients(op.packet, args), gradients(op.packet, args)
    assert [one is None for one in first] == [one is None for one in second]
    assert same([one for one in first if one is not None], [one for one in second if one is not None])
    if not op.exact:
        plain, truth = gradients(op.reference, args), gradients(op.reference, in_fp64(args))
        assert_as_near_as_plain_torch(first, plain, truth)


def test_the_python_schemas_are_those_of_the_library_source() -> None:
    source = (ROOT / "csrc" / "library.cpp").read_text().replace('"\n      "', "")
    assert [op.schema for op in OPS if f'"{op.schema}"' not in source] == []
    assert source.count("m.def(") == len(OPS)


def without_library(code: str, **env: str) -> subprocess.CompletedProcess:
    hide = "from r1mega.ops import library; from pathlib import Path; library.library_path = lambda: Path('/nowhere/_C.so'); "
    done = [sys.executable, "-c", hide + code]
    return subprocess.run(done, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_without_the_library_the_references_serve_and_rank_0_says_so_once() -> None:
    code = (
        "import torch; from r1mega.ops.permute import permute, unpermute; x = torch.randn(5, 3, requires_grad=True); "
        "m = torch.rand(5, 4) < 0.5; "
        "p = [permute(x, torch.rand(5, 4), m) for _ in range(2)][0]; y = unpermute(p.rows_RD, p.row_map); y.sum().backward(); "
        "torch.testing.assert_close(x.grad, m.sum(1, keepdim=True).float().expand(5, 3)); print(library.load())"
    )
    alone = without_library(code)
    assert alone.returncode == 0 and alone.stdout.strip() == "False", alone.stderr
    said = alone.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("ops: no C++ kernels for torch") and said[0].endswith(library.BUILD)
    assert without_library(code, RANK="1").stderr == ""


def test_a_library_that_torch_cannot_load_is_told_and_not_fatal(tmp_path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    done = without_library(f"library.library_path = lambda: Path({str(tmp_path / 'broken.so')!r}); print(library.load())")
    assert done.stdout.strip() == "False" and "broken.so" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_a_library_of_another_schema_is_refused_with_the_command() -> None:
    code = (
        "import dataclasses; from r1mega.ops import library, permute; path = library.Path(library.__file__).parent.parent; import torch; "
        "permute.OPS = (dataclasses.replace(permute.PERMUTE, schema='permute(Tensor tokens) -> Tensor'),); library.load()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "ops: the C++ library is of this source; got r1mega::permute(Tensor tokens, Tensor row_tokens" in done.stderr
    assert library.BUILD in done.stderr
