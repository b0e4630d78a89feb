"""The policy's objective as registered choices: ``build()`` gives ``loss(given: LossInput) -> (loss, PolicyStats)``.

``choices`` holds the knobs and imports no torch, ``inputs`` what is given, ``objective`` the equations, ``stats`` what is told.
No model, no optimizer; of ranks only that a sum over a sequence may go over the context ranks (``LossInput.over_sequence``).
"""

from r1mega.rl.loss.choices import CispoLoss, DapoLoss, GrpoLoss, GspoLoss, Objective
from r1mega.rl.loss.inputs import LossInput

__all__ = ["CispoLoss", "DapoLoss", "GrpoLoss", "GspoLoss", "LossInput", "Objective"]
