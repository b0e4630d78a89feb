"""The train/rollout difference: looked at in every rollout (:mod:`watch`), kept as evidence, and traced to its cause afterwards.

A hypothesis is a function of a :class:`~r1mega.rl.autopsy.case.Case` to findings: it says what one side would have computed if
something definite were wrong, and is scored by how much of the difference that explains.
"""
