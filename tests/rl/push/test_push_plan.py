"""Buckets, payloads and the push to an engine in memory."""

from __future__ import annotations

import base64
import pickletools
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.model.names import parts
from r1mega.registry import choices
from r1mega.rl.engine import EngineRuntime, LocalEngine
from r1mega.rl.push import MemoryPush, PushRuntime, wire
from r1mega.rl.push.plan import Coverage, atom_of, buckets, nbytes
from r1mega.rl.push.wire import encode, fill, room
from tests.rl.push.cases import CONFIG, MODEL, SETS
from tests.rl.push.stand_in import decode


def test_all_ways_are_registered():
    assert set(choices("push")) == {"auto", "memory", "tensor", "distributed", "disk"}


@pytest.mark.parametrize("capacity", [1, 30_000, 300_000, 1 << 30])
def test_buckets_hold_whole_atoms_in_order(capacity):
    made = list(buckets(iter(SETS[0]), capacity))
    assert [pair for bucket in made for pair in bucket] == SETS[0]
    for bucket, after in zip(made, [*made[1:], None], strict=True):
        atoms = {atom_of(name) for name, _ in bucket}
        assert len(atoms) == 1 or sum(nbytes(tensor) for _, tensor in bucket) <= capacity
        assert after is None or atom_of(after[0][0]) not in atoms
    attention = [{atom_of(name) for name, _ in bucket if "self_attn" in name} for bucket in made]
    assert sum(map(len, attention)) == len(set().union(*attention)) == MODEL.num_layers + MODEL.num_mtp_layers


def test_what_belongs_together_comes_side_by_side():
    pairs = [SETS[0][2], SETS[0][0], SETS[0][3]]
    assert atom_of(pairs[0][0]) == atom_of(pairs[2][0]) != atom_of(pairs[1][0])
    with pytest.raises(UserError, match="side by side"):
        list(buckets(pairs, 1 << 20))


def test_coverage_names_what_is_wrong():
    name, tensor = SETS[0][0]
    for given, said in (
        ([("model.embed.weight", tensor)], "name table; got model.embed.weight"),
        ([(name, tensor), (name, tensor)], f"got {name} twice"),
        ([(name, tensor[:-1])], f"{name} is "),
        ([(name, tensor.int())], "floating-point"),
        (SETS[0][1:], f"got no {name};"),
    ):
        coverage = Coverage(parts(MODEL))
        with pytest.raises(UserError) as caught:
            for pair in given:
                coverage.take(*pair)
            coverage.finish()
        assert said in str(caught.value)


@pytest.mark.parametrize("tight", [True, False])
def test_a_payload_is_what_went_in(tight):
    pairs = [
        ("a", torch.randn(3, 5).bfloat16()),
        ("b", torch.randn(7)),
        ("c", torch.randn(3, 3).to(torch.float8_e4m3fn)),
        ("d", torch.randn(2, 2)),
    ]
    bucket = fill(torch.empty(room(pairs), dtype=torch.uint8), pairs, tight=tight)
    assert sorted(bucket.names) == list("abcd")
    assert not tight or bucket.memory.numel() == sum(nbytes(tensor) for _, tensor in pairs)
    for name, tensor in decode(encode(bucket)):
        given = dict(pairs)[name]
        assert tensor.dtype == given.dtype and torch.equal(tensor.view(torch.uint8), given.view(torch.uint8))
    assert not [name for name in sys.modules if name.split(".")[0] == "sglang"], "the stand-in is gone"


def test_gpu_memory_goes_as_a_handle_by_its_unique_id(monkeypatch):
    from torch.multiprocessing import reductions

    bucket = fill(torch.empty(64, dtype=torch.uint8), [("a", torch.randn(3, 5))], tight=False)
    given = (
        torch.Tensor,
        torch.Size([60]),
        (1,),
        0,
        torch.UntypedStorage,
        torch.uint8,
        0,
        b"handle",
        64,
        0,
        False,
        b"",
        0,
        b"",
        False,
    )
    monkeypatch.setattr(wire.devices, "is_shared_by_handle", lambda device: True)
    monkeypatch.setattr(wire.devices, "unique_id", lambda device: "GPU-1234")
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (reductions.rebuild_cuda_tensor, given))
    payload = base64.b64decode(encode(bucket))
    found = [argument for _, argument, _ in pickletools.genops(payload) if isinstance(argument, str)]
    assert "GPU-1234" in found and "rebuild_cuda_tensor" in found and "torch.multiprocessing.reductions" in found
    modules = {text.split(" ")[0] for text in found if re.fullmatch(r"(sglang|torch|collections|copyreg)[.\w]*", text)}
    assert wire.BUCKET_MODULE in modules and not [text for text in found if text.startswith("r1mega")]


def test_memory_proves_what_the_engine_holds():
    engine = LocalEngine().build(EngineRuntime(CONFIG))
    push = MemoryPush().build(PushRuntime(engine, CONFIG))
    report = push.send(SETS[0], 1)
    assert engine.version == 1 and report.proof == "checksum" and report.num_bytes > 1e6
    wrong = "model.layers.1.mlp.experts.5.up_proj.weight"
    load = engine.load_weights

    def flipped(tensors, version):
        load(tensors, version)
        from r1mega.rl.engine.weights import destinations

        destinations(engine.model)[wrong].view(torch.int32)[0, 0] ^= 1

    engine.load_weights = flipped
    with pytest.raises(UserError, match=f"got wrong {wrong};"):
        push.send(SETS[1], 2)
    assert engine.version == -1
    with pytest.raises(UserError, match="push=memory"):
        MemoryPush().build(PushRuntime(SimpleNamespace(version=0), CONFIG))
