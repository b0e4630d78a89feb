"""Megatron-Core 0.16.1's tensor parallel mappings, on any device. Owns the bend of its all-reduce.

| bend | symptom without it | remove when |
|---|---|---|
| ``_reduce`` is given contiguous tensors | it reduces a contiguous copy and returns what it was given: a gradient that is not contiguous stays this rank's own, and is wrong | it returns what it reduced |

Versions: megatron-core 0.16.1.
"""

from __future__ import annotations


def apply() -> None:
    """Bend the function; safe to call again."""
    from megatron.core.tensor_parallel import mappings

    if getattr(mappings._reduce, "_r1mega_bent", False):
        return
    reduce = mappings._reduce

    def reduce_contiguous(input_, group):
        return reduce(input_.contiguous(), group)

    reduce_contiguous._r1mega_bent = True
    mappings._reduce = reduce_contiguous
