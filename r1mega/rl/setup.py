"""What rl, eval and chat open alike: mesh, policy or model from a checkpoint, tokenizer, engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.rl import RewardConfig
from r1mega.config.rules import check_cut
from r1mega.config.run import ComputeConfig
from r1mega.config.train import OptimConfig
from r1mega.data.problems import Problem
from r1mega.data.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from r1mega.device import open_device
from r1mega.mesh import Mesh, open_mesh
from r1mega.registry import lookup, name_of
from r1mega.rl.engine import Engine, EngineRuntime
from r1mega.rl.environment import Environment, Single
from r1mega.rl.push import PushRuntime
from r1mega.rl.reward.runner import RewardRunner
from r1mega.rl.together import patiently, together
from r1mega.rl.walk import walked
from r1mega.train.manifest import tokenizer_of, tuned_model
from r1mega.train.policy import Policy


def open_run_mesh(config: ComputeConfig) -> Mesh:
    """The mesh of a command that generates."""
    return open_mesh(open_device(config.device), config.parallel, config.launch, config.seed)


def open_policy(
    config: ComputeConfig, init: Path, mesh: Mesh, optim: OptimConfig | None, changes: dict[str, Any], teacher: str | None = None
) -> Policy:
    """A policy with a checkpoint's weights; ``teacher``: another one's, which it holds for :meth:`Policy.as_teacher`.

    Raises UserError for a layout that does not cut the checkpoint's model.
    """
    model = tuned_model(init, changes)
    if optim is not None:
        check_cut(config, model)
    policy = Policy(model, optim, mesh, config.precision)
    if teacher is not None:
        policy.hold_teacher(teacher)
    policy.load(init, weights_only=True)
    return policy


def open_tokenizer(init: Path) -> Tokenizer:
    """The tokenizer inside a checkpoint."""
    return load_tokenizer(tokenizer_of(init))


def open_engine(choice: Any, policy: Policy, tokenizer: Tokenizer, folder: Path, generates: bool = True) -> Engine | None:
    """The chosen engine for a policy's architecture, without weights yet; None on a rank that does not generate.

    Servers are started, or found, by the first rank; the others are told where they are. Called by all ranks.
    """
    mesh = policy.mesh
    if mesh.world_size > 1 and hasattr(choice, "shared"):
        choice = replace(choice, shared=True)
    runtime = EngineRuntime(
        hf_config=policy.published_config(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id),
        device=str(mesh.device.torch_device),
        dtype=str(policy.torch_dtype).removeprefix("torch."),
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        folder=str(folder),
    )
    # servers take their time; an engine in this process is made in this thread, whose device it is
    meets = patiently if hasattr(choice, "shared") else together
    engine = meets(mesh, lambda: choice.build(runtime) if mesh.is_first else None)
    urls = mesh.broadcast_object([server.url for server in getattr(engine, "servers", ())])
    if generates and engine is None:
        engine = (replace(choice, url=" ".join(urls), shared=True) if urls else choice).build(runtime)
    return engine


@contextmanager
def serving(choice: Any, push: Any, policy: Policy, tokenizer: Tokenizer, folder: Path) -> Iterator[Engine]:
    """An engine that serves the policy's weights, for commands that do not train; ``push``: the choice of how it gets them.

    Called by all ranks.
    """
    mesh = policy.mesh
    pushes = folder / "pushes"
    with ExitStack() as stack:
        if mesh.is_first:
            stack.callback(shutil.rmtree, pushes, ignore_errors=True)  # nobody reads them after the engine's end
        engine = open_engine(choice, policy, tokenizer, folder)
        stack.callback(engine.close)
        has_servers = hasattr(engine, "servers")
        config = policy.published_config(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        device = str(mesh.device.torch_device)
        runtime = PushRuntime(engine, config, servers=lambda: getattr(engine, "servers", ()), device=device, folder=pushes)
        pusher = together(mesh, lambda: push.build(runtime) if mesh.is_first or not has_servers else None)
        send = None
        if pusher is not None:
            stack.callback(pusher.close)
            send = partial(pusher.send, version=0)
        together(mesh, lambda: walked(policy, send, everywhere=not has_servers))
        engine.version = 0
        yield engine
        mesh.barrier()  # servers serve all ranks to the last one's end


def open_environment(choice: Any) -> tuple[Environment, str]:
    """The chosen environment (None: ``single``), and what a failure calls it.

    Raises UserError where it is none, or lacks something on this machine.
    """
    choice = Single() if choice is None else choice
    name = f"environment={name_of('environment', choice)}"
    if hasattr(choice, "check"):
        choice.check()
    environment = choice.build()
    if (
        not isinstance(getattr(environment, "max_turns", None), int)
        or environment.max_turns < 1
        or not hasattr(environment, "begin")
    ):
        raise UserError(
            f"{name}: builds an environment with begin and max_turns of at least 1; got {type(environment).__name__}; see "
            "r1mega.rl.environment.contract"
        )
    return environment, name


def encode_prompts(tokenizer: Tokenizer, problems: Sequence[Problem], max_new_tokens: int, context: int) -> list[list[int]]:
    """The prompts of all problems. Raises UserError, before anything is generated, for one whose response would not fit."""
    prompts = [encode_prompt(tokenizer, problem.question) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_new_tokens > context:
            raise UserError(
                f"problem {problem.id}: prompt and response fit {context} tokens; got {len(prompt)} + {max_new_tokens}; "
                f"drop the problem or use sampling.max_new_tokens={max(context - len(prompt), 1)}"
            )
    return prompts


def open_rewards(
    config: RewardConfig, weights: Mapping[str, float], by_source: Mapping[str, Mapping[str, float]] | None = None
) -> RewardRunner:
    """The reward processes for ``weights`` and ``by_source`` (None: the config's), with the config's knobs and limits.

    Raises UserError for an unknown knob.
    """
    made = {}
    for name, knobs in config.options.items():
        cls = lookup("reward", name)
        if not isinstance(cls, type):
            raise UserError(f"reward.options.{name}: knobs of a class; got a function, which has none; leave it out")
        try:
            made[name] = cls(**knobs)
        except TypeError as error:
            raise UserError(f"reward.options.{name}: knobs that the reward has; got {error}; see its class") from error
    by_source = config.by_source if by_source is None else by_source
    return RewardRunner(weights, config.timeout_seconds, config.memory_bytes, config.workers, rewards=made, by_source=by_source)
