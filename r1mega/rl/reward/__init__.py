"""Rewards with rules: ``build()`` gives ``(problem, response_text) -> float`` in the choice's ``value_range``; no model, no torch.

A reward is called in a process of its own (:mod:`r1mega.rl.reward.runner`). One from outside is a frozen dataclass registered
under kind ``reward`` with ``value_range`` and ``build``. If what it builds has a method ``warm(source)``, that is called once a
process for each source of problems, outside the time limit of a call: the place for slow imports.

A response that has not the asked-for form gets the lowest value of each reward, so that breaking the form is no way out of a
penalty; accuracy alone asks for less, an answer after the reasoning.
"""

from r1mega.rl.reward.accuracy import AccuracyReward
from r1mega.rl.reward.code import CodeReward
from r1mega.rl.reward.format import FormatReward
from r1mega.rl.reward.judge import JudgeReward
from r1mega.rl.reward.language import LanguageReward
from r1mega.rl.reward.length import LengthReward
from r1mega.rl.reward.repetition import RepetitionReward

__all__ = ["AccuracyReward", "CodeReward", "FormatReward", "JudgeReward", "LanguageReward", "LengthReward", "RepetitionReward"]
