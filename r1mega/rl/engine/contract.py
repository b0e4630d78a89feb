"""What every engine is told, and what it must answer. No model, no torch at import."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from r1mega.config.errors import UserError
from r1mega.config.run import SamplingConfig
from r1mega.rl.types import Completion

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EngineRuntime:
    """What an engine is built from.

    ``hf_config``: the content of the model's ``config.json`` (``DeepseekV3ForCausalLM``); ``device``: a torch device ("cpu",
    "cuda:0"); ``dtype``: "float32" or "bfloat16", the parameters'; ``eos_id`` ends a response; ``pad_id`` fills up prompts.
    ``folder``: of the run, for an engine's files and logs; "": a temporary one.
    """

    hf_config: dict[str, Any]
    device: str = "cpu"
    dtype: str = "float32"
    eos_id: int = 1
    pad_id: int = 0
    folder: str = ""


class RoutingRefused(UserError):
    """A response whose record of experts is not whole: it is made again."""


@dataclass(frozen=True)
class Request:
    """A response that is wanted. ``prompt``: token ids, at least one; ``seed``: decides what is drawn, as far as an engine can."""

    prompt: list[int]
    sampling: SamplingConfig
    seed: int


class Engine(Protocol):
    """What a choice of kind ``engine`` builds: ``build(runtime: EngineRuntime) -> Engine``. One event loop calls its coroutines."""

    version: int
    """Of the weights that are served; -1 before the first whole push and after one that failed."""
    sleeps: bool
    """Does :meth:`sleep` give memory back?"""

    async def complete(self, request: Request) -> Completion:
        """The response. Many requests run side by side; where there is no version, UserError."""

    async def pause(self) -> None:
        """From its return on nothing is sampled, until :meth:`resume`; requests that run keep the tokens that they have."""

    async def resume(self) -> None:
        """Requests go on, under the weights that are served now."""

    async def sleep(self) -> None:
        """Give device memory back, weights included; an engine that cannot does nothing. Nothing runs while it sleeps."""

    async def wake_weights(self) -> None:
        """Take the weights' memory again, before the push that brings them."""

    async def wake(self) -> None:
        """Take all of the memory again, after that push."""

    def close(self) -> None:
        """End it and all that it started; safe to call twice."""


class TakesWeights(Protocol):
    """An engine in this process: it is handed the tensors themselves."""

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over all weights by their Hugging Face names, each exactly once; see the choice for what it refuses."""


async def complete_all(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """All responses, in order; the first failure ends the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.complete(request)) for request in requests]
    return [task.result() for task in tasks]


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """All responses, in order, for a caller outside of an event loop. Raises what the first failing request raised."""
    try:
        return asyncio.run(complete_all(engine, requests))
    except* Exception as failures:
        raise first_of(failures) from None


def first_of(failures: BaseException) -> BaseException:
    """The first single exception of a group, or of a group of groups; any other exception as it is."""
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures
