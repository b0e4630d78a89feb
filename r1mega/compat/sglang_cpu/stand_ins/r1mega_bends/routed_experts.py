"""Records of routed experts on a CPU.

| bend | symptom without it | remove when |
|---|---|---|
| the host's record of experts is not pinned | with enable_return_routed_experts the server ends: "pin_memory=True requires a CUDA or other accelerator backend" | it is pinned only where there is a device |

Versions: sglang 0.5.16, 0.5.23, torch 2.13.
"""

import torch
from sglang.srt.state_capturer.base import BaseHostCache


def _unpinned(self, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "") -> None:
    self.buffer = torch.zeros(num_tokens, num_layers, topk_size, dtype=torch.int32)
    self.num_tokens, self.num_layers, self.topk_size, self.name = num_tokens, num_layers, topk_size, name
    self._log_allocation()


if not torch.cuda.is_available():
    BaseHostCache.__init__ = _unpinned
