"""Megatron-Core 0.16.1's checkpoint writer inside the calling process. Owns the bend of its two process-starting functions.

| bend | symptom without it | remove when |
|---|---|---|
| the results queue is a plain queue | saving starts a manager process by spawn, which runs the user's script again: EOFError or an endless loop without a ``__main__`` guard | a synchronous save asks for no process |
| the logger of the common state's check is set to errors | "Rank 1 common state dict differs" at every save of several ranks: the optimizer's part lies on rank 0 alone there, by design | the check knows the gathered form |
| buckets are written one after the other here | saving forks: a deadlock waits where threads (Gloo, OpenMP) hold locks, and a second a checkpoint | as above |

Versions: megatron-core 0.16.1. Format and hashes of what is written do not change.
"""

from __future__ import annotations

import logging
import queue


def apply() -> None:
    """Bend the writer; safe to call again."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if isinstance(filesystem_async._results_queue, queue.Queue):
        return
    filesystem_async._results_queue = queue.Queue()
    logging.getLogger("megatron.core.dist_checkpointing.validation").setLevel(logging.ERROR)
    writer = filesystem_async.FileSystemWriterAsync

    def write_here(transforms, use_msc, rank, buckets, results) -> None:
        written = {}
        for number, bucket in enumerate(buckets):
            done, pending = queue.Queue(), queue.Queue()
            pending.put(number)
            writer.write_preloaded_data(transforms, number, bucket, done, pending, True, use_msc=use_msc)
            _, outcome = done.get_nowait()
            if isinstance(outcome, Exception):
                results.put(outcome)
                return
            written[number] = outcome
        results.put(written)

    writer.write_preloaded_data_multiproc = staticmethod(write_here)
