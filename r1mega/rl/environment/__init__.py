"""What answers the policy's turns: nothing (``single``), a Python tool (``python``), or an environment of your own by its dotted
path."""

from r1mega.rl.environment.contract import Environment, Episode, Step
from r1mega.rl.environment.python import PythonTool
from r1mega.rl.environment.single import Single

__all__ = ["Environment", "Episode", "PythonTool", "Single", "Step"]
