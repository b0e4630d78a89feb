"""Peak memory of a training by phase: ``pass`` (forward and backward), ``update`` (the optimizer), ``rest`` (all between steps)."""

from __future__ import annotations

from r1mega.device import Device

GIB = 2**30
TOLD = ("pass", "update")
"""Phases that metric lines have."""


class Peaks:
    """What this process's device has held at most so far, in each phase.

    A CPU's peak cannot begin anew: there every phase has the largest so far, and :meth:`gib` leaves phases out.
    """

    def __init__(self, device: Device):
        self._device = device
        self.by_phase: dict[str, int] = {}

    def end(self, phase: str) -> None:
        """The time since the last call, or since the process began, was ``phase``."""
        self.by_phase[phase] = max(self.by_phase.get(phase, 0), self._device.peak_bytes())
        self._device.reset_peak_bytes()

    @property
    def all_bytes(self) -> int:
        """The largest of all phases, the one that is under way included."""
        return max(self._device.peak_bytes(), *self.by_phase.values(), 0)

    def gib(self) -> dict[str, float]:
        """For a metric line: ``peak_gib``, and on a GPU ``peak_pass_gib`` and ``peak_update_gib`` once they have been."""
        phases = {} if self._device.is_cpu else {name: self.by_phase[name] for name in TOLD if name in self.by_phase}
        return {"peak_gib": self.all_bytes / GIB} | {f"peak_{name}_gib": size / GIB for name, size in phases.items()}
