"""``export``: a real checkpoint becomes a folder that stock code loads, tokenizer included."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.config.rl import ExportConfig
from r1mega.config.run import ParallelConfig
from r1mega.data.tokenizer import encode_prompt, load_tokenizer
from r1mega.train import checkpoint
from r1mega.train.export import export
from r1mega.train.policy import Policy
from tests.train.cases import CPU, MODEL, one_rank


def config(seed_run: Path, target: Path, **changes) -> ExportConfig:
    return ExportConfig(device=CPU, checkpoint=str(seed_run), target=str(target), **changes)


def test_stock_code_loads_model_and_tokenizer(seed_run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = export(config(seed_run, tmp_path / "hf"))
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert published.dtype == torch.float32 and published.generation_config.eos_token_id == published.config.eos_token_id
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(checkpoint.resolve(seed_run) / "tokenizer")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(chat, add_special_tokens=False).input_ids
    assert ids == encode_prompt(ours, "1+2") and tokenizer.eos_token_id == ours.eos_id == published.config.eos_token_id
    policy = Policy(MODEL, None, one_rank(), "fp32")
    policy.load(checkpoint.resolve(seed_run), weights_only=True)
    tokens = torch.tensor([ids, list(range(30, 30 + len(ids)))])
    got = policy.score([SimpleNamespace(tokens_BS=tokens)], lambda logits, batch: logits)[0]
    with torch.no_grad():
        torch.testing.assert_close(got, published(tokens).logits, atol=1e-4, rtol=0)
    assert result["target"] == str(tmp_path / "hf") and result["parameters"] > 50_000
    assert not list(tmp_path.glob(".hf*")), "nothing is left beside the folder"


def test_bf16_keeps_the_bias_in_fp32_and_shards_have_an_index(seed_run: Path, tmp_path: Path, monkeypatch) -> None:
    from safetensors.torch import load_file

    whole = export(config(seed_run, tmp_path / "whole"))
    result = export(config(seed_run, tmp_path / "hf", dtype="bf16", shard_bytes=50_000))
    assert result["tensors"] == whole["tensors"] and result["parameters"] == whole["parameters"]
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "hf" / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2 and all(sum(t.nbytes for t in shard.values()) <= 50_000 for shard in shards.values())
    tensors = {name: shards[file][name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    exact = load_file(tmp_path / "whole/model.safetensors")
    assert tensors.keys() == exact.keys()
    for name, tensor in tensors.items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert tensor.dtype == kept and torch.equal(tensor, exact[name].to(kept))


def test_refusals(seed_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="parallel: export reads files"):
        export(config(seed_run, tmp_path / "hf", parallel=ParallelConfig(tensor=2)))
    with pytest.raises(UserError, match="source: a Hugging Face folder .* or a checkpoint of r1mega"):
        export(config(tmp_path / "none", tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
