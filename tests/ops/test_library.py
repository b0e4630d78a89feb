"""Which C++ library is taken: what a build records, and what is said of a library of another torch, another CUDA or other GPUs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.config.run import DeviceConfig
from r1mega.device import open_device
from r1mega.ops import build, library
from r1mega.ops.build import Build
from r1mega.ops.permute import permute

ROOT = Path(__file__).resolve().parent.parent.parent
HOPPER = "torch=2.11.0+cu130 cuda=13.0 arch=9.0a,10.0a debug=0"


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module; it runs nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("r1mega_setup", ROOT / "setup.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held(path: Path, record: str) -> Path:
    path.write_bytes(b"\x7fELF\0\0" + f"r1mega-build:{record};".encode() + b"\0more")
    return path


def test_without_a_gpu_build_of_torch_or_without_nvcc_the_kernels_are_the_cpus(setup) -> None:
    for cuda, nvcc in ((None, "/usr/local/cuda/bin/nvcc"), ("13.0", None), (None, None)):
        made = setup.plan("2.13.0+cpu", cuda, nvcc, {})
        assert made.architectures == () and not any("gencode" in flag for flag in made.nvcc)
        assert made.cxx[:2] == ["-O3", "-std=c++20"] and made.record == "torch=2.13.0+cpu cuda= arch= debug=0"


def test_a_gpu_build_names_its_architectures(setup) -> None:
    made = setup.plan("2.11.0+cu130", "13.0", "/x/nvcc", {"R1MEGA_CUDA_ARCH": "9.0a, 10.0a"})
    assert made.record == HOPPER
    assert [flag for flag in made.nvcc if "gencode" in flag] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100a,code=sm_100a",
    ]
    for flag in ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-lineinfo"):
        assert flag in made.nvcc
    assert setup.plan("2.11.0+cu130", "13.0", "/x/nvcc", {}).architectures == ("9.0a",)
    assert setup.plan("2.11.0+cu130", "13.0", "/x/nvcc", {"R1MEGA_CUDA_ARCH": ""}).architectures == ("9.0a",)


def test_a_debug_build_has_symbols_and_no_optimisation(setup) -> None:
    made = setup.plan("2.11.0+cu130", "13.0", "/x/nvcc", {"R1MEGA_DEBUG": "1"})
    assert made.cxx[:2] == ["-O0", "-g"] and made.nvcc[:3] == ["-O0", "-g", "-G"] and "-lineinfo" not in made.nvcc
    assert made.record.endswith("debug=1")


@pytest.mark.parametrize("value", ["hopper", "9", "9.0", "90a", "9.0a,", "9.0b", "sm_90a", "9.0a;10.0a"])
def test_a_wrong_architecture_is_refused_by_name(setup, value) -> None:
    with pytest.raises(
        ValueError, match="R1MEGA_CUDA_ARCH: compute capabilities with commas between them, as 9.0a or 9.0a,10.0a; got "
    ):
        setup.plan("2.13.0", None, None, {"R1MEGA_CUDA_ARCH": value})
    with pytest.raises(ValueError, match="R1MEGA_DEBUG: 0 or 1; got 'yes'"):
        setup.plan("2.13.0", None, None, {"R1MEGA_DEBUG": "yes"})


def test_the_sources_are_all_of_csrc(setup, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    every = {str(path) for path in Path("csrc").rglob("*") if path.is_file()}
    taken = setup.sources("csrc", "cpp", "cu", "h", "cuh")
    assert set(taken) == every and "csrc/permute/cpu.cpp" in taken, (
        "another kind of file: setup.py, MANIFEST.in and Makefile name them"
    )
    shipped = (ROOT / "MANIFEST.in").read_text()
    assert all(f"*{Path(name).suffix}" in shipped.split() for name in taken)
    objects = [Path(name).with_suffix("") for name in taken if Path(name).suffix in (".cpp", ".cu")]
    assert len(set(objects)) == len(objects), "two objects of one name"


def test_a_record_is_read_from_the_file(tmp_path) -> None:
    found = build.read_build(held(tmp_path / "a.so", HOPPER))
    assert found == Build("2.11.0+cu130", "13.0", ("9.0a", "10.0a"), False)
    assert str(found) == "torch 2.11.0+cu130, GPU kernels of toolkit 13.0 for 9.0a, 10.0a"
    assert (
        str(build.read_build(held(tmp_path / "b.so", "torch=2.13.0 cuda= arch= debug=1")))
        == "torch 2.13.0, CPU only, with debug symbols"
    )
    for name, content in (("c.so", b"\x7fELF no record"), ("d.so", b"")):
        (tmp_path / name).write_bytes(content)
        assert build.read_build(tmp_path / name) is None
    assert build.read_build(tmp_path / "none.so") is None


def test_a_build_serves_the_gpus_that_it_names() -> None:
    def serves(architectures: str, capability: str) -> bool:
        return Build("", "13.0", tuple(architectures.split(",")), False).serves(capability)

    assert serves("9.0a", "9.0") and serves("9.0a,10.0a", "10.0") and serves("8.0", "8.9") and serves("10.0f", "10.3")
    assert not serves("9.0a", "10.0") and not serves("10.0a", "10.3") and not serves("8.9", "8.0") and not serves("9.0a", "8.0")


def test_a_library_of_another_torch_or_toolkit_is_refused_by_name(tmp_path) -> None:
    path = held(tmp_path / "_C.torch-2.13.0+cpu.so", HOPPER)
    assert build.fault(path, "2.13.0+cpu", None) == (
        "ops: a C++ library of torch 2.13.0+cpu; got one built for torch 2.11.0+cu130, GPU kernels of toolkit 13.0 for 9.0a, 10.0a in "
        f"{path}; run python setup.py build_ext --inplace"
    )
    assert build.fault(path, "2.11.0+cu130", "13.0") is None
    assert build.fault(path, "2.11.0+cu130", "12.8").startswith(
        "ops: a C++ library of torch 2.11.0+cu130 with toolkit 12.8; got one built for"
    )
    assert build.fault(held(path, "torch=2.11.0+cu130 cuda= arch= debug=0"), "2.11.0+cu130", "13.0") is None, "built without nvcc"


def test_the_library_that_is_here_says_what_torch_says() -> None:
    if not library.load():
        pytest.skip(f"the C++ library is not built: {library.BUILD}")
    found = build.read_build(library.library_path())
    assert found is None or found.torch == torch.__version__


def loading(path: Path) -> subprocess.CompletedProcess:
    """A process that loads the ops with the library at ``path``."""
    code = f"from pathlib import Path; from r1mega.ops import library; library.library_path = lambda: Path({str(path)!r}); print(library.load())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_loading_refuses_or_tells_in_one_line(tmp_path) -> None:
    held(tmp_path / "_C.torch-2.11.0+cu130.so", HOPPER)
    absent = loading(tmp_path / f"_C.torch-{torch.__version__}.so")
    assert absent.stdout == "False\n" and absent.stderr == (
        f"ops: no C++ kernels for torch {torch.__version__} (the library is built for torch 2.11.0+cu130, this is {torch.__version__}), "
        "plain torch does their work; to build them: python setup.py build_ext --inplace\n"
    )
    renamed = loading(held(tmp_path / f"_C.torch-{torch.__version__}.so", HOPPER))
    assert renamed.returncode == 1 and renamed.stderr.splitlines()[-1].endswith("run python setup.py build_ext --inplace")
    assert f"ops: a C++ library of torch {torch.__version__}" in renamed.stderr and "undefined symbol" not in renamed.stderr


def test_a_gpu_that_the_library_has_no_kernels_for_is_refused_with_the_command(tmp_path, monkeypatch, capsys) -> None:
    record = f"torch={torch.__version__} cuda=13.0 arch=9.0a debug=0"
    monkeypatch.setattr(library.device, "gpu_toolkit", lambda: "13.0")
    path = held(tmp_path / "lib.so", record)
    for capability in (None, "9.0"):
        monkeypatch.setattr(library.device, "gpu_capability", lambda capability=capability: capability)
        library._refuse_others(path)
    monkeypatch.setattr(library.device, "gpu_capability", lambda: "10.0")
    with pytest.raises(UserError) as caught:
        library._refuse_others(path)
    assert str(caught.value) == (
        "ops: GPU kernels for compute capability 10.0; got a library built for 9.0a; "
        "run R1MEGA_CUDA_ARCH=10.0a python setup.py build_ext --inplace"
    )
    library._refuse_others(held(path, f"torch={torch.__version__} cuda= arch= debug=0"))
    assert capsys.readouterr().err.startswith("ops: the C++ library was built without nvcc and has no GPU kernels")


def test_ops_are_named_ranges_while_somebody_wants_them() -> None:
    device, seen = open_device(DeviceConfig(threads=1)), []

    def open_range(name):
        seen.append(name)
        return device.open_range(name)

    def step():
        tokens = torch.ones(3, 2, requires_grad=True)
        permute(tokens, torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool), 2).rows_RD.sum().backward()

    library.name_ranges(open_range)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            step()
    finally:
        library.name_ranges(None)
    forward = ["r1mega::row_map", "r1mega::permute", "r1mega::permute_probs"]
    assert sorted(seen) == sorted([*forward, "r1mega::unpermute"]), "forward, and what the backward pass calls"
    assert sum(event.key == "r1mega::permute" for event in trace.key_averages()) >= 1
    step()
    assert len(seen) == 4
