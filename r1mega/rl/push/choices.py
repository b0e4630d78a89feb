"""The ways of a push, as choices with their knobs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.config.knob import above, at_least, knob, one_of
from r1mega.config.rl import GROUP_BACKENDS
from r1mega.registry import register

if TYPE_CHECKING:
    from r1mega.rl.push.contract import Push, PushRuntime

PROOFS = ("auto", "checksum", "probe", "none")
PROOF = (
    "how it is known that the engine holds these weights: checksum compares a hash of every tensor, probe the log-probabilities of "
    "fixed prompts; auto: the strongest that the server offers; none: unproven"
)
FORMATS = ("auto", "plain", "fp8", "fp8_ue8m0")
FORMAT = "what servers hold: plain, or FP8 in 128x128 blocks with fp32 or power-of-two scales; auto: as their config.json says"


@register("push", "memory")
@dataclass(frozen=True)
class MemoryPush:
    """To an engine in this process, by reference."""

    proof: str = knob(
        "checksum",
        "hash of every tensor as given against what the engine holds; none: unproven",
        "name",
        **one_of("checksum", "none"),
    )

    def build(self, runtime: PushRuntime) -> Push:
        """A push to ``runtime.engine``."""
        from r1mega.rl.push.memory import ToMemory

        return ToMemory(self, runtime)


@register("push", "auto")
@dataclass(frozen=True)
class AutoPush:
    """``memory`` to an engine in this process, ``tensor`` to servers, both with their usual knobs."""

    def build(self, runtime: PushRuntime) -> Push:
        """The push that the engine of ``runtime`` takes."""
        return (MemoryPush() if hasattr(runtime.engine, "load_weights") else TensorPush()).build(runtime)


@dataclass(frozen=True)
class ServerWay:
    """The knobs of every way to servers."""

    bucket_bytes: int = knob(512 << 20, "tensors that travel together; three buckets are held", "bytes", **at_least(1 << 10))
    proof: str = knob("auto", PROOF, "name", **one_of(*PROOFS))
    format: str = knob("auto", FORMAT, "name", **one_of(*FORMATS))
    probe_tolerance: float = knob(0.3, "largest difference of a log-probability that the probe accepts", "nats", **above(0))
    request_seconds: float = knob(600.0, "longest time of one request to a server", "seconds", **above(0))
    drain_seconds: float = knob(60.0, "longest wait for a server without requests", "seconds", **above(0))


@register("push", "tensor")
@dataclass(frozen=True)
class TensorPush(ServerWay):
    """By /update_weights_from_tensor: as handles to GPU memory where the server is on this machine, else inside the request."""

    payload: str = knob(
        "auto", "handle: by reference to GPU memory; inline: with the numbers in the request; auto: handle where it can be", "name",
        **one_of("auto", "handle", "inline"),
    )  # fmt: skip

    def build(self, runtime: PushRuntime) -> Push:
        """A push to the servers of ``runtime``."""
        from r1mega.rl.push.tensor import ByTensor
        from r1mega.rl.push.update import ToServers

        return ToServers(self, runtime, ByTensor(self, runtime))


@register("push", "distributed")
@dataclass(frozen=True)
class DistributedPush(ServerWay):
    """By /update_weights_from_distributed: a broadcast a bucket in a process group with the servers."""

    backend: str = knob("auto", "of the process group; auto: by the device", "name", **one_of(*GROUP_BACKENDS))
    address: str = knob("", "this machine's address as the servers reach it; empty: found out", "name")
    group_seconds: float = knob(120.0, "longest time of one step of the process group", "seconds", **above(0))

    def build(self, runtime: PushRuntime) -> Push:
        """A push to the servers of ``runtime``."""
        from r1mega.rl.push.distributed import ByGroup
        from r1mega.rl.push.update import ToServers

        return ToServers(self, runtime, ByGroup(self, runtime))


@register("push", "disk")
@dataclass(frozen=True)
class DiskPush(ServerWay):
    """By /update_weights_from_disk: a Hugging Face folder that trainer and servers see."""

    folder: str = knob("", "where versions are written; empty: the run's own folder", "path")
    keep: int = knob(1, "newest versions kept", "versions", **at_least(1))

    def build(self, runtime: PushRuntime) -> Push:
        """A push to the servers of ``runtime``."""
        from r1mega.rl.push.disk import ByDisk
        from r1mega.rl.push.update import ToServers

        return ToServers(self, runtime, ByDisk(self, runtime))
