"""Out of memory: one line with the largest holders by name, and a file with all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.train import fit
from r1mega.train.memory import holders, watched
from r1mega.train.pretrain import pretrain
from r1mega.train.trainee import Trainee
from tests.train.cases import MODEL, OPTIM, one_rank, pretrain_config

ROOT = Path(__file__).resolve().parents[2]


def test_who_holds_memory() -> None:
    trainee = Trainee(MODEL, OPTIM, one_rank(), "fp32")
    trainee.allocate_moments()
    kept = torch.zeros(3, 70_001)
    held = holders(trainee, trainee.mesh)
    numel = {name: parameter.numel() for name, parameter in trainee.module.named_parameters()}
    weights = sum(size for name, size in held.items() if name.startswith("weights "))
    assert weights == held["gradients"] == 4 * sum(numel.values())
    assert held["weights decoder.layers.N.mlp.experts.weight1"] == 4 * numel["decoder.layers.1.mlp.experts.weight1"]
    moments = [size for name, size in held.items() if name.startswith("optimizer moments exp_avg")]
    assert len(moments) == 2 and all(4 * sum(numel.values()) <= size for size in moments)
    assert held["other tensors [3, 70001] float32"] == 4 * kept.numel()
    assert held["programs, caches, kept for the backward pass, and temporaries"] > 50 << 20


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
        ),
        MemoryError("no more"),
    ],
)
def test_a_run_that_is_out_of_memory_says_who_holds_it(train_data: Path, tmp_path: Path, monkeypatch, error) -> None:
    def full(losses_BS, batch):
        raise error

    monkeypatch.setattr(fit, "masked_sum", full)
    with pytest.raises(
        UserError, match=r"^memory: a step fits; got .*; lower trainer.micro_batch_size or data.sequence_length, "
    ) as caught:
        pretrain(pretrain_config(train_data, tmp_path / "run", 1))
    told = str(caught.value)
    file = tmp_path / "run/memory/rank0.txt"
    assert told.count(" GiB") >= 5 and str(file) in told and "\n" not in told
    rows = file.read_text().splitlines()
    assert rows[0].split()[0] in str(error) and len(rows) > 10 and any("weights decoder.layers.N." in row for row in rows)
    sizes = [float(row.split()[0]) for row in rows[2:]]
    assert sizes == sorted(sizes, reverse=True)


def test_other_errors_pass(tmp_path: Path) -> None:
    trainee = Trainee(MODEL, OPTIM, one_rank(), "fp32")
    with pytest.raises(RuntimeError, match="^another$"), watched(trainee.mesh, tmp_path, "x"):
        raise RuntimeError("another")
    assert not (tmp_path / "memory").exists()


@pytest.mark.slow
def test_a_real_limit(train_data: Path, tmp_path: Path) -> None:
    """A process with too little address space for its batch."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.train.cases import one_rank, pretrain_config\n"
        "from r1mega.train.pretrain import pretrain\n"
        "from r1mega.config.errors import UserError\n"
        "config = pretrain_config(Path(sys.argv[1]), Path(sys.argv[2]), 3, global_batch_size=65536, micro_batch_size=65536)\n"
        "config.data.valid = None\n"
        "one_rank()\n"
        "now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), resource.RLIM_INFINITY))\n"
        "try: pretrain(config)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, train_data, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("memory: a step fits; got ") and "lower trainer.micro_batch_size" in done.stdout, done.stderr[
        -2000:
    ]
    assert (tmp_path / "run/memory/rank0.txt").is_file()
