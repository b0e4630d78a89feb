"""Which ranks of a run generate, for how many groups of a rollout, and which write down what their data rank has used."""

from __future__ import annotations


class Place:
    """Which ranks generate. ``generates``: this one does; ``writes``: this one writes down what its data rank has used; ``number``
    of ``count`` generating ranks, with ``share`` groups a rollout each. Context ranks of a data rank share its groups where these
    divide; of tensor and pipeline ranks the first generates for all."""

    def __init__(self, generates: bool, writes: bool, number: int, count: int, share: int):
        self.generates, self.writes, self.number, self.count, self.share = generates, writes, number, count, share

    @classmethod
    def of(cls, mesh, prompts: int) -> Place:
        """This rank's place among those that generate ``prompts`` groups a rollout."""
        context = mesh.axes["context"]
        groups = prompts // mesh.data_size
        sharers = context.size if groups % context.size == 0 else 1
        is_first = mesh.axes["tensor"].rank == 0 and mesh.axes["pipeline"].rank == 0
        generates = is_first and context.rank < sharers
        number = mesh.data_rank * sharers + (context.rank if generates else 0)
        return cls(generates, is_first and context.rank == 0, number, mesh.data_size * sharers, groups // sharers)
