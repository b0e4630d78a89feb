"""What a server's log-probabilities mean: of softmax(logits / temperature), as the loss wants them, or of softmax(logits).

In: a server with weights. Out: nothing, or an error that names the variable. SGLang does not say it in /server_info.
"""

from __future__ import annotations

import math
from typing import Any

from r1mega.config.errors import UserError
from r1mega.rl.engine.sglang.client import EngineError, Server

TEMPERATURES = (1.0, 2.0)
PROMPT = [1, 2, 3, 4]
SHOWN = 16
SMALLEST_GAP = 0.01
"""Of log-probabilities, below which the model is too even to tell the two apart."""


async def check_scaling(server: Server) -> bool:
    """Raise UserError where log-probabilities are not of the temperature; False where the model does not show it.

    Two tokens' log-probabilities differ by (logit - logit) / temperature, whatever is drawn: at temperature 2 by half.
    """
    tops = [await _top(server, temperature) for temperature in TEMPERATURES]
    shared = sorted(tops[0].keys() & tops[1].keys(), key=tops[0].get)
    if len(shared) < 2 or (gap := tops[0][shared[-1]] - tops[0][shared[0]]) < SMALLEST_GAP:
        return False
    ratio = gap / max(tops[1][shared[-1]] - tops[1][shared[0]], 1e-9)
    if math.isclose(ratio, TEMPERATURES[1] / TEMPERATURES[0], rel_tol=0.15):
        return True
    raise UserError(
        f"engine=sglang: {server.url} gives log-probabilities at the sampling temperature; got a ratio of {ratio:.3f} between "
        f"temperatures {TEMPERATURES[0]:g} and {TEMPERATURES[1]:g}; start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
    )


async def _top(server: Server, temperature: float) -> dict[int, float]:
    body = {
        "input_ids": PROMPT,
        "return_logprob": True,
        "top_logprobs_num": SHOWN,
        "sampling_params": {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True},
    }
    answer = await server.generate(body, 600)
    try:
        rows: list[Any] = answer["meta_info"]["output_top_logprobs"][0]
        return {int(row[1]): float(row[0]) for row in rows}
    except (KeyError, IndexError, TypeError, ValueError):
        raise EngineError(server.url, "/generate", 200, "top_logprobs_num gave no output_top_logprobs") from None
