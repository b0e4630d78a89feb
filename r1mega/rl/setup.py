"""What rl, eval and chat open alike: mesh, policy or model from a checkpoint, tokenizer, engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.rl import RewardConfig
from r1mega.config.run import ComputeConfig
from r1mega.config.train import OptimConfig
from r1mega.data.problems import Problem
from r1mega.data.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from r1mega.device import open_device
from r1mega.mesh import Mesh, open_mesh
from r1mega.registry import lookup
from r1mega.rl.engine import Engine, EngineRuntime
from r1mega.rl.reward.runner import RewardRunner
from r1mega.rl.types import Completion
from r1mega.train.manifest import tokenizer_of, tuned_model
from r1mega.train.policy import Policy


def open_run_mesh(config: ComputeConfig) -> Mesh:
    """The mesh of a command that generates. Raises UserError for a layout whose weights no engine can take yet."""
    for axis in ("tensor", "pipeline", "expert", "expert_tensor"):
        degree = getattr(config.parallel, axis)
        if degree != 1:
            raise UserError(
                f"parallel.{axis}: a rank hands whole weights to its engine; got {degree}; use 1 and as many data ranks as you like"
            )
    return open_mesh(open_device(config.device), config.parallel, config.launch, config.seed)


def over_context(mesh: Mesh, count: int, work: Callable[[slice], list[Any]]) -> list[Any]:
    """``work(share)`` of ``count`` items that all context ranks of a data rank have: each does its share, all get the whole list.

    So the ranks agree on it, whatever ``work`` depends on (rounding, a limit of time).
    """
    line = mesh.axes["context"]
    share = slice(count * line.rank // line.size, count * (line.rank + 1) // line.size)
    mine = work(share) if share.stop > share.start else []
    return [item for part in mesh.gather_objects(mine, "context") for item in part]


def open_policy(config: ComputeConfig, init: Path, mesh: Mesh, optim: OptimConfig | None, changes: dict[str, Any]) -> Policy:
    """A policy with a checkpoint's weights."""
    policy = Policy(tuned_model(init, changes), optim, mesh, config.precision)
    policy.load(init, weights_only=True)
    return policy


def open_tokenizer(init: Path) -> Tokenizer:
    """The tokenizer inside a checkpoint."""
    return load_tokenizer(tokenizer_of(init))


def open_engine(choice: Any, policy: Policy, tokenizer: Tokenizer) -> Engine:
    """The chosen engine for a policy's architecture; it has no weights yet."""
    runtime = EngineRuntime(
        hf_config=policy.published_config(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id),
        device=str(policy.mesh.device.torch_device),
        dtype=str(policy.torch_dtype).removeprefix("torch."),
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    return choice.build(runtime)


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


def response_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """What a reward judges: the response without its end token; other special tokens are written out, so that none is missed."""
    ids = completion.token_ids
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids, skip_special=False)


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
