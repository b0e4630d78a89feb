"""``r1mega chat``: ask a checkpoint on the terminal, each question by itself; the thinking is shown dimmed, the answer plain.

With an environment its results stand where the model read them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.rl import ChatConfig
from r1mega.data.problems import Problem
from r1mega.data.tokenizer import encode_prompt
from r1mega.rl.environment.play import Player, play_all
from r1mega.rl.setup import open_environment, open_policy, open_run_mesh, open_tokenizer, serving
from r1mega.train import checkpoint


def chat(config: ChatConfig) -> dict[str, Any]:
    """Answer ``config.prompt``, or questions from the terminal until an empty line or the end of input. Returns the last answer."""
    mesh = open_run_mesh(config)
    if mesh.world_size != 1:
        raise UserError(f"launch.processes: a conversation has one process; got {mesh.world_size}; use launch.processes=1")
    init = checkpoint.resolve(config.checkpoint)
    tokenizer = open_tokenizer(init)
    environment, name = open_environment(config.environment)
    policy = open_policy(config, init, mesh, None, {})
    text = ""
    context = policy.model_config.max_position_embeddings
    with (
        serving(config.engine, config.push, policy, tokenizer, Path(config.out)) as engine,
        Player(environment, engine, tokenizer, config.sampling, context, name=name) as player,
    ):
        for number, question in enumerate(_questions(config.prompt)):
            seed = random.Random(f"{config.seed}:chat:{number}").getrandbits(62)
            prompt = encode_prompt(tokenizer, question)
            if len(prompt) >= context:
                raise UserError(f"question: it fits the model's {context} tokens; got {len(prompt)}; shorten it")
            (played,) = play_all(player, [Problem("chat", question, "", "chat")], [seed])
            text = tokenizer.decode(played.completion.token_ids)
            print(_shown(text, sys.stdout.isatty()), flush=True)
            if played.completion.finish_reason == "length":
                count = len(played.completion.token_ids)
                print(f"(cut off after {count} tokens: sampling.max_new_tokens, or the model's context)", flush=True)
            if played.failure:
                print(f"({played.failure})", flush=True)
    return {"text": text}


def _questions(prompt: str | None):
    if prompt is not None:
        yield prompt
        return
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def _shown(text: str, colour: bool) -> str:
    """The response with its thinking dimmed on a terminal."""
    thought, tag, rest = text.partition("</think>")
    if not tag:
        return text
    return f"\033[2m{thought.strip()}\033[0m\n{rest.strip()}" if colour else f"<think>{thought}</think>\n{rest}"
