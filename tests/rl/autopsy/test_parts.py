"""The autopsy's parts by themselves: what became of a tensor, routes, modules side by side, a server that scores again."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.mesh import close_mesh
from r1mega.model import names
from r1mega.model.published import published_config
from r1mega.rl.autopsy import layers, live, routing
from r1mega.rl.autopsy.case import Case, Finding
from r1mega.rl.autopsy.changes import described, rounded_fp8, scales_of
from r1mega.rl.autopsy.command import ranked
from r1mega.rl.autopsy.evidence import Row
from r1mega.rl.autopsy.judge import Judge, logprobs
from r1mega.rl.autopsy.rounding import in_bf16
from r1mega.train.policy import Policy
from tests.train.cases import MODEL, one_rank

NAME = "model.layers.1.self_attn.o_proj.weight"


def test_what_became_of_a_tensor() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, before, other = (torch.randn(160, 130, generator=draw) for _ in range(3))
    expert = "model.layers.1.mlp.experts.{}.up_proj.weight".format
    bias, gate = torch.linspace(-1, 1, 8), "model.layers.1.mlp.gate.e_score_correction_bias"
    half = weight.clone()
    half[:128, :128] *= 0.5
    for name, ours, theirs, kind, words in (
        (NAME, weight, before, "weights", f"{NAME} is that of version 3"),
        (NAME, weight, torch.zeros_like(weight), "weights", "all 0"),
        (NAME, weight, 2 * rounded_fp8(weight), "quantisation", "scaled by 2"),
        (NAME, weight, half, "quantisation", "scaled by 0.5"),
        (NAME, weight, rounded_fp8(weight), "quantisation", "rounded to FP8"),
        (NAME, weight, rounded_fp8(weight, power_of_two=True), "quantisation", "rounded to FP8"),
        (NAME, weight, weight.bfloat16(), "rounding", "rounded to bf16"),
        (NAME, weight, weight + 1e-3 * other, "weights", "of its norm away"),
        (NAME, weight, weight.flip(0), "weights", "in another order"),
        (gate, bias, torch.zeros(8), "routing", "layer 1 is missing"),
        (gate, bias, bias.roll(3), "routing", "layer 1 is permuted"),
        (expert(2), weight, other, "routing", "expert 2 of layer 1 has the up_proj of expert 5"),
    ):
        found = described(name, ours, theirs, {expert(2): weight, expert(5): other}, {3: {NAME: before}})
        assert found.kind == kind and words in found.what, found
    assert float((weight / scales_of(weight)).abs().max()) == pytest.approx(448)


@pytest.fixture(scope="module")
def case() -> Case:
    """Five random rows that both sides score as the judge does, and a policy of the same weights (``case.policy``)."""
    close_mesh()
    torch.manual_seed(0)
    policy = Policy(MODEL, None, one_rank(), "fp32")
    config = published_config(MODEL, bos_id=0, eos_id=1, pad_id=2, dtype="float32")
    weights = {name: tensor.clone() for name, tensor in policy.published_tensors()}
    judge = Judge(config, weights, "cpu", 1.0)
    rows = []
    for place in range(5):
        ids = torch.randint(3, 200, (8 + 3 * place,)).tolist()
        empty = torch.zeros(len(ids) - 4)
        rows.append(Row(place, ids[:4], ids[4:], empty, empty, torch.ones(len(empty), dtype=torch.bool)))
    scored = judge.score(rows)
    rows = [replace(row, engine=values, trainer=values) for row, values in zip(rows, scored, strict=True)]
    roles = {part.name: part.role for part in names.parts(MODEL) if not part.copy}
    made = Case(rows, judge, 0, {}, roles, scored)
    made.policy = policy
    return made


def test_the_judge_scores_rows_of_any_length_alike_and_gives_its_weights_back(case: Case) -> None:
    alone = [case.judge.score([row])[0] for row in case.rows]
    assert all(torch.allclose(one, many, atol=1e-5) for one, many in zip(alone, case.nominal, strict=True))
    with pytest.raises(RuntimeError, match="broken off"), case.judge.edited({NAME: torch.zeros(32, 16)}):
        assert (case.judge.score(case.rows[:1])[0] - case.nominal[0]).abs().max() > 1e-4
        raise RuntimeError("broken off")
    assert torch.equal(case.judge.score(case.rows)[0], case.nominal[0])
    assert 1e-6 < in_bf16(case) < 0.1
    assert torch.equal(case.judge.score(case.rows)[0], case.nominal[0]), "and after bf16"


def test_modules_side_by_side(case: Case) -> None:
    points = layers.compared(case.policy, case, case.rows[-1])
    judged = [point.judge for point in points]
    assert all(point.relative < 1e-5 for point in points) and len(points) > 25
    for name in ("model.embed_tokens", "model.layers.1.mlp.shared_experts", "model.layers.1.self_attn.kv_b_proj", "model.norm"):
        assert name in judged
    assert judged.index("model.layers.0.mlp") < judged.index("model.layers.0") < judged.index("model.layers.1.input_layernorm")
    weight = case.policy.trainee.module.decoder.layers[1].self_attention.linear_kv_down_proj.weight
    with torch.no_grad():
        weight.mul_(1.01)
        case.side = "trainer"
        try:
            (found,) = layers.layer(case, case.policy, "fp32")
        finally:
            weight.div_(1.01)
            case.side = "engine"
    assert found.where == ("decoder.layers.1.self_attention.linear_kv_down_proj", "model.layers.1.self_attn.kv_a_proj_with_mqa")


def test_routes(case: Case) -> None:
    same = torch.tensor([[1, 2], [3, 4]])
    assert routing.agreement(same, same.flip(1)) == 1 and routing.agreement(same, torch.tensor([[1, 5], [6, 7]])) == 0.25
    assert routing.by_layer(case) == {} and routing.reported(case) == []
    row = case.rows[0]
    right = case.judge.routing(row)
    assert set(right) == {1} and right[1].shape == (len(row.prompt) + len(row.tokens) - 1, MODEL.top_k)
    for routed, share in ((right[1], 1.0), ((right[1] + 1) % 8, None)):
        whole = torch.stack([torch.zeros_like(routed), routed], 1).to(torch.uint8)  # an engine tells of every layer
        known = Case(**{**vars_of(case), "rows": [replace(row, routed=whole)], "nominal": case.nominal[:1]})
        assert share is None or routing.by_layer(known) == {1: share}
        found = routing.reported(known)
        assert bool(found) == (share is None) and (not found or found[0].where == ("model.layers.1.mlp.gate",))
        alone = replace(known.rows[0], routed=routed[:, None].to(torch.uint8))  # or of the layers with experts
        assert routing.by_layer(replace(known, rows=[alone])) == routing.by_layer(known)


def vars_of(case: Case) -> dict:
    return {name: getattr(case, name) for name in Case.__dataclass_fields__}


def test_a_server_scores_again(case: Case) -> None:
    """It answers as the judge does in one pass; what was told while decoding is off."""
    off = [replace(row, engine=row.engine - 0.5) for row in case.rows]
    known = replace(case, rows=off)
    by_ids = {tuple(row.prompt + row.tokens): row for row in case.rows}

    def post(path, body):
        row = by_ids[tuple(body["input_ids"])]
        assert path == "/generate" and body["logprob_start_len"] == 0 and body["return_logprob"]
        values = logprobs(next(case.judge.logits([row])), row, 1.0).tolist()
        entries = [[None, 0, None]] * len(row.prompt) + [
            [value, token, None] for value, token in zip(values, row.tokens, strict=True)
        ]
        return {"meta_info": {"input_token_logprobs": entries}}

    server = SimpleNamespace(url="http://here:1", get=lambda path: {"weight_version": "0"}, post=post)
    (found,) = live.rescored(known, server)
    assert found.kind == "decoding" and found.explained > 0.99 and "scores these tokens in one pass" in found.says
    server.get = lambda path: {"weight_version": "7"}
    with pytest.raises(UserError, match="the rollout's weights, version 0; got 7 at http://here:1"):
        live.rescored(known, server)


def test_what_convicts_stands_first() -> None:
    def made(kind: str, explained: float, is_certain: bool = False) -> Finding:
        return Finding(kind, (), explained, 1 - explained, "", is_certain)

    order = ranked([made("a", 0.5), made("b", 0.95), made("c", 0.1, True), made("d", 0.99), made("e", 0.1), made("f", 0.94, True)])
    assert [finding.kind for finding in order] == ["f", "d", "b", "c"]
    assert [finding.kind for finding in ranked([made("a", 0.5), made("b", 0.7), made("c", 0.6), made("d", 0.3)])] == ["b", "c", "a"]
    assert asdict(order[0])["kind"] == "f"
