"""How the trainer's weights come to the engine, proven at every push. Registers the package's own ways; imports no torch.

``choices`` has the knobs; ``update`` orders a push to servers, of which ``tensor``, ``distributed`` and ``disk`` are the ways;
``memory`` is the way to an engine in this process. ``plan`` is what travels together, ``wire`` in which format, ``layout`` where it
ends up in a server, ``hashing`` and ``proof`` how that is known, ``probe`` how it is guessed where a server reports nothing.
"""

from r1mega.rl.push.choices import AutoPush, DiskPush, DistributedPush, MemoryPush, TensorPush
from r1mega.rl.push.contract import Push, PushReport, PushRuntime

__all__ = ["AutoPush", "DiskPush", "DistributedPush", "MemoryPush", "Push", "PushReport", "PushRuntime", "TensorPush"]
