"""Who generates responses. Registers the package's own engines; imports no torch."""

from r1mega.rl.engine.contract import Engine, EngineRuntime, Request, generate
from r1mega.rl.engine.local import LocalEngine

__all__ = ["Engine", "EngineRuntime", "LocalEngine", "Request", "generate"]
