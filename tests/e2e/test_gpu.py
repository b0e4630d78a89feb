"""The same commands on a GPU with NCCL: nothing here knows of CUDA but the overrides. Skipped without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega import api
from r1mega.config.errors import UserError
from r1mega.data.tokenfile import TokenFileWriter
from r1mega.data.tokenizer import encode_sample, make_response, train_tokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    worked = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}", str(a + b)) for a in range(30) for b in range(30)]
    tokenizer = train_tokenizer([" ".join(item) for item in worked], folder / "tokenizer", vocab_size=400)
    shared = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash}
    with TokenFileWriter(folder / "text", **shared) as text, TokenFileWriter(folder / "sft", kind="samples", **shared) as samples:
        for question, reasoning, answer in worked:
            text.add(tokenizer.encode(f"{question} {reasoning}"))
            samples.add(*encode_sample(tokenizer, question, make_response(reasoning, answer)))
    lines = [json.dumps({"question": question, "answer": answer}) for question, _, answer in worked[::7]]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    return folder


# bf16: a router whose scores are near a tie chooses another expert in the other program, so single tokens differ by much
@pytest.mark.parametrize(("precision", "difference"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_pretrain_sft_rl_eval_export_on_one_gpu(data: Path, tmp_path: Path, precision: str, difference: float) -> None:
    run = ["device=cuda", f"precision={precision}", "trainer.micro_batch_size=8", "trainer.global_batch_size=16"]
    steps = ["data.sequence_length=128", "optim.lr=2e-3", "optim.min_lr=2e-4", "optim.warmup_steps=5"]
    first = api.pretrain(
        *run,
        *steps,
        "model=tiny",
        f"out={tmp_path}/p",
        f"tokenizer={data}/tokenizer",
        f"data.train={{{data}/text:1}}",
        "trainer.steps=60",
    )
    losses = [json.loads(line)["lm_loss"] for line in (tmp_path / "p" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    assert (
        api.pretrain(
            *run,
            *steps,
            "model=tiny",
            f"out={tmp_path}/p",
            f"tokenizer={data}/tokenizer",
            f"data.train={{{data}/text:1}}",
            "trainer.steps=60",
        )["checkpoint"]
        == first["checkpoint"]
    )
    api.sft(*run, *steps, f"init={tmp_path}/p", f"out={tmp_path}/s", f"data.train={{{data}/sft:1}}", "trainer.steps=60")
    api.rl(
        "device=cuda",
        f"precision={precision}",
        f"init={tmp_path}/s",
        f"out={tmp_path}/r",
        f"data.problems={data}/problems.jsonl",
        "rl.rollouts=3",
        "rl.prompts_per_rollout=8",
        "rl.group_size=8",
        "rl.sampling.max_new_tokens=24",
    )
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and max(line["rollout_diff_mean"] for line in lines) < difference
    found = api.eval(
        "device=cuda",
        f"precision={precision}",
        f"checkpoint={tmp_path}/r",
        f"out={tmp_path}/e",
        f"data.problems={data}/problems.jsonl",
        "sampling.max_new_tokens=24",
    )
    assert 0.0 <= found["pass_at_1"] <= 1.0
    api.export("device=cuda", f"precision={precision}", f"checkpoint={tmp_path}/r", f"out={tmp_path}/x")
    assert (tmp_path / "x" / "hf" / "model.safetensors").is_file()


def tiny(data: Path, out: Path, *more: str) -> list[str]:
    """Overrides of a short pretraining of ``tiny`` on the GPU."""
    sizes = ["data.sequence_length=128", "trainer.global_batch_size=16", "trainer.micro_batch_size=8", "trainer.log_every=1"]
    place = ["device=cuda", "precision=bf16", f"out={out}", f"tokenizer={data}/tokenizer", f"data.train={{{data}/text:1}}"]
    return ["model=tiny", *place, *sizes, "optim.lr=2e-3", "optim.warmup_steps=2", *more]


def test_two_runs_give_the_same_bits_when_asked(data: Path, tmp_path: Path) -> None:
    """The switch that is on by default on a CPU. The process keeps what it sets, so the run is made twice in this one."""
    told = []
    for name in ("a", "b"):
        api.pretrain(*tiny(data, tmp_path / name, "trainer.steps=10", "device.deterministic=true"))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        manifest = json.loads(next((tmp_path / name / "checkpoints").glob("step-*/manifest.json")).read_text())["files"]
        shards = {file: entry["sha256"] for file, entry in manifest.items() if file.endswith(".distcp")}
        told.append(([(line["lm_loss"], line["grad_norm"]) for line in lines], shards))
    assert told[0] == told[1] and told[0][1]


def test_a_trace_names_kernels(data: Path, tmp_path: Path) -> None:
    api.pretrain(*tiny(data, tmp_path / "run", "trainer.steps=5", "profile=true"))
    events = json.loads((tmp_path / "run/profile/rank0.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert "CUDA" in (tmp_path / "run/profile/rank0.txt").read_text()


def test_a_gpu_that_is_full_says_who_holds_it(data: Path, tmp_path: Path) -> None:
    """The process may have 1.5 GiB; a step of 512 sequences wants more."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5 * 2**30) / total)
    try:
        sizes = ["trainer.micro_batch_size=512", "trainer.global_batch_size=512", "trainer.steps=2"]
        with pytest.raises(UserError, match=r"^memory: a step fits; got .*; lower trainer.micro_batch_size .* held .* GiB, "):
            api.pretrain(*tiny(data, tmp_path / "run", *sizes))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "weights" in (tmp_path / "run/memory/rank0.txt").read_text()
    assert (tmp_path / "run/memory/rank0.pickle").stat().st_size > 0
