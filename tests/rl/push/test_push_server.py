"""Pushes to a real SGLang server: every way, and faults planted on the way, each found by name before a token is sampled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.rl.push import DiskPush, DistributedPush, TensorPush
from r1mega.rl.push.contract import INCOMPLETE
from r1mega.rl.push.plan import atom_of
from r1mega.rl.push.probe import Probe
from r1mega.rl.push.wire import Bucket
from tests.rl.push.cases import MODEL, SETS

WAYS = {"tensor": TensorPush, "distributed": DistributedPush, "disk": DiskPush}
SMALL = 400_000
SENT = sum(tensor.numel() * 4 for name, tensor in SETS[0] if not name.startswith("model.layers.4."))
"""Bytes without the MTP layer, which this server has no draft model for."""
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
LINE = [5, 17, 300, 42, 99, 7, 260, 261, 12, 400]


def logprobs(server, line: list[int] = LINE) -> list[float]:
    body = {"input_ids": line, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": 0}
    return [entry[0] for entry in server.post("/generate", body)["meta_info"]["input_token_logprobs"][1:]]


@pytest.mark.parametrize("name", WAYS)
def test_every_way_brings_the_same_weights(served, name, tmp_path):
    push = WAYS[name](bucket_bytes=SMALL, proof="checksum").build(served.runtime)
    seen = {}
    for _ in range(3):
        tensors, version = served.next()
        report = push.send(iter(tensors), version)
        assert served.engine.version == version and served.label == str(version)
        assert report.proof == "checksum" and report.buckets > 5 and 0 <= report.num_bytes - SENT < 16 * len(tensors)
        assert report.seconds > report.proof_seconds > 0 and report.server_seconds[served.server.url] > 0
        got = logprobs(served.server)
        assert seen.setdefault(version % 2, got) == got, "the same weights give the same log-probabilities"
    push.close()
    assert seen[0] != seen[1]
    assert served.__dict__.setdefault("seen", seen) == seen, "whatever way they came"


class Planted:
    """A way that does something wrong with buckets, until the last one has gone."""

    def __init__(self, way, change: Callable[[Bucket], Bucket | None]):
        self.__dict__ |= {"way": way, "change": change, "on": True}

    def __getattr__(self, name):
        return getattr(self.way, name)

    def deliver(self, bucket):
        bucket = self.change(bucket) if self.on else bucket
        if bucket is not None:
            self.way.deliver(bucket)

    def finish(self):
        self.__dict__["on"] = False
        self.way.finish()


def named(bucket: Bucket) -> dict[str, torch.Tensor]:
    return dict(bucket.pairs)


def without(*names: str):
    return lambda bucket: Bucket([pair for pair in bucket.pairs if pair[0] not in names], bucket.memory)


def change(name: str, how: Callable[[torch.Tensor], None]):
    def at(bucket: Bucket) -> Bucket:
        if name in bucket.names:
            how(named(bucket)[name])
        return bucket

    return at


def renamed(names: dict[str, str]):
    return lambda bucket: Bucket([(names.get(name, name), tensor) for name, tensor in bucket.pairs], bucket.memory)


def flip(tensor: torch.Tensor) -> None:
    tensor.view(torch.int32)[3, 5] ^= 1


def swap(first: str, second: str):
    """The numbers of two tensors of one shape."""
    return renamed({first: second, second: first})


class Repeated:
    """The bucket before, in place of number 4."""

    def __init__(self):
        self.count, self.last = 0, None
        self.lost: list[str] = []

    def __call__(self, bucket: Bucket) -> Bucket:
        self.count += 1
        last, self.last = self.last, Bucket([(name, tensor.clone()) for name, tensor in bucket.pairs], bucket.memory)
        if self.count != 5:
            return bucket
        self.lost = bucket.names
        memory = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in last.pairs])
        at, views = 0, []
        for name, tensor in last.pairs:
            size = tensor.numel() * tensor.element_size()
            views.append((name, memory[at : at + size].view(tensor.dtype).view(tensor.shape)))
            at += size
        return Bucket(views, memory)


QUERY, KEY = "model.layers.2.self_attn.q_a_proj.weight", "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
STALE = "model.layers.1.self_attn.o_proj.weight"
FAULTS = {
    "one element flipped": (change(EXPERT.format(5, "gate"), flip), [EXPERT.format(5, "gate")]),
    "an expert skipped": (
        without(*(EXPERT.format(3, kind) for kind in ("gate", "up", "down"))),
        [EXPERT.format(3, "up"), EXPERT.format(3, "down")],
    ),
    "gate and up swapped": (
        swap("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ["model.layers.0.mlp.up_proj.weight"],
    ),
    "two experts exchanged": (swap(EXPERT.format(2, "down"), EXPERT.format(6, "down")), [EXPERT.format(6, "down")]),
    "stale layer": (without(STALE), [STALE]),
    "q_a without kv_a": (without(KEY), [QUERY, KEY]),
    "expert bias dropped": (without(BIAS), [BIAS]),
    "rounded to bf16": (
        change("model.layers.0.input_layernorm.weight", lambda tensor: tensor.copy_(tensor.bfloat16())),
        ["model.layers.0.input_layernorm.weight"],
    ),
}


def fails(served, push, fault, tensors=None) -> str:
    """The error of a push with a planted fault; the engine may not serve after it."""
    given, version = served.next()
    push.way = Planted(push.way, fault)
    with pytest.raises(UserError) as caught:
        push.send(given if tensors is None else tensors(given), version)
    push.way = push.way.way
    assert served.engine.version == -1 and served.label == f"{INCOMPLETE}{version}"
    return str(caught.value)


@pytest.fixture(scope="module")
def by_tensor(served):
    push = TensorPush(bucket_bytes=SMALL, proof="checksum").build(served.runtime)
    tensors, version = served.next()
    push.send(tensors, version)
    return push


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_name(served, by_tensor, name):
    fault, wrong = FAULTS[name]
    said = fails(served, by_tensor, fault)
    assert said.startswith("push.proof") and f"got wrong {', '.join(wrong)}:" in said and served.server.url in said


def test_a_bucket_twice_in_place_of_the_next_one(served, by_tensor):
    fault = Repeated()
    said = fails(served, by_tensor, fault)
    lost = [name for name in fault.lost if f"{name}," in said or f"{name}:" in said]
    assert lost, f"{said} names none of {fault.lost}"


def test_weights_that_come_once_give_the_parameter(served, by_tensor):
    said = fails(served, by_tensor, change(EXPERT.format(5, "gate"), flip), tensors=iter)
    assert "model.layers.1.mlp.experts.w13_weight" in said and EXPERT.format(0, "gate") in said


def test_disk_names_the_tensor_in_a_stack(served):
    push = DiskPush(bucket_bytes=SMALL, proof="checksum").build(served.runtime)
    said = fails(served, push, change(EXPERT.format(5, "gate"), flip))
    assert f"got wrong {EXPERT.format(5, 'gate')}:" in said


def test_the_group_is_made_again_after_a_failure(served):
    push = DistributedPush(bucket_bytes=SMALL, proof="checksum").build(served.runtime)
    tensors, version = served.next()
    push.send(tensors, version)
    first = push.way._name
    said = fails(served, push, change(EXPERT.format(5, "gate"), flip))
    assert f"got wrong {EXPERT.format(5, 'gate')}:" in said
    tensors, version = served.next()
    push.send(tensors, version)
    assert push.way._name != first and served.engine.version == version
    push.close()


def test_what_does_not_come_is_named_before_the_version_is(served, by_tensor):
    for lost, kind in (("model.layers.4.eh_proj.weight", "no"), ("model.layers.1.mlp.gate.weight", "no")):
        said = fails(served, by_tensor, lambda bucket: bucket, lambda given, lost=lost: [pair for pair in given if pair[0] != lost])
        assert f"got {kind} {lost}" in said
    said = fails(served, by_tensor, lambda bucket: bucket, lambda given: [*given, given[3]])
    assert "comes side by side" in said or "twice" in said


def test_what_servers_hold_later_is_compared_with_the_last_push(served):
    first, second = (TensorPush(bucket_bytes=SMALL, proof="checksum").build(served.runtime) for _ in range(2))
    assert first.wrong_now() is None, "nothing has been proven"
    first.send(*served.next())
    assert first.wrong_now() == ([], {}, len(first.table))
    second.send(*served.next())
    assert "lm_head.weight" in first.wrong_now()[0] and second.wrong_now()[0] == []


def test_a_half_push_is_refused_until_a_whole_one(served, by_tensor):
    class Broken(Exception):
        pass

    def breaks(bucket):
        if EXPERT.format(0, "gate") in bucket.names:
            raise Broken
        return bucket

    tensors, version = served.next()
    by_tensor.way = Planted(by_tensor.way, breaks)
    with pytest.raises(Broken):
        by_tensor.send(tensors, version)
    by_tensor.way = by_tensor.way.way
    assert served.engine.version == -1 and served.label == f"{INCOMPLETE}{version}"
    by_tensor.send(tensors, version)
    assert served.engine.version == version and served.label == str(version)


def test_the_probe_compares_log_probabilities(served, by_tensor):
    tensors, version = served.next()
    by_tensor.send(tensors, version)
    known = [logprobs(served.server, line) for line in Probe(list, MODEL.vocab_size, 1, 60).prompts]
    served.runtime.score = lambda prompts: known
    push = TensorPush(bucket_bytes=SMALL, proof="probe", probe_tolerance=1e-3).build(served.runtime)
    assert push.send(tensors, version).proof == "probe" and served.engine.version == version
    tensors, version = served.next()
    with pytest.raises(UserError, match="push.probe_tolerance"):
        push.send(tensors, version)
    assert served.engine.version == -1
    served.runtime.score = None
    with pytest.raises(UserError, match="got neither"):
        push.send(tensors, version)


@pytest.mark.slow
def test_both_ranks_of_a_server_are_proven(cut_in_two):
    for way in WAYS.values():
        push = way(bucket_bytes=SMALL, proof="checksum").build(cut_in_two.runtime)
        for _ in range(2):
            tensors, version = cut_in_two.next()
            push.send(tensors, version)
        assert cut_in_two.engine.version == version
        push.close()
    fault, wrong = FAULTS["two experts exchanged"]
    push = TensorPush(bucket_bytes=SMALL, proof="checksum").build(cut_in_two.runtime)
    said = fails(cut_in_two, push, fault)
    assert f"got wrong {wrong[0]}:" in said and "of rank 1 at" in said


def test_atoms_keep_a_layers_attention():
    assert atom_of(QUERY) == atom_of(KEY) == atom_of(KEY + "_scale_inv") != atom_of(BIAS)
