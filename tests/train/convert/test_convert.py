"""``r1mega convert`` there and back: bytes, FP8, resume, padding, what a training takes from it."""

from __future__ import annotations

import json
import shutil
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


def without_source(native: Path) -> None:
    """As a training leaves a checkpoint: no ledger, no kept scales."""
    shutil.rmtree(native / "source")
    (native / "manifest.json").unlink()
    manifest.write(native, manifest.hashes(native))


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_fp8_there_and_back(tmp_path: Path, scales: str) -> None:
    tensors = publish(tmp_path / "hf", BLOCKS, scales=scales)
    run(tmp_path / "hf", tmp_path / "native", verify=True)
    run(tmp_path / "native", tmp_path / "kept", dtype="fp8", verify=True)
    same(tensors, read(tmp_path / "kept"))
    assert (tmp_path / "kept/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()
    without_source(tmp_path / "native")
    run(tmp_path / "native", tmp_path / "anew", dtype="fp8", scale_format=scales, verify=True)
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
    monkeypatch.setattr(
        trainee, "transformer_config", lambda model, *rest, **more: right(replace(model, routed_scaling_factor=1.0), *rest, **more)
    )
    with pytest.raises(UserError, match=r"target .*: logits of transformers' model within .*; got a difference of"):
        run(tmp_path / "hf", tmp_path / "native", verify=True, probe_bytes=1 << 30)


LOSSY = {
    "fp32 to bf16": ({"dtype": torch.float32}, {"dtype": "bf16"}, {}),
    "bf16 to fp8": ({}, {}, {"dtype": "fp8"}),
    "fp32 to fp8": ({"dtype": torch.float32}, {}, {"dtype": "fp8"}),
    "fp8 to fp32": ({"scales": "fp32"}, {"dtype": "fp32"}, {}),
}


@pytest.mark.parametrize("name", LOSSY)
def test_rounding_is_no_fault_of_the_probe(tmp_path: Path, name: str) -> None:
    options, there, back = LOSSY[name]
    publish(tmp_path / "hf", BLOCKS, **options)
    found = [run(tmp_path / "hf", tmp_path / "native", verify=True, probe_bytes=1 << 30, **there)["verified"]["probe"]]
    found.append(run(tmp_path / "native", tmp_path / "back", verify=True, probe_bytes=1 << 30, **back)["verified"]["probe"])
    assert any("rounded" in probe.get("skipped", "") for probe in found) == (name != "fp8 to fp32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_native_as_is_holds_every_number(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = publish(tmp_path / "hf", V3, dtype=dtype)
    run(tmp_path / "hf", tmp_path / "native", verify=True)
    assert json.loads((tmp_path / "native/state.json").read_text())["dtype"] == "float32"
    run(tmp_path / "native", tmp_path / "back", dtype="fp32")
    back = read(tmp_path / "back")
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in tensors.items())


def test_one_conversion_at_a_time(tmp_path: Path, monkeypatch) -> None:
    publish(tmp_path / "hf", V3)
    write = NativeTarget.write

    def second(self, unit, folder, watched):
        with pytest.raises(UserError, match="target: one conversion at a time; got another one at work on"):
            run(tmp_path / "hf", tmp_path / "native", dtype="fp32")
        return write(self, unit, folder, watched)

    monkeypatch.setattr(NativeTarget, "write", second)
    run(tmp_path / "hf", tmp_path / "native")
    monkeypatch.setattr(NativeTarget, "write", write)
    run(tmp_path / "native", tmp_path / "back", verify=True)


def test_a_finished_file_that_changed_is_written_again(tmp_path: Path, monkeypatch) -> None:
    tensors = publish(tmp_path / "hf", V3, files=3)
    write, written = NativeTarget.write, []

    def cut(self, unit, folder, watched):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(unit.file)
        return write(self, unit, folder, watched)

    monkeypatch.setattr(NativeTarget, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "hf", tmp_path / "native", shard_bytes=60_000)
    monkeypatch.setattr(NativeTarget, "write", write)
    aside = tmp_path / ".native.partial"
    flip(aside / "weights/__1_0.distcp")
    (aside / "journal/__2_0.distcp.json").write_text("")
    assert run(tmp_path / "hf", tmp_path / "native", shard_bytes=60_000, verify=True)["resumed_files"] == 1
    run(tmp_path / "native", tmp_path / "back")
    same(tensors, read(tmp_path / "back"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("moment", ["old is away", "new is there", "journal is left"])
def test_a_kill_while_the_target_appears_loses_nothing(tmp_path: Path, monkeypatch, moment: str) -> None:
    """The old target, or the new one, is there after the next call, and nothing else beside it."""
    from r1mega.train.convert import finish

    publish(tmp_path / "hf", V3)
    run(tmp_path / "hf", tmp_path / "native", dtype="fp32")

    class Killed(Exception):
        pass

    rename, removed = Path.rename, shutil.rmtree

    def cut_rename(self, target):
        if self.name.endswith(".partial") and moment == "old is away":
            raise Killed
        done = rename(self, target)
        if self.name.endswith(".partial") and moment == "new is there":
            raise Killed
        return done

    def cut_remove(path, *rest, **options):
        if Path(path).name == "journal" and Path(path).is_dir() and moment == "journal is left":
            raise Killed
        return removed(path, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", cut_rename)
        patched.setattr(finish.shutil, "rmtree", cut_remove)
        with pytest.raises(Killed):
            run(tmp_path / "hf", tmp_path / "native", dtype="bf16")
    result = run(tmp_path / "hf", tmp_path / "native", dtype="bf16", verify=True)
    assert result["resumed_files"] == result["files"], "no file is written twice"
    assert not list(tmp_path.glob(".native*")) and not (tmp_path / "native/journal").exists()
    manifest.verify(tmp_path / "native")


def test_what_a_user_put_into_a_target_stays(tmp_path: Path) -> None:
    publish(tmp_path / "hf", V3)
    run(tmp_path / "hf", tmp_path / "native")
    (tmp_path / "native/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="target: nothing but an earlier conversion; got notes.txt in"):
        run(tmp_path / "hf", tmp_path / "native", dtype="fp32")
    assert not list(tmp_path.glob(".native*"))
    (tmp_path / ".native.partial/journal").mkdir(parents=True)  # of another conversion that was cut off
    assert run(tmp_path / "hf", tmp_path / "native")["resumed_files"] == 1 and not list(tmp_path.glob(".native*"))
    with pytest.raises(UserError, match="target: a new folder or an earlier conversion to hf; got one to native"):
        run(tmp_path / "hf", tmp_path / "native", format="hf")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="target: a folder; got a file"):
        run(tmp_path / "hf", tmp_path / "file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    run(tmp_path / "hf", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere/manifest.json").is_file()


def test_files_are_no_larger_than_asked_for(tmp_path: Path) -> None:
    publish(tmp_path / "hf", V3)
    run(tmp_path / "hf", tmp_path / "native")
    run(tmp_path / "native", tmp_path / "back", shard_bytes=30_000)
    sizes = [sum(tensor.nbytes for tensor in read_one(file).values()) for file in (tmp_path / "back").glob("*.safetensors")]
    assert len(sizes) > 5 and max(sizes) <= 30_000


def read_one(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_threads_hold_no_more_than_the_largest_file(tmp_path: Path, monkeypatch) -> None:
    """What is alive while a tensor is made, over all threads, by the sizes that the plan names."""
    from r1mega.train.convert import targets

    publish(tmp_path / "hf", V3, files=2)
    held, most = [0], [0]
    read = targets.PublishedSource.read
    import threading
    import weakref

    lock = threading.Lock()

    def counted(self, part):
        piece = read(self, part)
        size = piece.value.nbytes
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])

        def gone():
            with lock:
                held[0] -= size

        weakref.finalize(piece.value, gone)
        return piece

    monkeypatch.setattr(targets.PublishedSource, "read", counted)
    run(tmp_path / "hf", tmp_path / "native", workers=4, shard_bytes=20_000, dtype="fp32")
    largest = max(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert 0 < most[0] <= largest
    assert held[0] == 0
