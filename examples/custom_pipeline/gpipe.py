"""A pipeline schedule of your own: GPipe, all forwards of a step, then all backwards."""

from dataclasses import dataclass

from r1mega.config.errors import UserError
from r1mega.config.knob import at_least, knob
from r1mega.train.pipeline.schedule import BACKWARD, FORWARD, Action


@dataclass(frozen=True)
class GPipe:
    most: int = knob(64, "microbatches of a step at most: GPipe holds the activations of all", "microbatches", **at_least(1))

    def build(self, num_ranks):
        return GPipeSchedule(num_ranks, self.most)


class GPipeSchedule:
    def __init__(self, num_ranks, most):
        self.placement = tuple((rank,) for rank in range(num_ranks))  # rank r holds stage r
        self.most = most

    def actions(self, num_microbatches):
        if num_microbatches > self.most:
            raise UserError(
                f"microbatches: at most pipeline.most {self.most} with GPipe; got {num_microbatches}; "
                f"use pipeline.most={num_microbatches} or a larger trainer.micro_batch_size"
            )
        return tuple(
            tuple(
                [Action(FORWARD, rank, index) for index in range(num_microbatches)]
                + [Action(BACKWARD, rank, index) for index in reversed(range(num_microbatches))]
            )
            for rank in range(len(self.placement))
        )
