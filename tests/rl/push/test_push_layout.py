"""Where published tensors end up in a server, against a loader of its own: tensor and expert parallel ranks, FP8, a draft model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.model.names import SCALE
from r1mega.model.published import published_config
from r1mega.rl.push import PushRuntime, TensorPush
from r1mega.rl.push.contract import INCOMPLETE
from r1mega.rl.push.layout import Layout
from tests.rl.push.cases import MODEL, weights
from tests.rl.push.stand_in import StandIn

BLOCKED = replace(MODEL, hidden_size=256, moe_ffn_size=128, q_lora_rank=128, kv_lora_rank=128)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
LAYOUTS = {
    "one rank": {},
    "tensor parallel": {"tp": 4},
    "experts apart": {"tp": 2, "ep": 2},
    "experts apart and cut": {"tp": 4, "ep": 2},
    "draft": {"tp": 2, "draft": True},
    "bf16": {"tp": 2, "dtype": "bfloat16"},
}


def served(model=MODEL, *, fp8=False, **options):
    """A server with old weights, and a push to it."""
    server = StandIn(model, **options)
    config = published_config(model, bos_id=0, eos_id=1, pad_id=2, dtype="float32")
    config |= {"quantization_config": FP8} if fp8 else {}
    engine = SimpleNamespace(version=-1)
    push = TensorPush(bucket_bytes=300_000, proof="none").build(PushRuntime(engine, config, lambda: [server]))
    push.send(weights(0, model), 1)
    push.choice = replace(push.choice, proof="checksum")
    server.paths.clear()
    return server, engine, push


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parameter_of_every_rank_is_proven(name):
    server, engine, push = served(**LAYOUTS[name])
    report = push.send(weights(1), 2)
    assert engine.version == 2 and server.label == "2" and report.proof == "checksum"
    for rank, model in enumerate(server.targets + server.drafts):
        for parameter in [*model.params, *model.experts]:
            _spoil(model, parameter)
            with pytest.raises(UserError) as caught:
                again = push.checksums.faults(server)
                assert again, f"{parameter} of rank {rank}"
                raise UserError(str(again[0]))
            assert parameter in str(caught.value)
            _spoil(model, parameter)
    assert push.checksums.faults(server) == []


def _spoil(model, parameter: str) -> None:
    """Turn the last bit over, and back."""
    held = model.params.get(parameter)
    if held is None:
        held = list(model.experts[parameter][max(model.experts[parameter])].values())[-1]
    held.view(torch.uint8).flatten()[-1] ^= 1


def test_fp8_weights_and_scales():
    server, engine, push = served(BLOCKED, fp8=True)
    push.send(weights(1, BLOCKED), 2)
    held = server.targets[0].params
    fused = held["model.layers.1.self_attn.fused_qkv_a_proj_with_mqa.weight"]
    assert (
        fused.dtype == torch.float8_e4m3fn
        and held["model.layers.1.self_attn.fused_qkv_a_proj_with_mqa.weight_scale_inv"].shape[0] == 3
    )
    assert held["model.layers.1.mlp.gate.weight"].dtype == torch.float32 and engine.version == 2


LOST = {
    "a missing scale": ("model.layers.1.self_attn.q_b_proj.weight" + SCALE, "model.layers.1.self_attn.q_b_proj.weight"),
    "an expert's missing scale": (
        "model.layers.2.mlp.experts.4.down_proj.weight" + SCALE,
        "model.layers.2.mlp.experts.4.down_proj.weight",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_scale_is_found_by_name(name):
    lost, wrong = LOST[name]
    server, engine, push = served(BLOCKED, fp8=True)
    state = {"lost": False}

    def before_load(pairs):
        if lost in dict(pairs) and not state["lost"]:
            state["lost"] = True
            return [pair for pair in pairs if pair[0] != lost]
        return pairs

    server.before_load = before_load
    with pytest.raises(UserError) as caught:
        push.send(weights(1, BLOCKED), 2)
    assert f"got wrong {wrong}:" in str(caught.value) and engine.version == -1 and server.label == f"{INCOMPLETE}2"


def test_a_stale_draft_is_found_by_name():
    server, engine, push = served(draft=True)
    server.stale_draft = True
    with pytest.raises(UserError) as caught:
        push.send(weights(1), 2)
    assert "got wrong model.layers.4.enorm.weight, model.layers.4.hnorm.weight, model.layers.4.eh_proj.weight" in str(caught.value)
    assert "draft.model.enorm.weight at" in str(caught.value) and engine.version == -1


def test_the_order_of_requests():
    server, _, push = served()
    push.send(weights(1), 2)
    paths = [path for at, path in enumerate(server.paths) if not at or path != server.paths[at - 1]]
    assert paths == [
        "/weights_checker",
        "drain",
        "/update_weight_version",
        "/update_weights_from_tensor",
        "drain",
        "/weights_checker",
        "/update_weight_version",
    ]
    server.features = replace(server.features, update_sessions=True)
    server.paths.clear()
    push.send(weights(0), 3)
    assert server.paths.count("/begin_weight_update") == server.paths.count("/end_weight_update") == 1
    begin, end = server.paths.index("/begin_weight_update"), server.paths.index("/end_weight_update")
    updates = [at for at, path in enumerate(server.paths) if path == "/update_weights_from_tensor"]
    assert begin < updates[0] and updates[-1] < end < server.paths.index("/weights_checker", end)


def test_the_server_may_be_another_model():
    server, _, push = served()
    server.targets[0].params["model.layers.0.self_attn.indexer.wk.weight"] = torch.zeros(2)
    push.checksums._layouts.clear()
    with pytest.raises(UserError, match="indexer"):
        push.send(weights(1), 2)
    del server.targets[0].params["model.layers.0.self_attn.indexer.wk.weight"], server.targets[0].params["model.norm.weight"]
    with pytest.raises(UserError, match="missing model.norm.weight"):
        push.send(weights(1), 2)


def test_what_cannot_be_told_is_refused():
    for info in ({"enable_eplb": True}, {"pp_size": 2}, {"ep_num_redundant_experts": 2}):
        with pytest.raises(UserError, match=f"{next(iter(info))}.*push.proof=probe"):
            Layout.of(info, [])
    server, _, push = served()
    server.info["quantization"] = "fp8"
    with pytest.raises(UserError, match="push.format"):
        push.send(weights(1), 2)
