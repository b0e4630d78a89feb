"""What rl and eval open alike: prompts that fit, what a reward gets to see, and rewards with knobs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.config.rl import RewardConfig
from r1mega.data.problems import Problem
from r1mega.data.tokenizer import ANSWER, BOS, END_ANSWER, END_THINK, USER, Tokenizer, encode_prompt, train_tokenizer
from r1mega.rl.rollouts import sample_text
from r1mega.rl.setup import encode_prompts, open_rewards
from r1mega.rl.types import Completion, Sample


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["one and two are three"] * 20, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


def completion(tokenizer: Tokenizer, text: str, *, end: bool = True) -> Completion:
    ids = tokenizer.encode(text) + ([tokenizer.eos_id] if end else [])
    return Completion(ids, [-1.0] * len(ids), "stop" if end else "length")


def judged(tokenizer: Tokenizer, made: Completion) -> str:
    return sample_text(tokenizer, Sample(0, 0, None, [], made))


def test_prompts_are_those_of_the_tokenizer_and_one_too_long_is_named(tokenizer: Tokenizer) -> None:
    problems = [Problem("short", "one?", "1", "here"), Problem("long", "one and two " * 20, "3", "here")]
    wanted = [encode_prompt(tokenizer, problem.question) for problem in problems]
    assert encode_prompts(tokenizer, problems, 8, len(wanted[1]) + 8) == wanted
    with pytest.raises(UserError, match=r"^problem long: .*got \d+ \+ 8; drop the problem or use sampling.max_new_tokens=7$"):
        encode_prompts(tokenizer, problems, 8, len(wanted[1]) + 7)


def test_a_reward_sees_every_special_token_but_the_end(tokenizer: Tokenizer) -> None:
    good = f"one{END_THINK}{ANSWER}3{END_ANSWER}"
    assert judged(tokenizer, completion(tokenizer, good)) == good
    assert judged(tokenizer, completion(tokenizer, good, end=False)) == good
    for stray in (BOS, USER):
        assert stray in judged(tokenizer, completion(tokenizer, f"one{stray}{END_THINK}{ANSWER}3{END_ANSWER}"))
    assert judged(tokenizer, Completion([], [], "length")) == ""


def test_a_stray_special_token_is_not_the_asked_for_form(tokenizer: Tokenizer) -> None:
    problem = Problem("a", "one?", "3", "here")
    texts = [f"one{END_THINK}{ANSWER}3{END_ANSWER}{stray}" for stray in ("", USER)]
    seen = [judged(tokenizer, completion(tokenizer, text)) for text in texts]
    with open_rewards(RewardConfig(), {"format": 1.0}) as rewards:
        records = rewards.score([problem] * 2, seen)
    assert [record["format"].value for record in records] == [1.0, 0.0]


def test_a_rewards_knobs_come_from_the_config(tmp_path: Path) -> None:
    problem = Problem("a", "one?", "12345", "here")
    text = f"so{END_THINK}{ANSWER}12345{END_ANSWER}"
    for longest, value in ((5, 1.0), (4, 0.0)):
        config = RewardConfig(options={"accuracy": {"longest_answer": longest}})
        with open_rewards(config, {"accuracy": 1.0}) as rewards:
            assert rewards.score([problem], [text])[0]["accuracy"].value == value
    with pytest.raises(UserError, match="^reward.options.accuracy: knobs that the reward has; got .*longest_anser"):
        open_rewards(RewardConfig(options={"accuracy": {"longest_anser": 4}}), {"accuracy": 1.0})
