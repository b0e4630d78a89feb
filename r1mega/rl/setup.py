"""What rl, eval and chat open alike: mesh, policy or model from a checkpoint, tokenizer, engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.run import ComputeConfig
from r1mega.config.train import OptimConfig
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.device import open_device
from r1mega.mesh import Mesh, open_mesh
from r1mega.rl.engine import Engine, EngineRuntime
from r1mega.train import checkpoint
from r1mega.train.policy import Policy
from r1mega.train.sft import tokenizer_of, tuned_model


def open_run_mesh(config: ComputeConfig) -> Mesh:
    """The mesh of a command that generates. Raises UserError for a layout whose weights no engine can take yet."""
    for axis in ("tensor", "pipeline", "expert"):
        degree = getattr(config.parallel, axis)
        if degree != 1:
            raise UserError(
                f"parallel.{axis}: a rank hands whole weights to its engine; got {degree}; use 1 and as many data ranks as you like"
            )
    return open_mesh(open_device(config.device), config.parallel, config.launch, config.seed)


def open_policy(config: ComputeConfig, init: Path, mesh: Mesh, optim: OptimConfig | None, changes: dict[str, Any]) -> Policy:
    """A policy with a checkpoint's weights."""
    policy = Policy(tuned_model(init, changes), optim, mesh, config.precision.dtype)
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


def latest_or(init: str, folder: Path) -> tuple[Path, bool]:
    """The checkpoint that a run goes on from, and whether it is its own (True) or the one to start from (False)."""
    held = checkpoint.latest(folder)
    return (held, True) if held is not None else (checkpoint.resolve(init), False)
