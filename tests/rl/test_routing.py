"""Routing replay in the loop: records checked by hand, what scoring and updates take, and that the engine's own experts change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.config.rules import check
from r1mega.config.run import SamplingConfig
from r1mega.mesh import close_mesh
from r1mega.rl.batch import RolloutRow, microbatches
from r1mega.rl.engine import LocalEngine
from r1mega.rl.engine.contract import Request, RoutingRefused
from r1mega.rl.engine.inprocess import InProcessEngine
from r1mega.rl.environment import Step
from r1mega.rl.ledger import History
from r1mega.rl.loop import rl, turn
from r1mega.rl.routing import RoutingShape
from r1mega.rl.run import Run
from r1mega.rl.setup import open_run_mesh
from r1mega.rl.types import Completion
from r1mega.train import checkpoint
from r1mega.train.checkpoint import latest
from tests.rl.test_loop import Digits, config, digits, place, same  # noqa: F401  fixtures
from tests.train.cases import MODEL, lines, stored

SHAPE = RoutingShape(layers=3, num_dense=1, top_k=2, num_experts=8)
TELLS = LocalEngine(routed_experts=True)


def record(positions: int) -> torch.Tensor:
    """Two different experts everywhere, zeros in the dense layer, as SGLang has them."""
    made = torch.arange(positions * 6).view(positions, 3, 2).remainder(8).to(torch.int16)
    made[:, 0] = 0
    return made


def test_a_record_is_checked_where_a_drawn_token_is_predicted_from() -> None:
    good = record(6)
    kept = SHAPE.checked(good, prompt_size=3, own=[True] * 4)
    assert kept.dtype == torch.uint8 and (kept[:, 0] == 255).all() and torch.equal(kept[:, 1:], good[:, 1:].to(torch.uint8))
    wide = replace(SHAPE, num_experts=256).checked(good, 3, [True] * 4)
    assert wide.dtype == torch.int16 and (wide[:, 0] == -1).all() and torch.equal(wide[:, 1:], good[:, 1:])
    unwritten = good.clone()
    unwritten[1, 2] = 0  # of the prompt: nothing is predicted from it that counts
    kept = SHAPE.checked(unwritten, 3, [True] * 4)
    assert kept[1, 2].tolist() == [255, 255] and torch.equal(kept[1, 1], good[1, 1].to(torch.uint8))
    unwritten[3, 1] = 0
    with pytest.raises(RoutingRefused, match=r"2 different experts below 8 in every layer; got \[0, 0\] in layer 1 at position 3"):
        SHAPE.checked(unwritten, 3, [True] * 4)
    SHAPE.checked(unwritten, 3, [True, False, True, True])  # an environment put the token that is predicted from there
    for wrong in (-1, 8):
        spoilt = good.clone()
        spoilt[4, 2, 1] = wrong
        with pytest.raises(RoutingRefused, match="in layer 2 at position 4"):
            SHAPE.checked(spoilt, 3, [True] * 4)
    with pytest.raises(RoutingRefused, match="all 6 positions that tokens are predicted from; got those of 5"):
        SHAPE.checked(good[:5], 3, [True] * 4)
    assert len(SHAPE.checked(good[:5], 3, [True] * 3 + [False])) == 5, "behind the last drawn token nobody reads"
    with pytest.raises(RoutingRefused, match=r"\[positions, 3 layers, 2\]; got \[6, 2, 2\]"):
        SHAPE.checked(good[:, 1:], 3, [True] * 4)
    with pytest.raises(RoutingRefused, match="comes with its experts; got none"):
        SHAPE.checked(None, 3, [True] * 4)


def test_microbatches_carry_records_by_hand() -> None:
    long = RolloutRow([1, 2, 3], Completion([4, 5], [-0.5] * 2, "stop", routed_experts=SHAPE.checked(record(4), 3, [True] * 2)))
    short = RolloutRow([1], Completion([6], [-3.0], "length"))
    (batch,) = microbatches([long, short], 2, 9, torch.device("cpu"), record=lambda row: row.completion.routed_experts)
    assert batch.routing_BSLK.shape == (2, 4, 3, 2) and batch.routing_BSLK.dtype == torch.uint8
    assert (batch.routing_BSLK[0] == 255).all() and torch.equal(batch.routing_BSLK[1], long.completion.routed_experts)
    assert microbatches([long], 2, 9, torch.device("cpu"))[0].routing_BSLK is None, "nobody asked"
    (none,) = microbatches([short], 2, 9, torch.device("cpu"), record=lambda row: row.completion.routed_experts)
    assert none.routing_BSLK is None


def test_the_config_wants_an_engine_that_tells(place: Path) -> None:  # noqa: F811
    settings = config(place, place / "checked", routing_replay="r3")
    with pytest.raises(
        UserError, match="rl.routing_replay: r2 or none where the engine does not tell its experts; got r3; use eng"
    ):
        check(settings)
    settings.engine = TELLS
    check(settings)
    settings.engine, settings.rl.routing_replay = LocalEngine(), "r2"
    check(settings)


@pytest.fixture
def opened(place: Path, tmp_path: Path) -> Iterator:  # noqa: F811
    """A run with a routing replay, and rows whose every token has experts that an engine might have chosen."""
    close_mesh()
    with ExitStack() as stack:

        def make(mode: str, name: str = "run", engine=TELLS, environment=None, **sizes) -> Run:
            settings = config(place, tmp_path / name, routing_replay=mode, **sizes)
            settings.engine, settings.model = engine, {"seq_aux_loss_coef": 0.0, "expert_bias_update_rate": 0.0}
            settings.environment = environment or settings.environment
            run = Run(settings, open_run_mesh(settings), checkpoint.resolve(place / "seed"), Digits(), stack)
            stack.enter_context(run.saver)
            return run

        yield make


def rows(seed: int = 7) -> list[RolloutRow]:
    """Four responses of chance with experts of chance."""
    draw, made = torch.Generator().manual_seed(seed), []
    for number in range(4):
        ids = torch.randint(20, MODEL.vocab_size, (4 + 3 + number,), generator=draw).tolist()
        shape = (len(ids) - 1, MODEL.num_layers)
        experts = torch.rand(*shape, MODEL.num_experts, generator=draw).topk(MODEL.top_k, dim=-1).indices.to(torch.uint8)
        completion = Completion(ids[4:], [-5.0] * (3 + number), "length", routed_experts=experts)
        made.append(RolloutRow(ids[:4], completion, advantage=float(torch.randn((), generator=draw))))
    return made


def scored(run: Run, made: list[RolloutRow]) -> list[torch.Tensor]:
    run.learner.score(made)
    return [row.old for row in made]


def test_forced_experts_are_those_that_a_plain_model_computes(opened) -> None:
    """The log-probabilities with an engine's experts are those of transformers' model whose routers are made to choose them."""
    run, made = opened("r3"), rows()
    got = scored(run, made)
    free = scored(opened("none", "free"), rows())
    run.push()
    model = run.engine.model
    for row, mine, other in zip(made, got, free, strict=True):
        experts = row.completion.routed_experts.long()
        layer = model.model.layers[1].mlp
        forced = layer.gate.register_forward_hook(
            lambda gate, inputs, output, experts=experts: chosen(gate, output[0], experts[:, 1])
        )
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt + row.completion.token_ids])[:, :-1], use_cache=False).logits[0]
        forced.remove()
        targets = torch.tensor(row.completion.token_ids)[:, None]
        want = logits[len(row.prompt) - 1 :].float().log_softmax(-1).gather(1, targets)[:, 0]
        torch.testing.assert_close(mine, want, atol=1e-5, rtol=0)
        assert (mine - other).abs().max() > 1e-4, "other experts show"


def test_wide_records_say_the_same(opened) -> None:
    """int16, as more than 255 experts have it, with tokens that have none."""
    found = []
    for dtype, none in ((torch.uint8, 255), (torch.int16, -1)):
        run, made = opened("r3", str(none)), rows()
        for row in made:
            experts = row.completion.routed_experts.to(dtype)
            experts[:3] = none
            row.completion = replace(row.completion, routed_experts=experts)
        found.append((scored(run, made), run.learner.agreement))
    assert all(torch.equal(one, other) for one, other in zip(found[0][0], found[1][0], strict=True)) and found[0][1] == found[1][1]


def chosen(gate, logits_TE: torch.Tensor, experts_TK: torch.Tensor):
    """What transformers' router gives on: logits, weights, experts."""
    weights = logits_TE.sigmoid().gather(1, experts_TK)
    return logits_TE, weights / (weights.sum(1, keepdim=True) + 1e-20) * gate.routed_scaling_factor, experts_TK


def test_r3_counts_and_trains_with_the_engines_experts(opened) -> None:
    run, made = opened("r3", updates_per_rollout=1), rows()
    before = {name: tensor.clone() for name, tensor in run.policy.trainee.named_tensors()}
    run.learner.score(made)
    assert len(run.learner.agreement) == 1 and 0 <= run.learner.agreement[0] < 0.5, "of chance"
    (result,) = run.learner.train(made, 0)
    assert result.stats["max_ratio"] == pytest.approx(1, abs=1e-5), "scoring and update take the same experts"
    routers = [name for name, tensor in run.policy.trainee.named_tensors() if "router.weight" in name and "mtp" not in name]
    after = dict(run.policy.trainee.named_tensors())
    assert routers and all((after[name] - before[name]).abs().max() > 0 for name in routers), "routers learn"
    again = opened("none", "again", updates_per_rollout=1)
    other = rows()
    again.learner.score(other)
    for row, kept in zip(other, made, strict=True):
        row.old, row.ref = kept.old, kept.ref  # of r3's scoring: now the update chooses for itself
    (mixed,) = again.learner.train(other, 0)
    assert mixed.stats["max_ratio"] > 1 + 1e-3 and mixed.loss != result.loss


def test_r2_replays_the_scoring_pass(opened) -> None:
    """Weights move between scoring and update: the update takes the experts of before, whatever the router says by now."""
    run, made = opened("r2", engine=LocalEngine(), updates_per_rollout=1), rows()
    run.learner.score(made)
    assert run.learner.agreement == [] and all(row.replay.shape == (row.size - 1, 2, 4) for row in made)
    assert all((row.replay[:, 0] == 255).all() and (row.replay[:, 1] < 8).all() for row in made), "the first layer is dense"
    told = [row.replay.clone() for row in made]
    for name, tensor in run.policy.trainee.named_tensors():
        if "router.weight" in name:
            tensor.copy_(-tensor)  # the router would choose others now
    seen = []
    routers = [router for router in run.policy.trainee.routers() if router.layer_number == 2][:1]
    hook = routers[0].register_forward_hook(lambda router, inputs, output: seen.append(output[1].clone()))
    run.learner.train(made, 0)
    hook.remove()
    batches = run.learner.batches(made, lambda row: row.replay)
    assert len(batches) == len(seen) == 2
    for batch, map_TE in zip(batches, seen, strict=True):
        given_TK = batch.routing_BSLK[:, :, 1].transpose(0, 1).reshape(-1, 4).long()
        there = given_TK[:, 0] != 255
        assert there.any() and map_TE[there].gather(1, given_TK[there]).all() and (map_TE.sum(1) == 4).all()
    assert all(torch.equal(row.replay, before) for row, before in zip(made, told, strict=True))


def test_the_routers_own_experts_given_back_change_no_bit(place: Path, digits, tmp_path: Path) -> None:  # noqa: F811
    """A run in fp32 with an engine that agrees: r3 and r2 are the run without them, bit for bit, and the metric line says why."""
    found = {}
    for mode, engine in (("none", TELLS), ("r3", TELLS), ("r2", LocalEngine())):
        settings = config(place, tmp_path / mode, routing_replay=mode, updates_per_rollout=1)
        settings.engine = engine
        rl(settings)
        found[mode] = stored(latest(tmp_path / mode / "checkpoints"))
        for line in lines(tmp_path / mode):
            if engine is TELLS:
                assert line["routing_agreement"] == [1.0] and line["routing_refused"] == 0
            else:
                assert "routing_agreement" not in line
    for mode in ("r3", "r2"):
        assert found[mode].keys() == found["none"].keys()
        differ = [name for name in found["none"] if not torch.equal(found[mode][name], found["none"][name])]
        assert differ == []


def test_responses_without_their_experts_are_made_again_and_counted(opened, monkeypatch) -> None:
    run, true, spoilt = opened("r3"), InProcessEngine.generate, []

    def forgetful(self, *asked):
        done = true(self, *asked)
        if len(spoilt) < 2:
            spoilt.append(0)
            done[0] = replace(done[0], routed_experts=done[0].routed_experts[:-1])
        return done

    monkeypatch.setattr(InProcessEngine, "generate", forgetful)
    run.push()
    turn(run)
    assert lines(run.folder)[0]["routing_refused"] == 2 and run.rollouts._refused == 0
    monkeypatch.setattr(InProcessEngine, "generate", lambda *args: [replace(one, routed_experts=None) for one in true(*args)])
    with pytest.raises(UserError, match="each response comes with its experts; got none"):
        turn(run)


def reused_samples(place: Path, out: Path, mode: str, monkeypatch) -> int:  # noqa: F811
    """Samples that the next start takes from the ledger of a run that died when its first rollout was drawn."""
    settings = config(place, out, routing_replay=mode, rollouts=1)
    settings.engine = TELLS

    def dies(self, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("r1mega.rl.learner.Learner.score", dies)
        with pytest.raises(KeyboardInterrupt):
            rl(settings)
    close_mesh()
    true, counted = Run.take, []

    def take(run: Run):
        taken = true(run)
        counted.append(run.rollouts.reused)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(Run, "take", take)
        rl(settings)
    (reused,) = counted
    return reused


@pytest.mark.parametrize(("mode", "reused"), [("r3", 0), ("none", 8)])
def test_samples_of_the_ledger_have_no_experts_and_are_made_again_with_r3(
    place: Path,  # noqa: F811
    digits,  # noqa: F811
    tmp_path: Path,
    monkeypatch,
    mode: str,
    reused: int,
) -> None:
    assert reused_samples(place, tmp_path / mode, mode, monkeypatch) == reused
    history = History(tmp_path / mode / "ledger")
    assert history.audit() == []
    samples = [frame for frame in history.frames if frame.kind == "sample"]
    assert len(samples) == 16 - reused and all(frame.values["routing_sha256"] for frame in samples)


@dataclass(frozen=True)
class Twice:
    """Two turns, with an observation between them."""

    max_turns = 2

    def build(self):
        return self

    def begin(self, problem):
        told = iter([Step("7"), Step()])
        return SimpleNamespace(reset=lambda: problem.question, step=lambda said: next(told), close=lambda: None)


def test_turns_keep_the_experts_that_their_tokens_were_drawn_with(opened, monkeypatch) -> None:
    """The second turn's record tells of the first one's tokens again, and otherwise; what was not read before comes from it."""
    true, told = InProcessEngine.generate, {}

    def two_tokens(self, prompts, *asked):
        done = []
        for prompt, one in zip(prompts, true(self, prompts, *asked), strict=True):
            experts = one.routed_experts[: len(prompt) + 1]
            if any(len(prompt) > len(earlier) and prompt[: len(earlier)] == list(earlier) for earlier in told):
                experts = (experts + 1).remainder(8)
            told[tuple(prompt + one.token_ids[:2])] = experts
            done.append(
                replace(one, token_ids=one.token_ids[:2], logprobs=one.logprobs[:2], finish_reason="stop", routed_experts=experts)
            )
        return done

    monkeypatch.setattr(InProcessEngine, "generate", two_tokens)
    run = opened("r3", environment=Twice(), sampling=SamplingConfig(temperature=1.0, max_new_tokens=24))
    run.push()
    taken = run.take()
    samples = taken.samples
    assert len(samples) == 8 and all(sample.turns == 2 and sample.own.count(True) == 4 for sample in samples)
    for sample in samples:
        whole = sample.prompt + sample.completion.token_ids
        first, second = told[tuple(whole[: len(sample.prompt) + 2])], told[tuple(whole)]
        assert len(second) == len(whole) - 1 > len(first) == len(sample.prompt) + 1
        record = sample.completion.routed_experts[:, 1].short()
        assert torch.equal(record[: len(first)], first[:, 1]) and torch.equal(record[len(first) :], second[len(first) :, 1])
        assert not torch.equal(record, second[:, 1])
    rows, _ = run.value(taken)
    run.learner.score(rows)
    assert 0 < run.learner.agreement[0] < 1


def test_the_local_engine_tells_what_its_routers_chose(opened) -> None:
    """Decoding against one pass over the whole sequence; prompts of several lengths, one twice, ends at different times."""
    run = opened("none")
    run.push()
    engine, sampling = run.engine, replace(run.sizes.sampling, max_new_tokens=9)
    prompts = [[30, 31, 32], [40], [30, 31, 32], [50, 51, 52, 53, 54], [60, 61]]
    done = engine.generate(prompts, sampling, 3)
    for prompt, one in zip(prompts, done, strict=True):
        assert one.routed_experts.shape == (len(prompt) + len(one.token_ids) - 1, 2, 4) and one.routed_experts.dtype == torch.int16
        heard = []
        gate = engine.model.model.layers[1].mlp.gate
        hook = gate.register_forward_hook(lambda gate, inputs, output, heard=heard: heard.append(output[2]))
        with torch.no_grad():
            engine.model(torch.tensor([prompt + one.token_ids])[:, :-1], use_cache=False)
        hook.remove()
        assert torch.equal(one.routed_experts[:, 1].long().sort(1).values, heard[0].sort(1).values)
        assert (one.routed_experts[:, 0] == -1).all()
    (alone,) = asyncio.run(asked(engine, Request(prompts[3], sampling, 3)))
    assert alone.routed_experts is not None
    plain = LocalEngine().build(engine.runtime)
    plain.load_weights(run.policy.published_tensors(), 0)
    (silent,) = plain.generate([prompts[3]], sampling, 3)
    assert silent.routed_experts is None


async def asked(engine, request: Request) -> list[Completion]:
    return [await engine.complete(request)]
