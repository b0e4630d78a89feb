"""Published checkpoints that the tests of conversion make: true names and shapes, few layers and experts, random numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r1mega.config.compose import preset
from r1mega.config.convert import ConversionConfig, ConvertConfig
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.model.names import SCALE, parts
from r1mega.model.published import published_config
from r1mega.train.convert import fp8
from r1mega.train.convert.run import convert

SMALL = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "ffn_size": 40,
    "moe_ffn_size": 24,
    "num_experts": 8,
}
V3 = replace(
    preset("model", "deepseek_v3"),
    **SMALL,
    first_k_dense=1,
    q_lora_rank=24,
    top_k=4,
    num_groups=4,
    topk_groups=2,
    yarn=YarnConfig(),
)
MOONLIGHT = replace(preset("model", "moonlight_16b"), **SMALL)
V2_LITE = replace(preset("model", "deepseek_v2_lite"), **SMALL)
BLOCKS = replace(V3, hidden_size=160, moe_ffn_size=136, num_layers=2, num_experts=4, top_k=2, num_groups=1, topk_groups=1)
"""Wide enough for several blocks of 128 x 128 and ragged ones."""


def numbers(shape: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    """Like weights: a norm's are near 1, a matrix's of the size that keeps activations' size."""
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=draw)).to(dtype)
    return (torch.randn(shape, generator=draw) / math.sqrt(shape[-1])).to(dtype)


def publish(
    folder: Path,
    model: ModelConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype = torch.float32,
    scales: str | None = None,
    inv_freq: bool = False,
    files: int = 1,
) -> dict[str, torch.Tensor]:
    """Write a published checkpoint; returns its tensors. ``scales``: fp32 or ue8m0 for an FP8 one; ``files``: shards."""
    draw = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[Any, str] = {}
    for part in parts(model):
        if part.copy:
            tensors[part.name] = tensors[owners[part.key, part.start]].clone()
            continue
        owners[part.key, part.start] = part.name
        value = numbers(part.shape, torch.float32, draw)
        if part.role == "bias":
            tensors[part.name] = value.to(bias_dtype)
        elif scales and part.role == "linear":
            tensors[part.name], tensors[part.name + SCALE] = fp8.quantise(value, power_of_two=scales == "ue8m0")
        else:
            tensors[part.name] = value.to(dtype)
    if inv_freq:
        for layer in range(model.num_layers):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(model.qk_rope_head_dim // 2, generator=draw)
    write(folder, tensors, files)
    config = published_config(model, bos_id=0, eos_id=1, pad_id=2, dtype=str(dtype).removeprefix("torch."))
    if scales:
        quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
        config["quantization_config"] = quantization | ({"scale_fmt": "ue8m0"} if scales == "ue8m0" else {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    """The weights of a published checkpoint, and their index where there are several files."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, where = list(tensors), {}
    each = -(-len(names) // files)
    for number in range(files):
        group = names[number * each : (number + 1) * each]
        file = f"model-{number + 1:05d}-of-{files:06d}.safetensors"
        save_file({name: tensors[name] for name in group}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(group, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a published checkpoint, by stock code."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def run(source: Path, target: Path, *, verify: bool = False, probe_bytes: int = 0, **fields: Any) -> dict[str, Any]:
    """``r1mega convert`` with these fields, one worker."""
    own = {
        name: fields.pop(name)
        for name in ("vocab_multiple", "scale_format", "allow_mixed", "allow_equal", "workers")
        if name in fields
    }
    how = ConversionConfig(**{"workers": 1, **own}, verify=verify, probe_bytes=probe_bytes)
    return convert(ConvertConfig(source=str(source), target=str(target), convert=how, **fields))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name
