"""``r1mega rl``: prompt, rollout, reward, advantage, loss, weights, and back to rollout; in step or running ahead, by one knob.

With ``rl.lag=0`` a rollout begins when its weights have been pushed, and training waits for it. With ``rl.lag=k`` the rollouts'
thread (:mod:`r1mega.rl.rollouts`) works on the next k rollouts while this one is trained on; a push interrupts it for its own time
alone. A data rank generates for its share of the questions and trains on what it generated; the optimizer step is over all ranks.
What each part means lies in its own file; this one only orders them.
"""

from __future__ import annotations

import time
from typing import Any

from r1mega.config.errors import Stopped, UserError
from r1mega.config.rl import RlConfig
from r1mega.rl.rollouts import Taken
from r1mega.rl.run import Run, opened
from r1mega.train import stop
from r1mega.train.trainee import StepResult


def rl(config: RlConfig) -> dict[str, Any]:
    """Reinforce ``config.init`` for ``rl.rollouts`` rollouts; the same call goes on from the last checkpoint."""
    with opened(config) as run:
        run.begin()
        while run.done < config.rl.rollouts:
            turn(run)
        return run.finish()


def turn(run: Run) -> None:
    """One rollout: take it, value it, train on it, push, keep what came of it."""
    began = run.begin_turn()
    with run.timed("rollout"):
        taken = run.take()
    with run.engine_asleep():
        with run.timed("value"):
            rows, told = run.value(taken)
        with run.timed("score"):
            run.learner.score(rows)
            is_sound = run.watch(rows)
        with run.timed("train"):
            results = run.learner.train(rows, run.done) if is_sound else run.learner.skip()
    run.saver.poll()
    if went_back(run, taken, results):
        return
    run.push()
    run.count(taken, rows, time.perf_counter() - began, is_sound)
    asked = stop.asked(run.mesh)
    valid = {} if asked else run.validate()
    run.save(asked)
    run.log(taken, rows, told, results, valid)
    run.saver.settle()  # no earlier than the lines up to it, which a run that goes on from it keeps
    run.profile.step()
    if asked:
        run.finish()
        raise Stopped(
            f"stopped: SIGTERM came, rollout {run.done} of {run.sizes.rollouts} is saved; the same command goes on from there"
        )


def went_back(run: Run, taken: Taken, results: list[StepResult]) -> bool:
    """Log updates that were not applied and, where the run shall and can, go back; the prompts stay moved on."""
    troubles = [result.trouble for result in results if result.trouble]
    if not troubles:
        return False
    number, wanted = run.done + 1, run.sizes.on_spike
    run.saver.wait()  # the run ends or goes back now, perhaps to what is being saved
    if wanted == "stop":
        raise UserError(
            f"training: sound updates with rl.on_spike=stop; got {troubles[0]} in rollout {number}; lower optim.lr, or use "
            "rl.on_spike=skip or rollback; the same command goes on from the last checkpoint"
        )
    for trouble in troubles:
        run.learner.health.trouble(trouble)
    is_back = wanted == "rollback" and run.go_back(taken)
    told = f"rolled back to rollout {run.done}" if is_back else f"{len(troubles)} of its updates skipped"
    run.metrics.event(told, number, troubles[0])
    if is_back:
        run.metrics.rewind(run.done)
        run.push()
    return is_back
