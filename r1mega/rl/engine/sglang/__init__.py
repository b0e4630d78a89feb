"""SGLang servers as the engine: started by us, or anybody's. The choice; ``engine`` has the work. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1mega.config.errors import UserError
from r1mega.config.knob import at_least, knob
from r1mega.registry import register

if TYPE_CHECKING:
    from r1mega.rl.engine.contract import EngineRuntime
    from r1mega.rl.engine.sglang.engine import ServedEngine


@register("engine", "sglang")
@dataclass(frozen=True)
class SglangEngine:
    """Generates on stock SGLang servers, 0.5.16 or newer, with token ids in and out. They serve after the first push."""

    url: str | None = knob(
        None, "server that runs already; several with spaces between them, in quotes; null: we start our own", "URL"
    )
    router: str | None = knob(
        None, "sglang-router in front of these servers, which then chooses among them; null: the one with the least to do", "URL"
    )
    servers: int = knob(1, "servers that we start", "servers", **at_least(1))
    python: str | None = knob(
        None,
        "interpreter with sglang, for the servers that we start; null: this one where it has it, else .venv-sglang of make sglang",
        "file",
    )
    args: dict[str, Any] = knob(
        {}, "server arguments, with underscores, as engine.args.mem_fraction_static=0.6 or +engine.args.tp_size=2", "name: value"
    )
    environment: dict[str, str] = knob({}, "variables of the servers that we start, beside this process's", "name: value")
    first_gpu: int = knob(0, "GPU of the first server that we start; the others follow", "1", **at_least(0))
    seed: int = knob(1, "seed of the servers that we start", "1", **at_least(0))
    restarts: int = knob(8, "times that dead servers of ours are started again in a run", "1", **at_least(0))
    concurrency: int = knob(4096, "requests under way at once, over all servers", "requests", **at_least(1))
    start_seconds: float = knob(900.0, "longest wait for a server to answer after its start", "seconds", **at_least(1))
    request_seconds: float = knob(3600.0, "longest wait for a response, and for a server that may serve", "seconds", **at_least(1))
    pause_seconds: float = knob(120.0, "longest wait for running requests to stop at a pause", "seconds", **at_least(1))
    attempts: int = knob(8, "times that a request is sent in a row without one more token, before the run ends", "1", **at_least(1))
    shared: bool = knob(False, "others use these servers too: a pause stops this run's requests one by one", "bool")
    memory_saver: bool = knob(False, "servers give memory back while the trainer works (sleep and wake)", "bool")
    routed_experts: bool = knob(False, "ask for the experts that each token went through (routing replay)", "bool")
    sampling_mask: bool = knob(False, "ask for the tokens that top-p, top-k and min-p kept; SGLang wants a top-k for it", "bool")
    deterministic: bool = knob(False, "the same seed gives the same tokens: the servers' deterministic kernels, slower", "bool")
    may_update: bool = knob(False, "r1mega doctor may replace the weights of the server that it looks at", "bool")
    api_key_variable: str = knob("", "environment variable that holds the servers' API key; empty: they have none", "name")

    def urls(self) -> list[str]:
        """Of servers that run already."""
        return (self.url or "").replace(",", " ").split()

    def wanted(self) -> list[str]:
        """Features that the config asks for, by their names in :class:`~r1mega.rl.engine.sglang.features.Features`."""
        return [name for name in ("memory_saver", "routed_experts", "sampling_mask", "deterministic") if getattr(self, name)]

    def wanted_arguments(self) -> list[str]:
        """Server arguments that switch them on."""
        from r1mega.rl.engine.sglang.features import NEED_ARGUMENT

        return [NEED_ARGUMENT[name][0] for name in self.wanted() if name in NEED_ARGUMENT]

    def api_key(self) -> str:
        """What the variable holds. Raises UserError where it is named and not set."""
        if not self.api_key_variable:
            return ""
        if not os.environ.get(self.api_key_variable):
            raise UserError(f"engine.api_key_variable: a variable that is set; got {self.api_key_variable}; export it")
        return os.environ[self.api_key_variable]

    def build(self, runtime: EngineRuntime) -> ServedEngine:
        """Servers that answer, without weights: a push comes first."""
        from r1mega.rl.engine.sglang.engine import ServedEngine

        return ServedEngine(self, runtime)
