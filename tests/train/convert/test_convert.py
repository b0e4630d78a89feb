"""``r1mega convert`` there and back: bytes, FP8, resume, padding, what a training takes from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.model.names import SCALE
from r1mega.train import manifest
from r1mega.train.checkpoint import plain_tensors
from r1mega.train.convert import fp8
from r1mega.train.convert import run as running
from r1mega.train.convert.targets import NativeTarget
from tests.train.convert.cases import BLOCKS, MOONLIGHT, V2_LITE, V3, publish, read, run, same

SHAPES = {
    "v3": (V3, {}),
    "v3_bf16_bias_files": (V3, {"bias_dtype": torch.bfloat16, "files": 4}),
    "moonlight": (MOONLIGHT, {"bias_dtype": torch.bfloat16, "inv_freq": True, "files": 3}),
    "v2_lite": (V2_LITE, {}),
    "tied": (replace(V3, tie_embeddings=True, num_mtp_layers=0), {}),
    "fp32": (V3, {"dtype": torch.float32}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_byte_exact(tmp_path: Path, name: str) -> None:
    model, options = SHAPES[name]
    tensors = publish(tmp_path / "hf", model, **options)
    there = run(tmp_path / "hf", tmp_path / "native", verify=True, shard_bytes=40_000)
    back = run(tmp_path / "native", tmp_path / "back", verify=True)
    same(tensors, read(tmp_path / "back"))
    assert there["format"] == "native" and there["files"] > 1 and back["format"] == "hf" and back["tensors"] == len(tensors)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    assert {path.name for path in (tmp_path / "back").glob("*.safetensors")} == {
        path.name for path in (tmp_path / "hf").glob("*.safetensors")
    }
    assert not list(tmp_path.glob(".*")), "nothing is left beside the folders"


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_fp8_there_and_back(tmp_path: Path, scales: str) -> None:
    tensors = publish(tmp_path / "hf", BLOCKS, scales=scales)
    run(tmp_path / "hf", tmp_path / "native", verify=True)
    run(tmp_path / "native", tmp_path / "kept", dtype="fp8", verify=True)
    same(tensors, read(tmp_path / "kept"))
    assert (tmp_path / "kept/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()
    (tmp_path / "native/source/scales.safetensors").unlink()
    run(tmp_path / "native", tmp_path / "anew", dtype="fp8", verify=True)
    anew = read(tmp_path / "anew")
    assert tensors.keys() == anew.keys()
    for key, tensor in tensors.items():
        if scales == "fp32" and key.endswith(SCALE):
            assert ((anew[key] - tensor).abs() <= 2**-8 * tensor).all(), key
        elif scales == "ue8m0" and key + SCALE in tensors:  # 224 x s is 448 x s/2: two ways to write the same numbers
            left, right = (fp8.dequantise(held[key], held[key + SCALE], torch.float32) for held in (tensors, anew))
            assert torch.equal(left, right), key
        elif scales == "fp32":
            assert torch.equal(tensor.view(torch.uint8), anew[key].view(torch.uint8)), key
    run(tmp_path / "native", tmp_path / "bf16")
    plain = json.loads((tmp_path / "bf16/config.json").read_text())
    assert "quantization_config" not in plain and not [key for key in read(tmp_path / "bf16") if key.endswith(SCALE)]


def test_between_published_formats(tmp_path: Path) -> None:
    """FP8 to BF16 is what dequantising gives; other scales on request; BF16 to FP8 says so in the config."""
    tensors = publish(tmp_path / "hf", BLOCKS, scales="fp32")
    run(tmp_path / "hf", tmp_path / "bf16", format="hf", dtype="bf16", verify=True)
    plain = read(tmp_path / "bf16")
    for name in plain:
        scale = tensors.get(name + SCALE)
        wanted = tensors[name] if scale is None else fp8.dequantise(tensors[name], scale, torch.bfloat16)
        assert torch.equal(plain[name], wanted), name
    run(tmp_path / "hf", tmp_path / "two", format="hf", dtype="fp8", scale_format="ue8m0", verify=True)
    other = read(tmp_path / "two")
    assert all((torch.frexp(other[name]).mantissa == 0.5).all() for name in other if name.endswith(SCALE)), "powers of two"
    assert json.loads((tmp_path / "two/config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    run(tmp_path / "bf16", tmp_path / "again", format="hf", dtype="fp8")
    config = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128] and "scale_fmt" not in config


def test_the_ledger_names_every_tensor_both_ways(tmp_path: Path) -> None:
    tensors = publish(tmp_path / "hf", MOONLIGHT, inv_freq=True)
    run(tmp_path / "hf", tmp_path / "native")
    ledger = json.loads((tmp_path / "native/source/ledger.json").read_text())
    source, target = ledger["source"]["tensors"], ledger["target"]["tensors"]
    assert source.keys() == tensors.keys()
    assert all(record["to"] for record in source.values()) and all(record["from"] for record in target.values())
    expert = target["decoder.layers.1.mlp.experts.weight1@2,24,0"]
    assert expert["from"] == ["model.layers.1.mlp.experts.2.up_proj.weight"] and expert["how"] == "same"
    assert source[expert["from"][0]] | {"to": 0} == {**source[expert["from"][0]], "to": 0}
    assert source[expert["from"][0]]["sha256"] == expert["sha256"] and expert["shape"] == [24, 48]


def test_a_cut_off_conversion_goes_on(tmp_path: Path, monkeypatch) -> None:
    tensors = publish(tmp_path / "hf", V3, files=3)
    write, written = NativeTarget.write, []

    class Killed(Exception):
        pass

    def cut(self, unit, folder, watched):
        if len(written) == 2 and not resumed:
            raise Killed
        entry = write(self, unit, folder, watched)
        written.append(unit.file)
        return entry

    resumed = False
    monkeypatch.setattr(NativeTarget, "write", cut)
    with pytest.raises(Killed):
        run(tmp_path / "hf", tmp_path / "native", shard_bytes=60_000)
    assert not (tmp_path / "native").exists() and len(written) == 2
    resumed = True
    result = run(tmp_path / "hf", tmp_path / "native", shard_bytes=60_000, verify=True)
    assert result["resumed_files"] == 2 and sorted(written) == [f"__{at}_0.distcp" for at in range(result["files"])]
    again = run(tmp_path / "hf", tmp_path / "native", shard_bytes=60_000)
    assert again["resumed_files"] == again["files"] == len(written), "nothing is left to do"
    run(tmp_path / "native", tmp_path / "back")
    same(tensors, read(tmp_path / "back"))


def test_another_source_starts_anew(tmp_path: Path) -> None:
    publish(tmp_path / "hf", V3)
    first = run(tmp_path / "hf", tmp_path / "native")
    publish(tmp_path / "hf", replace(V3, num_layers=2))
    second = run(tmp_path / "hf", tmp_path / "native", verify=True)
    assert second["resumed_files"] == 0 and second["tensors"] < first["tensors"]


def test_padding_rows_come_and_go(tmp_path: Path) -> None:
    tensors = publish(tmp_path / "hf", replace(V3, vocab_size=90))
    run(tmp_path / "hf", tmp_path / "native", vocab_multiple=64, verify=True)
    model = manifest.read_model(tmp_path / "native")
    assert (model.vocab_size, model.vocab_padding) == (128, 38)
    stored = plain_tensors(tmp_path / "native")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert stored[key].shape[0] == 128 and not stored[key][90:].any() and stored[key][:90].any()
    run(tmp_path / "native", tmp_path / "back", verify=True)
    same(tensors, read(tmp_path / "back"))


def test_refusals(tmp_path: Path) -> None:
    publish(tmp_path / "hf", V3)
    run(tmp_path / "hf", tmp_path / "native")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="target: a new folder or an earlier conversion; got .*other with other files"):
        run(tmp_path / "hf", tmp_path / "other")
    with pytest.raises(UserError, match="target: a folder beside the source"):
        run(tmp_path / "hf", tmp_path / "hf")
    with pytest.raises(UserError, match="dtype: bf16, fp32 or as_is with format=native.*; got fp8"):
        run(tmp_path / "hf", tmp_path / "x", dtype="fp8")
    with pytest.raises(UserError, match="format: hf for a native source"):
        run(tmp_path / "native", tmp_path / "x", format="native")
    with pytest.raises(UserError, match="source: a Hugging Face folder .* or a checkpoint of r1mega"):
        run(tmp_path / "other", tmp_path / "x")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    publish(tmp_path / "hf", V3)
    usage = running.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(UserError, match=r"target: 0\.\d GiB of free disk .*; got 0\.0 GiB; make room"):
        run(tmp_path / "hf", tmp_path / "native")
    assert not list(tmp_path.rglob("*.distcp*"))


@pytest.mark.parametrize("name", ["v3", "moonlight", "v2_lite", "tied"])
def test_the_probe_compares_logits_with_transformers(tmp_path: Path, name: str) -> None:
    model, options = SHAPES[name]
    publish(tmp_path / "hf", model, **options)
    probe = run(tmp_path / "hf", tmp_path / "native", verify=True, probe_bytes=1 << 30)["verified"]["probe"]
    assert probe["max_difference"] < 1e-4 and probe["largest_logit"] > 0.1 and probe["tokens"] == 48


def test_the_probe_dequantises_what_transformers_cannot_run(tmp_path: Path) -> None:
    publish(tmp_path / "hf", BLOCKS, scales="fp32")
    probe = run(tmp_path / "hf", tmp_path / "native", verify=True, probe_bytes=1 << 30)["verified"]["probe"]
    assert probe["max_difference"] < 1e-4
    small = run(tmp_path / "hf", tmp_path / "native", verify=True, probe_bytes=1 << 10)["verified"]["probe"]
    assert "convert.probe_bytes 1024" in small["skipped"]


def test_the_probe_sees_a_model_that_computes_otherwise(tmp_path: Path, monkeypatch) -> None:
    from r1mega.train import trainee

    publish(tmp_path / "hf", V3)
    run(tmp_path / "hf", tmp_path / "native")
    right = trainee.transformer_config
    monkeypatch.setattr(trainee, "transformer_config", lambda model, *rest: right(replace(model, routed_scaling_factor=1.0), *rest))
    with pytest.raises(UserError, match=r"target .*: logits of transformers' model within .*; got a difference of"):
        run(tmp_path / "hf", tmp_path / "native", verify=True, probe_bytes=1 << 30)
