"""``profile=true``: a trace of a few steps. In: one call a step; out: ``out/profile/rankN.json`` (open it in Perfetto or chrome://tracing)
and ``rankN.txt``, the functions that take longest. Owns which steps are traced; costs nothing when it is off.
"""

from __future__ import annotations

from pathlib import Path

from r1mega.mesh import Mesh

ROWS = 40


class Profile:
    """Tracer of one rank. ``skip`` steps pass first (allocations, warm kernels), then at most ``count`` are recorded."""

    def __init__(self, out: Path, mesh: Mesh, *, active: bool, skip: int, count: int):
        self.folder, self.mesh, self.active = out / "profile", mesh, active
        self.skip, self.count, self.done = skip, count, 0
        self._tracer = None
        if active:
            mesh.device.record_allocations()
            self._begin_or_end()

    @property
    def running(self) -> bool:
        """True while steps are recorded."""
        return self._tracer is not None

    def step(self) -> None:
        """A step has ended."""
        if self.active:
            self.done += 1
            self._begin_or_end()

    def close(self) -> None:
        """Write what was recorded."""
        if self._tracer is None:
            return
        self._tracer.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self.mesh.rank}"
        self._tracer.export_chrome_trace(str(self.folder / f"{name}.json"))
        order = self.mesh.device.profile_order
        table = self._tracer.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=70)
        (self.folder / f"{name}.txt").write_text(table)
        self._tracer, self.active = None, False

    def _begin_or_end(self) -> None:
        if self.done == self.skip and self._tracer is None:
            from torch.profiler import profile

            self._tracer = profile(activities=self.mesh.device.profiled_activities(), record_shapes=True)
            self._tracer.start()
        elif self.done >= self.skip + self.count:
            self.close()
