"""The same commands on a GPU with NCCL: nothing here knows of CUDA but the overrides. Skipped without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega import api
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
