"""Hashes of the served weights on a CPU.

| bend | symptom without it | remove when |
|---|---|---|
| ``torch.cuda.synchronize`` does nothing in a server without a GPU | /weights_checker answers "Torch not compiled with CUDA enabled" | it asks for its own device |

Versions: sglang 0.5.16, 0.5.23, torch 2.13.
"""

import torch


def _nothing(*args, **kwargs) -> None:
    """There is no device to wait for."""


if not torch.cuda.is_available():
    torch.cuda.synchronize = _nothing
