"""Episodes: the contract over every environment, tokens and who put them, what an environment may do wrong, and rows that are trained."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.config.run import SamplingConfig
from r1mega.data.problems import Problem
from r1mega.data.tokenizer import ASSISTANT, BOS, EOS, SPECIAL, TAGS, USER, Tokenizer, encode_turns, train_tokenizer
from r1mega.registry import choices, lookup
from r1mega.rl.environment import Single, Step
from r1mega.rl.environment import calls as calls_module
from r1mega.rl.environment.calls import Calls
from r1mega.rl.environment.play import Played, Player, play_all
from r1mega.rl.setup import open_environment
from r1mega.rl.types import Completion
from r1mega.testing.contracts import ScriptedEngine, check_environment

PROBLEM = Problem("p", "What is 1 + 2?", "3", "here")
TURNS = ("<tool>1 + 2</tool>", "<tool>print('<｜User｜>', _)</tool>", "so 3</think><answer>3</answer>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(["What is 1 + 2? It is 3."] * 4, tmp_path_factory.mktemp("tok"), vocab_size=300)


@dataclass(frozen=True)
class Echo:
    """Repeats what the policy said, until it says nothing of "tool"; ``spoil``: what a step does first."""

    spoil: Callable[[str], object] = lambda said: None
    turns: int = 8

    def build(self):
        """The environment."""
        return EchoEnvironment(self)


class EchoEnvironment:
    def __init__(self, choice: Echo):
        self.choice, self.max_turns, self.closed = choice, choice.turns, 0

    def begin(self, problem: Problem):
        def step(said: str) -> Step:
            spoilt = self.choice.spoil(said)
            return spoilt if spoilt is not None else Step(f"you said: {said}{BOS}" if "tool" in said else None, 0.25)

        def close() -> None:
            self.closed += 1

        return SimpleNamespace(reset=lambda: f"{problem.question} Go.", step=step, close=close)


def play(environment, tokenizer: Tokenizer, turns=TURNS, limit: int = 1000, **settings) -> Played:
    engine = ScriptedEngine(tokenizer, turns)
    with Player(
        environment, engine, tokenizer, SamplingConfig(max_new_tokens=limit), name="environment=echo", **settings
    ) as player:
        (played,) = play_all(player, [PROBLEM], [7])
    played.requests = engine.requests
    return played


@pytest.mark.parametrize("name", choices("environment"))
def test_contract(name: str, tokenizer: Tokenizer, may_confine: bool) -> None:
    knobs = {} if may_confine or name != "python" else {"sandbox": "process"}
    check_environment(choices("environment")[name](**knobs), TURNS, tokenizer)


def test_contract_of_one_from_outside(tokenizer: Tokenizer) -> None:
    cls = lookup("environment", f"{__name__}.Echo")
    check_environment(cls(), TURNS)
    environment, name = open_environment(cls())
    assert environment.max_turns == 8 and name == f"environment={__name__}.Echo"

    class Forgetful(EchoEnvironment):
        def begin(self, problem):
            episode = super().begin(problem)
            count = self.count = getattr(self, "count", 0) + 1
            return SimpleNamespace(reset=episode.reset, close=episode.close, step=lambda said: Step(str(count)))

    with pytest.raises(AssertionError, match="the same turns give the same step"):
        check_environment(SimpleNamespace(build=lambda: Forgetful(Echo())), TURNS, tokenizer)


def test_what_is_no_environment_is_refused_by_name() -> None:
    for built in (object(), SimpleNamespace(begin=1, max_turns=0)):
        with pytest.raises(UserError, match=r"environment=types.SimpleNamespace: builds an environment"):
            open_environment(SimpleNamespace(build=lambda built=built: built))
    assert open_environment(None)[1] == "environment=single"


def test_tokens_around_an_observation_and_what_is_learnt(tokenizer: Tokenizer) -> None:
    environment = Echo().build()
    played = play(environment, tokenizer)
    assert played.turns == 3 and played.reward == 0.75 and played.failure == "" and environment.closed == 1
    assert played.completion.finish_reason == "stop" and played.said == "".join(TURNS)
    whole = tokenizer.decode(played.prompt + played.completion.token_ids, skip_special=False)
    middle = "".join(f"{said}{EOS}{USER}you said: {said}{BOS}{ASSISTANT}" for said in TURNS[:2])
    assert whole == f"{BOS}{USER}What is 1 + 2? Go.{ASSISTANT}<think>{middle}{TURNS[2]}{EOS}"
    # The same tokens and mask as the cold start's.
    ids, mask = encode_turns(tokenizer, "What is 1 + 2? Go.", played.texts)
    assert ids == played.prompt + played.completion.token_ids
    assert mask == [0] * len(played.prompt) + list(map(int, played.own))
    special = {tokenizer.token_id(token) for token in (*SPECIAL, *TAGS)}
    seen = [token for token, own in zip(played.completion.token_ids, played.own, strict=True) if not own]
    assert [token for token in seen if token in special] == [tokenizer.token_id(USER), tokenizer.token_id(ASSISTANT)] * 2


def test_limits_of_turns_tokens_and_context(tokenizer: Tokenizer) -> None:
    whole = play(Echo().build(), tokenizer)
    sizes = [len(request.prompt) - len(whole.prompt) for request in whole.requests]
    two = play(Echo(turns=2).build(), tokenizer)
    assert two.turns == 2 and two.own[-1] and two.completion.finish_reason == "stop", "the last observation is not kept"
    for room in (0, 1):  # the first observation leaves so many tokens for the next turn
        short = play(Echo().build(), tokenizer, limit=sizes[1] + room)
        assert short.completion.finish_reason == "length" and short.turns == 1 + room
        assert len(short.completion.token_ids) == (sizes[1] + 1 if room else len(tokenizer.encode(TURNS[0])) + 1)
        same = play(Echo().build(), tokenizer, context=len(whole.prompt) + sizes[1] + room)
        assert same.completion == short.completion
    cut = play(Echo().build(), tokenizer, limit=3)
    assert cut.completion.finish_reason == "length" and len(cut.completion.token_ids) == 3 and cut.own is None
    huge = play(Echo(spoil=lambda said: Step("x" * 10_000_000)).build(), tokenizer)
    assert huge.turns == 1 and huge.completion.finish_reason == "length" and huge.failure == ""


def hang(said: str) -> None:
    time.sleep(30)


def leave(said: str) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("spoil, failure", [
    (lambda said: 1 / 0, "step: ZeroDivisionError: division by zero"),
    (leave, "step: RuntimeError: SystemExit: 3"),
    (hang, "step: TimeoutError: no answer in 0.3 s"),
    (lambda said: "text", "step: a Step with a text or None; got 'text'"),
    (lambda said: Step(3), "step: a Step with a text or None; got Step(observation=3, reward=0.0)"),
    (lambda said: Step("x", float("nan")), "step: a reward that is a number; got nan"),
    (lambda said: Step("\ud800"), "step: an observation that the tokenizer takes; got"),
])  # fmt: skip
def test_a_step_that_fails_ends_its_episode_alone(tokenizer: Tokenizer, spoil, failure: str) -> None:
    environment = Echo(spoil=lambda said: spoil(said) if "print" in said else None).build()
    began = time.perf_counter()
    played = play(environment, tokenizer, seconds=0.3)
    assert played.failure.startswith(f"environment=echo: {failure}") and played.turns == 2 and environment.closed == 1
    assert played.completion.token_ids[-1] == tokenizer.eos_id and played.reward == 0.25
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("part", ["begin", "reset"])
def test_where_it_cannot_begin_the_question_has_one_turn(tokenizer: Tokenizer, part: str) -> None:
    environment = Echo().build()
    begin = environment.begin

    def broken(problem):
        if part == "begin":
            raise OSError("no disk")
        return SimpleNamespace(reset=lambda: "word " * 500, step=None, close=begin(problem).close)

    environment.begin = broken
    played = play(environment, tokenizer, context=300)
    says = "begin: OSError: no disk" if part == "begin" else "reset: a question of less than 300 tokens; got "
    assert played.failure.startswith(f"environment=echo: {says}") and (played.turns, played.own) == (1, None)
    assert tokenizer.decode(played.prompt).startswith("What is 1 + 2?<think>") and environment.closed == (part == "reset")


def test_a_close_that_raises_fails_nobody(tokenizer: Tokenizer) -> None:
    environment = Echo().build()
    begin = environment.begin
    environment.begin = lambda problem: SimpleNamespace(**{**vars(begin(problem)), "close": lambda: 1 / 0})
    assert play(environment, tokenizer).failure == ""


def test_an_engine_that_fails_is_raised(tokenizer: Tokenizer) -> None:
    class Broken(ScriptedEngine):
        async def complete(self, request):
            raise UserError("engine: gone")

    environment = Echo().build()
    player = Player(environment, Broken(tokenizer, TURNS), tokenizer, SamplingConfig(max_new_tokens=9))
    with pytest.raises(UserError, match="engine: gone"):
        play_all(player, [PROBLEM] * 3, [1, 2, 3])
    assert environment.closed >= 1, "those that had begun when the engine failed"


def test_supports_and_versions_of_several_turns(tokenizer: Tokenizer) -> None:
    class Telling(ScriptedEngine):
        async def complete(self, request):
            made = await super().complete(request)
            half, count = len(made.token_ids) // 2, len(made.token_ids)
            turn = len(self.requests)
            mask = [[token, 5] for token in made.token_ids]
            return Completion(
                made.token_ids, made.logprobs, made.finish_reason, ((turn, 0, half), (turn + 1, half, count)), sampling_mask=mask
            )

    player = Player(Echo().build(), Telling(tokenizer, TURNS), tokenizer, SamplingConfig(max_new_tokens=999))
    (played,) = play_all(player, [PROBLEM], [1])
    made = played.completion
    assert [mask == [token, 5] for mask, token in zip(made.sampling_mask, made.token_ids, strict=True)] == played.own
    covered = [place for _, start, end in made.versions for place in range(start, end)]
    assert covered == [place for place, own in enumerate(played.own) if own] and [span[0] for span in made.versions] == [
        1,
        2,
        2,
        3,
        3,
        4,
    ]


def test_single_needs_no_thread(tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    player = Player(Single().build(), ScriptedEngine(tokenizer, TURNS), tokenizer, SamplingConfig(max_new_tokens=999))
    threads = []
    step = player.environment.begin(PROBLEM).__class__.step
    player.environment.begin(PROBLEM).__class__.step = lambda self, said: (
        threads.append(threading.active_count()) or step(self, said)
    )
    try:
        (played,) = play_all(player, [PROBLEM], [1])
    finally:
        player.environment.begin(PROBLEM).__class__.step = step
    assert threads == [before] and played.turns == 1 and played.own is None


def test_calls_run_side_by_side_and_no_more_than_workers() -> None:
    running, most = [], []

    def work(number: int) -> int:
        running.append(number)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(number)
        return number * number

    async def everyone() -> list[int]:
        return await asyncio.gather(*(calls(5, work, number) for number in range(8)))

    calls = Calls(3)
    assert asyncio.run(everyone()) == [number * number for number in range(8)] and max(most) == 3
    assert asyncio.run(everyone()) == [number * number for number in range(8)], "in another event loop"
    calls.close()


def test_time_runs_when_a_call_does_and_hanging_ones_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(calls_module, "MOST_LEFT", 2)
    release = threading.Event()

    async def everyone() -> list:
        slow = [calls(0.4, time.sleep, 0.25) for _ in range(4)]  # one after the other: 1 s
        assert await asyncio.gather(*slow) == [None] * 4
        return await asyncio.gather(*(calls(0.2, release.wait, 20) for _ in range(3)), return_exceptions=True)

    calls = Calls(1)
    said = [str(error) for error in asyncio.run(everyone())]
    assert said == ["no answer in 0.2 s"] * 2 + ["not called: 2 earlier calls hang"]
    release.set()
    time.sleep(0.2)
    assert asyncio.run(calls(2, pow, 2, 5)) == 32, "what hung has ended"
    calls.close()


def test_an_answer_that_nobody_waits_for_is_handed_on() -> None:
    """An episode that has begun too late is closed."""
    release, given = threading.Event(), queue.SimpleQueue()

    def begin() -> str:
        release.wait(20)
        return "episode"

    async def everyone() -> None:
        with pytest.raises(TimeoutError):
            await calls(0.1, begin, late=given.put)
        assert await calls(5, str, 7, late=given.put) == "7"
        release.set()
        assert await asyncio.to_thread(given.get, True, 10) == "episode"
        assert given.empty(), "who is waited for is not late"

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await calls(0.1, begin, late=given.put)

    calls = Calls(2)
    asyncio.run(everyone())
    release.clear()
    asyncio.run(leave())
    release.set()
    assert given.get(timeout=10) == "episode", "after the end of the loop too"
    calls.close()
