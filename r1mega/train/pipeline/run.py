"""The executor of every schedule: walks a rank's actions, sends and receives what lies between stages, records what ran when.

In: this rank's stages, microbatches, a forward function, a loss. Out: gradients in the stages' buffers and what the loss returned
for each microbatch. Activations and their gradients are ``[S / tensor, B, D]``, S being what a context rank holds of a sequence.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1mega.mesh import Mesh
from r1mega.model.gradients import WeightGradients
from r1mega.train.pipeline.schedule import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Pipeline, rank_of_stage
from r1mega.train.pipeline.timeline import Event

Message = tuple[str, int, int]
"""What goes between ranks: F and the stage that needs the activation, or B and the stage that needs the gradient; microbatch."""


class _Inbox:
    """Messages from one rank in the order of their sending.

    ``ahead``: keep one receive posted before it is asked for. Not on a GPU, where it is a kernel that waits: whatever synchronises
    the device meanwhile would wait for it, and so for this rank's own progress.
    """

    def __init__(self, group, source: int, expected: list[Message], make: Callable[[Message], torch.Tensor], *, ahead: bool):
        self._group, self._source, self._make, self._ahead = group, source, make, ahead
        self._expected = iter(expected)
        self._here: dict[Message, torch.Tensor] = {}
        self._coming: tuple[Message, torch.Tensor, Any] | None = None
        if ahead:
            self._post()

    def _post(self) -> None:
        message = next(self._expected, None)
        self._coming = None
        if message is not None:
            tensor = self._make(message)
            self._coming = message, tensor, dist.irecv(tensor, src=self._source, group=self._group)

    def take(self, wanted: Message) -> torch.Tensor:
        """The tensor of ``wanted``; what was sent before it waits for its turn."""
        while wanted not in self._here:
            if not self._ahead:
                self._post()
            message, tensor, work = self._coming
            work.wait()
            self._here[message] = tensor
            if self._ahead:
                self._post()
        return self._here.pop(wanted)


class Executor:
    """Runs a pipeline's schedules on one rank.

    ``stages``: stage to module, this rank's. ``stretch``: seconds that an action is made longer by, for measurements of schedules
    where the real work is too small to show them.
    """

    def __init__(
        self,
        mesh: Mesh,
        pipeline: Pipeline,
        stages: dict[int, torch.nn.Module],
        hidden_size: int,
        dtype: torch.dtype,
        stretch: Callable[[Action], float] | None = None,
    ):
        self.mesh, self.pipeline, self.stages, self.stretch = mesh, pipeline, stages, stretch
        self.hidden_size, self.dtype = hidden_size, dtype
        self.line = mesh.axes["pipeline"]
        self.holder = rank_of_stage(pipeline.placement)
        self.last = max(self.holder)
        neighbours = [(stage, stage + way) for stage in self.holder for way in (1, -1) if stage + way in self.holder]
        pairs = [tuple(self.line.ranks[self.holder[stage]] for stage in pair) for pair in neighbours]
        self.groups = mesh.connect(pairs)
        self.events: list[Event] | None = None
        """Set to a list to record; on a GPU each action then waits for its end."""

    def run(
        self,
        microbatches: Sequence[Any],
        forward: Callable[[torch.nn.Module, Any], torch.Tensor],
        loss: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]],
        *,
        forward_only: bool = False,
    ) -> list[Any]:
        """All microbatches of a step (``forward_only``: their forward passes).

        ``forward(stage, microbatch)``: the stage's output; ``loss(output, microbatch)``: on the last stage, the scalar to go back
        from and what to return of it. Returns the latter by microbatch on the last stage's rank, nothing on the others.
        """
        lists = self.pipeline.actions(len(microbatches))
        if forward_only:
            lists = tuple(tuple(action for action in actions if action.work == FORWARD) for actions in lists)
        step = _Step(self, microbatches, forward, loss, lists)
        with torch.no_grad() if forward_only else contextlib.nullcontext():
            for action in lists[self.line.rank]:
                step.do(action)
        return step.finish()


class _Step:
    """One walk through the actions of a step."""

    def __init__(self, executor: Executor, microbatches, forward, loss, lists):
        self.executor, self.microbatches, self.forward, self.loss = executor, microbatches, forward, loss
        self.here = executor.line.rank
        self.device = executor.mesh.device
        self.inputs: dict[tuple[int, int], torch.Tensor | None] = {}
        self.outputs: dict[tuple[int, int], torch.Tensor] = {}
        self.local: dict[Message, torch.Tensor] = {}
        self.results: dict[int, Any] = {}
        self.sent: list[Any] = []
        self.waiting = WeightGradients()
        self.inboxes = {}
        for rank, actions in enumerate(lists):
            messages = [message for action in actions if (message := self._message(action)) and self._goes_to(message) == self.here]
            if rank != self.here and messages:
                source = executor.line.ranks[rank]
                group = executor.groups[source, executor.mesh.rank]
                self.inboxes[rank] = _Inbox(group, source, messages, self._empty, ahead=self.device.is_cpu)

    def _message(self, action: Action) -> Message | None:
        """What ``action`` leaves for another stage."""
        if action.work == FORWARD:
            return (FORWARD, action.stage + 1, action.microbatch) if action.stage < self.executor.last else None
        if action.work == WEIGHT_GRAD or action.stage == 0:
            return None
        return ("B", action.stage - 1, action.microbatch)

    def _goes_to(self, message: Message) -> int:
        return self.executor.holder[message[1]]

    def _empty(self, message: Message) -> torch.Tensor:
        rows, length = self.microbatches[message[2]].tokens_BS.shape
        shape = (length // self.executor.mesh.parallel.tensor, rows, self.executor.hidden_size)  # sequence parallel
        return torch.empty(shape, dtype=self.executor.dtype, device=self.device.torch_device)

    def _take(self, message: Message) -> torch.Tensor:
        if message in self.local:
            return self.local.pop(message)
        kind, stage, _ = message
        source = self.executor.holder[stage - 1 if kind == FORWARD else stage + 1]
        return self.inboxes[source].take(message)

    def _leave(self, message: Message, tensor: torch.Tensor) -> None:
        rank = self._goes_to(message)
        if rank == self.here:
            self.local[message] = tensor
            return
        target = self.executor.line.ranks[rank]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=target, group=self.executor.groups[self.executor.mesh.rank, target])
        self.sent.append((work, tensor))  # the tensor lives until it has gone
        self.sent = [(work, tensor) for work, tensor in self.sent if not work.is_completed()]

    def do(self, action: Action) -> None:
        """One action: wait for what it needs, work, hand on what it leaves."""
        key = (action.stage, action.microbatch)
        received = self._needed(action)
        began = time.time()
        if action.work == FORWARD:
            left = self._forward(key, received)
        elif action.work == WEIGHT_GRAD:
            left = self.waiting.run(key)
        else:
            left = self._backward(key, received, later=action.work == INPUT_GRAD)
        if self.executor.stretch is not None:
            time.sleep(self.executor.stretch(action))
        if self.executor.events is not None:
            self.device.finish_current_work()
            self.executor.events.append(Event(action.work, action.stage, action.microbatch, began, time.time()))
        message = self._message(action)
        if message is not None:
            self._leave(message, left)

    def _needed(self, action: Action) -> torch.Tensor | None:
        if action.work == FORWARD:
            return self._take((FORWARD, action.stage, action.microbatch)) if action.stage else None
        if action.work == WEIGHT_GRAD or action.stage == self.executor.last:
            return None
        return self._take(("B", action.stage, action.microbatch))

    def _forward(self, key: tuple[int, int], activation: torch.Tensor | None) -> torch.Tensor | None:
        stage, number = key
        module, batch = self.executor.stages[stage], self.microbatches[number]
        if activation is not None:
            activation = activation.detach()
            if torch.is_grad_enabled():
                activation.requires_grad_()
            module.set_input_tensor([activation])
        output = self.forward(module, batch)
        module.set_input_tensor([None])  # the stage keeps what it is given
        if stage == self.executor.last:
            output, self.results[number] = self.loss(output, batch)
        if torch.is_grad_enabled():
            self.inputs[key], self.outputs[key] = activation, output
        return output.detach()

    def _backward(self, key: tuple[int, int], grad: torch.Tensor | None, *, later: bool) -> torch.Tensor | None:
        activation, output = self.inputs.pop(key), self.outputs.pop(key)
        with self.waiting.collect(key) if later else contextlib.nullcontext():
            torch.autograd.backward(output, grad)
        return None if activation is None else activation.grad

    def finish(self) -> list[Any]:
        """Wait for what was sent; the results in the order of the microbatches."""
        for work, _ in self.sent:
            work.wait()
        return [self.results[number] for number in sorted(self.results)]
