"""Is the difference what the number format makes? The judge computes once more in bf16; in fp32 a known multiple of the last bit.

In: a case. Out: a finding of the kind rounding, which explains the difference where nothing definite does and the size fits.
"""

from __future__ import annotations

from r1mega.rl.autopsy.case import Case, Finding

FITS = 3.0
"""So many times what rounding gives on these rows is still rounding: another order of sums, other kernels."""
FP32_NATS = 1e-5
"""Mean difference that fp32 gives at most: ten times what trainer and engine are seen to differ by (docs/LOG.md)."""
FP8_OVER_BF16 = 16.0
"""E4M3 has 4 bits less of mantissa than bf16."""


def rounding(case: Case, number_format: str) -> list[Finding]:
    """``number_format``: the coarser one of the two sides."""
    size = FP32_NATS
    if number_format != "fp32":
        size = in_bf16(case) * (FP8_OVER_BF16 if number_format == "fp8" else 1)
    mean = case.before / max(case.tokens, 1)
    if not mean <= FITS * size:
        return []
    says = (
        f"rounding in {number_format}: no definite cause explains it, and on these rows the format itself gives {size:.2g} nats "
        "(mean difference {before} nats)"
    )
    return [case.finding("rounding", (number_format,), [0.0] * len(case.rows), says)]


def in_bf16(case: Case) -> float:
    """Mean difference in nats of the judge's log-probabilities in bf16 from those in fp32, on the case's rows."""
    model = case.judge.model
    weights = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in weights:  # buffers (expert biases, rotary frequencies) are fp32 in every format
            parameter.data = parameter.data.bfloat16()
        scored = case.judge.score(case.rows)
    finally:
        for parameter, data in weights.items():
            parameter.data = data
    sums = sum(
        float((ours - theirs)[row.own_T].abs().sum()) for ours, theirs, row in zip(scored, case.nominal, case.rows, strict=True)
    )
    return sums / max(case.tokens, 1)
