"""What the tests of a real SGLang server share: its model, ``tiny`` in fp32, in two sets of weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from r1mega.rl.engine import EngineRuntime
from r1mega.rl.engine.sglang.engine import ServedEngine

EOS = 1


@dataclass
class Home:
    """``engine``: over one server, whose weights are at first those of ``models[0]``; ``models``: two transformers models of
    ``hf_config``, in fp32; ``folders``: theirs in the published format; ``runtime``: the engine's; ``folder``: its logs'."""

    engine: ServedEngine
    runtime: EngineRuntime
    hf_config: dict
    models: list
    folders: list[Path]
    folder: Path

    def load(self, index: int, version: int) -> None:
        """Let the server load ``models[index]`` from disk, as ``version``."""
        server = self.engine.seats[0].server
        server.drain()
        body = {"model_path": str(self.folders[index]), "weight_version": str(version)}
        server.post("/update_weights_from_disk", body | {"load_format": "auto"})  # not the start's: dummy
        self.engine.version = version


def tiny_config() -> dict:
    """``config.json`` of configs/model/tiny.yaml, with weights wide enough for probabilities that differ."""
    from r1mega.config.compose import preset
    from r1mega.model.published import published_config

    made = published_config(preset("model", "tiny"), bos_id=0, eos_id=EOS, pad_id=2, dtype="float32")
    return made | {"initializer_range": 0.15}


def write_model(hf_config: dict, seed: int, folder: Path):
    """A random model, written to ``folder`` in the published format; returns it."""
    import torch
    from safetensors.torch import save_file
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from r1mega.testing.contracts import checkpoint_tensors

    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(dict(hf_config))).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    save_file({name: tensor.contiguous() for name, tensor in checkpoint_tensors(model)}, folder / "model.safetensors")
    return model
