"""Who generates responses. Registers the package's own engines; imports no torch."""

from r1mega.rl.engine.contract import Engine, EngineRuntime, Request
from r1mega.rl.engine.local import LocalEngine
from r1mega.rl.engine.sglang import SglangEngine

__all__ = ["Engine", "EngineRuntime", "LocalEngine", "Request", "SglangEngine"]
