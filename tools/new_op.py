"""The pieces of a new op, so that the tree builds and one test says what to write next: ``python tools/new_op.py NAME``.

Writes the schema into csrc/library.cpp, csrc/NAME/{op.h,cpu.cpp,cuda.cu}, r1mega/ops/NAME.py (contract, reference, fake, autograd,
cases), r1mega/testing/bench/NAME.py and tests/ops/test_NAME.py. The op is y = 2 x until you change it; its kernels are not written,
so the reference serves. Refuses a name that is taken or no name, and writes nothing then.
"""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAKEN = ("common", "library", "build")

OP_H = """\
// @NAME@: the checks that the kernels of all devices share. The contract is the docstring of r1mega/ops/@NAME@.py.

#pragma once

#include <ATen/core/Tensor.h>

namespace r1mega {

inline void check_@NAME@(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_floating_point(), "@NAME@: expected x of a floating type, got ", x.scalar_type());
}

}  // namespace r1mega
"""

CPU_CPP = """\
// @NAME@ on a CPU: bit for bit the plain-torch reference of r1mega/ops/@NAME@.py.

#include "op.h"

#include <torch/library.h>

namespace r1mega {

// Write at::Tensor @NAME@_cpu(const at::Tensor& x) here: check_@NAME@, then a loop that vectorises, threaded by at::parallel_for.
TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  // m.impl("@NAME@", @NAME@_cpu);
}

}  // namespace r1mega
"""

CUDA_CU = """\
// @NAME@ on a GPU: the same bits each time, no wait for the device, on the current stream.

#include "../common/device.cuh"
#include "op.h"

#include <torch/library.h>

namespace r1mega {

// Write at::Tensor @NAME@_cuda(const at::Tensor& x) here: check_@NAME@, a CUDAGuard, the launch, C10_CUDA_KERNEL_LAUNCH_CHECK().
TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  // m.impl("@NAME@", @NAME@_cuda);
}

}  // namespace r1mega
"""

PYTHON = '''\
"""Op ``@NAME@``: ``y = 2 x``."""

from __future__ import annotations

import torch

from r1mega.ops.library import Case, Op


def @NAME@(x: torch.Tensor) -> torch.Tensor:
    """``y = 2 x`` for each number, in x's shape and dtype.

    ``x``: any floating dtype, any shape, any strides; y is contiguous. Each product is rounded once, so that all devices give the
    same bits; NaN stays NaN, what is too large becomes infinity. The gradient of x is twice that of y.
    """
    return @UPPER@.packet(x)


def _reference(x):
    return (2 * x).contiguous()


def _fake(x):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    """The gradient needs nothing that the forward pass has; another op saves here what its backward reads."""


def _backward(ctx, grad):
    return 2 * grad


def _case(*shape: int, strided: bool = False, scale: float = 1.0):
    def make(dtype, device):
        draw = torch.Generator().manual_seed(7)
        x = (torch.randn(shape, generator=draw) * scale).to(device, dtype)
        return (x.t().contiguous().t() if strided else x,)

    return make


@UPPER@ = Op(
    "@NAME@(Tensor x) -> Tensor",
    _reference,
    _fake,
    _setup,
    _backward,
    (
        Case("ordinary", _case(16, 32)),
        Case("empty", _case(0, 8)),
        Case("one row", _case(1, 8)),
        Case("ragged", _case(7, 13)),
        Case("non-contiguous", _case(6, 10, strided=True)),
        Case("extreme values", _case(5, 8, scale=1e30)),
    ),
)
OPS = (@UPPER@,)
'''

BENCH = '''\
"""Benchmark of the op ``@NAME@``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.ops.@NAME@ import @NAME@
from r1mega.testing.bench import Bench

ROWS, WIDTH = 8192, 7168


def benches() -> Iterator[Bench]:
    """bf16 rows of DeepSeek-V3's width."""

    def make(device: torch.device) -> tuple:
        return (torch.randn(ROWS, WIDTH, device=device, dtype=torch.bfloat16),)

    num_bytes = ROWS * WIDTH * 2 * 2  # x read, y written
    yield Bench("@NAME@", f"{ROWS} x {WIDTH}, bf16", make, @NAME@, num_bytes=num_bytes, peers={"torch": lambda x: 2 * x})
'''

TEST = '''\
"""@NAME@: what the test of all ops (test_ops.py) does not show."""

from __future__ import annotations

import torch

from r1mega.ops import library


def test_the_kernels_are_written() -> None:
    assert library.load(), f"build the library: {library.BUILD}"
    written = torch._C._dispatch_has_kernel_for_dispatch_key
    assert written("r1mega::@NAME@", "CPU"), f"write csrc/@NAME@/cpu.cpp, register the kernel there, then {library.BUILD}"
    if torch.cuda.is_available():
        assert written("r1mega::@NAME@", "CUDA"), f"write csrc/@NAME@/cuda.cu, register the kernel there, then {library.BUILD}"
'''

FILES = {
    "csrc/@NAME@/op.h": OP_H,
    "csrc/@NAME@/cpu.cpp": CPU_CPP,
    "csrc/@NAME@/cuda.cu": CUDA_CU,
    "r1mega/ops/@NAME@.py": PYTHON,
    "r1mega/testing/bench/@NAME@.py": BENCH,
    "tests/ops/test_@NAME@.py": TEST,
}


def fault(name: str, root: Path) -> str | None:
    """Why ``name`` cannot be an op's, or None."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        return f"NAME: small letters, digits and single underscores, as a Python name; got {name!r}; use another, as scale_rows"
    there = [path for pattern in FILES if (path := pattern.replace("@NAME@", name)) and (root / path).exists()]
    schemas = re.findall(r'"(\w+)\(', (root / "csrc" / "library.cpp").read_text())
    if name in TAKEN or name in schemas or (root / "csrc" / name).exists() or there:
        where = there[0] if there else "csrc/library.cpp" if name in schemas else f"csrc/{name}"
        return f"NAME: a name that no op has; got {name}, which is in {where}; use another"
    return None


def write(name: str, root: Path) -> list[Path]:
    """Write all pieces below ``root``; the changed file comes first."""
    library = root / "csrc" / "library.cpp"
    before, opening, body = library.read_text().partition("TORCH_LIBRARY(r1mega, m) {\n")
    inside, end, after = body.partition("\n}\n")
    if not opening or not end:
        sys.exit("csrc/library.cpp: one TORCH_LIBRARY(r1mega, m) block; got none; restore that file")
    library.write_text(f'{before}{opening}{inside}\n  m.def("{name}(Tensor x) -> Tensor");{end}{after}')
    written = [library]
    for pattern, text in FILES.items():
        path = root / pattern.replace("@NAME@", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("@NAME@", name).replace("@UPPER@", name.upper()))
        written.append(path)
    return written


def main(arguments: list[str]) -> int:
    """One name; exit status 2 where it is refused."""
    if len(arguments) != 1:
        print(f"NAME: one name of an op; got {len(arguments)}; write python tools/new_op.py NAME", file=sys.stderr)
        return 2
    (name,) = arguments
    if (wrong := fault(name, ROOT)) is not None:
        print(wrong, file=sys.stderr)
        return 2
    for path in write(name, ROOT):
        print(path.relative_to(ROOT))
    print(f"next: python setup.py build_ext --inplace && python -m pytest tests/ops/test_{name}.py, which says what to write")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
