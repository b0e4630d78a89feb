"""Planted faults: each ends the conversion, or the look at a finished one, with a line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.config.errors import UserError
from r1mega.model.names import SCALE
from tests.train.convert.cases import BLOCKS, V3, publish, read, run

LAYER = "model.layers.1.mlp.experts"


def change(folder: Path, name: str, do: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the file that holds the tensor ``name``."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            do(tensors)
            save_file(tensors, file, {"format": "pt"})
            return
    raise AssertionError(name)


def swap(left: str, right: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def do(tensors: dict[str, torch.Tensor]) -> None:
        tensors[left], tensors[right] = tensors[right], tensors[left]

    return do


def copy(source: str, target: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def do(tensors: dict[str, torch.Tensor]) -> None:
        tensors[target] = tensors[source].clone()

    return do


def missing_shard(folder: Path) -> str:
    (folder / "model-00002-of-000003.safetensors").unlink()
    return "model-00002-of-000003.safetensors"


def truncated(folder: Path) -> str:
    file = folder / "model-00003-of-000003.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    return "model-00003-of-000003.safetensors"


def index_of_nothing(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00009-of-000003.safetensors"
    path.write_text(json.dumps(index))
    return "model-00009-of-000003.safetensors"


def extra(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["model.layers.0.mlp.fourth_proj.weight"] = torch.zeros(3)
    save_file(tensors, file, {"format": "pt"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.mlp.fourth_proj.weight"] = file.name
    path.write_text(json.dumps(index))
    return "model.layers.0.mlp.fourth_proj.weight"


def absent(folder: Path) -> str:
    name = "model.layers.2.self_attn.o_proj.weight"
    change(folder, name, lambda tensors: tensors.pop(name))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    return name


def wrong_dtype(folder: Path) -> str:
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    change(folder, name, lambda tensors: tensors.update({name: tensors[name].to(torch.float16)}))
    return rf"{name} is BF16; got F16"


def integers(folder: Path) -> str:
    name = "model.norm.weight"
    change(folder, name, lambda tensors: tensors.update({name: tensors[name].view(torch.int16)}))
    return rf"{name} is BF16; got I16"


def other_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["moe_intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    return r"mlp\.\S+ has the shape \[.*32.*\] of config.json; got \[.*24.*\]"


def twice(folder: Path) -> str:
    change(folder, f"{LAYER}.3.down_proj.weight", copy(f"{LAYER}.2.down_proj.weight", f"{LAYER}.3.down_proj.weight"))
    return rf"{LAYER}.3.down_proj.weight with the very content of {LAYER}.2.down_proj.weight"


def another_embedding(folder: Path) -> str:
    name = "model.layers.3.embed_tokens.weight"
    change(folder, name, lambda tensors: tensors.update({name: tensors[name] + 1}))
    return rf"{name} repeats model.embed_tokens.weight"


PUBLISHED = [
    missing_shard, truncated, index_of_nothing, extra, absent, wrong_dtype, integers, other_config, twice, another_embedding
]  # fmt: skip


@pytest.mark.parametrize("plant", PUBLISHED, ids=lambda plant: plant.__name__)
def test_a_fault_of_the_source_is_named(tmp_path: Path, plant: Callable[[Path], str]) -> None:
    publish(tmp_path / "hf", V3, files=3)
    told = plant(tmp_path / "hf")
    with pytest.raises(UserError, match=told) as caught:
        run(tmp_path / "hf", tmp_path / "native")
    assert "\n" not in str(caught.value) and not (tmp_path / "native").exists()


def test_what_is_meant_can_be_allowed(tmp_path: Path) -> None:
    publish(tmp_path / "hf", V3)
    wrong_dtype(tmp_path / "hf")
    twice(tmp_path / "hf")
    with pytest.raises(UserError, match=r"convert.allow_mixed=true takes it as it is"):
        run(tmp_path / "hf", tmp_path / "native", allow_equal=True)
    with pytest.raises(UserError, match=r"convert.allow_equal=true for a model that was grown"):
        run(tmp_path / "hf", tmp_path / "native", allow_mixed=True, dtype="fp32")
    with pytest.raises(UserError, match=r"dtype: one for all tensors of a native checkpoint; got BF16 and F16 in"):
        run(tmp_path / "hf", tmp_path / "native", allow_equal=True, allow_mixed=True)
    run(tmp_path / "hf", tmp_path / "native", allow_equal=True, allow_mixed=True, dtype="fp32", verify=True)


@pytest.mark.parametrize("fault", ["missing", "bf16", "shape", "plain"])
def test_a_fault_of_the_scales_is_named(tmp_path: Path, fault: str) -> None:
    publish(tmp_path / "hf", BLOCKS, scales="fp32")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        if fault == "missing":
            del tensors[name + SCALE]
        elif fault == "bf16":
            tensors[name + SCALE] = tensors[name + SCALE].bfloat16()
        elif fault == "shape":
            tensors[name + SCALE] = tensors[name + SCALE].T.contiguous()[:1]
        else:
            tensors[name] = tensors[name].to(torch.bfloat16)

    change(tmp_path / "hf", name, plant)
    with pytest.raises(UserError, match=name.replace(".", r"\.") + (SCALE if fault != "plain" else " is F8_E4M3; got BF16")):
        run(tmp_path / "hf", tmp_path / "native")


GATE, UP = f"{LAYER}.5.gate_proj.weight", f"{LAYER}.5.up_proj.weight"
LEDGERED = {
    "swapped": (GATE, swap(GATE, UP), rf"{LAYER}.5.\w+_proj.weight .*got the content of {LAYER}.5.\w+_proj.weight"),
    "twice": (GATE, copy(f"{LAYER}.4.gate_proj.weight", GATE), rf"{GATE} .*got the content of {LAYER}.4.gate_proj.weight"),
    "bit": (GATE, lambda tensors: tensors[GATE].view(torch.uint8)[3, 5].bitwise_xor_(4), rf"{GATE} .*got other content"),
}


@pytest.mark.parametrize("fault", LEDGERED)
def test_a_source_with_a_ledger_is_what_the_ledger_says(tmp_path: Path, fault: str) -> None:
    """What nobody can see in weights alone: those that we wrote carry their hashes."""
    publish(tmp_path / "first", V3)
    run(tmp_path / "first", tmp_path / "native")
    run(tmp_path / "native", tmp_path / "hf")
    name, do, told = LEDGERED[fault]
    change(tmp_path / "hf", name, do)
    with pytest.raises(UserError, match=told):
        run(tmp_path / "hf", tmp_path / "again")


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("fault", LEDGERED)
def test_a_second_look_finds_what_changed_on_either_side(tmp_path: Path, side: str, fault: str) -> None:
    publish(tmp_path / "hf", BLOCKS if side == "source" and fault == "bit" else V3)
    target = run(tmp_path / "hf", tmp_path / "other", format="hf", verify=True)
    assert target["verified"]["tensors"] == len(read(tmp_path / "other"))
    name, do, told = LEDGERED[fault]
    name = name if side == "target" or fault != "bit" else "model.norm.weight"
    if side == "source":
        held = {path: path.stat() for path in (tmp_path / "hf").glob("*.safetensors")}

        def flip(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name].view(torch.uint8)[1] ^= 1

        change(tmp_path / "hf", name, flip if fault == "bit" else do)
        import os

        for path, stat in held.items():  # what a disk does says nothing of when
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        change(tmp_path / "other", name, do)
    with pytest.raises(UserError, match=f"(source|target) .*{name if fault == 'bit' else LAYER}"):
        run(tmp_path / "hf", tmp_path / "other", format="hf", verify=True)


@pytest.mark.parametrize("fault", ["bit", "gone", "cut"])
def test_a_spoilt_native_target_is_named(tmp_path: Path, fault: str) -> None:
    publish(tmp_path / "hf", V3)
    run(tmp_path / "hf", tmp_path / "native", shard_bytes=60_000)
    file = tmp_path / "native/weights/__1_0.distcp"
    data = bytearray(file.read_bytes())
    if fault == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data[:-100] if fault == "cut" else data))
    with pytest.raises(UserError, match="__1_0.distcp" if fault != "bit" else r"decoder\.|embedding|__1_0"):
        run(tmp_path / "hf", tmp_path / "native", shard_bytes=60_000, verify=True)


@pytest.mark.parametrize("file", ["scales.safetensors", "config.json", "../state.json"])
def test_what_lies_beside_the_weights_is_what_it_was(tmp_path: Path, file: str) -> None:
    publish(tmp_path / "hf", BLOCKS, scales="fp32")
    run(tmp_path / "hf", tmp_path / "native")
    path = tmp_path / "native/source" / file
    if path.suffix == ".json":
        path.write_text(path.read_text().replace("10000.0", "777.0"))
    else:
        tensors = load_file(path)
        tensors[f"{LAYER}.2.up_proj.weight{SCALE}"] *= 1.03
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"checkpoint .*{path.name}"):
        run(tmp_path / "native", tmp_path / "again", dtype="fp8")


@pytest.mark.parametrize("fault", ["gone", "bit"])
def test_a_spoilt_target_is_not_whole(tmp_path: Path, fault: str) -> None:
    publish(tmp_path / "hf", V3)
    run(tmp_path / "hf", tmp_path / "native")
    file = tmp_path / "native/weights/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink() if fault == "gone" else file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="target .*: __0_0.distcp .*; remove the folder and run the same command"):
        run(tmp_path / "hf", tmp_path / "native")


ODD = {
    "architectures": ([["x"]], "architectures: a list of names"),
    "torch_dtype": (["bfloat16"], "dtype: one of bfloat16, float32, float16"),
}


@pytest.mark.parametrize("key", ODD)
def test_an_odd_config_is_answered_by_one_line(tmp_path: Path, key: str) -> None:
    publish(tmp_path / "hf", V3)
    value, told = ODD[key]
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=told):
        run(tmp_path / "hf", tmp_path / "native")


def test_another_file_called_ledger_is_named(tmp_path: Path) -> None:
    publish(tmp_path / "hf", V3)
    (tmp_path / "hf/ledger.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="ledger.json: a ledger of r1mega convert; got another file of that name"):
        run(tmp_path / "hf", tmp_path / "native")
