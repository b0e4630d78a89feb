"""Untrusted programs under limits in namespaces of their own: ``Sandbox().run(Job, Limits) -> Result``."""

from r1mega.rl.sandbox.box import PYTHON, Sandbox, require, why_not
from r1mega.rl.sandbox.limits import Job, Limits, Result

__all__ = ["PYTHON", "Job", "Limits", "Result", "Sandbox", "require", "why_not"]
