"""A server that still holds the rollout's weights scores the same tokens in one pass. In: a case and its URL. Out: a finding.

Where one pass agrees with the judge and what was reported while decoding does not, it is decoding: cache, batch or kernel.
"""

from __future__ import annotations

import torch

from r1mega.config.errors import UserError
from r1mega.rl.autopsy.case import Case, Finding
from r1mega.rl.autopsy.judge import logprobs
from r1mega.rl.engine.sglang.client import Server


def rescored(case: Case, server: Server) -> list[Finding]:
    """Raises UserError for a server of another version of the weights, and where it does not answer as SGLang does."""
    label = str(server.get("/model_info").get("weight_version"))
    if label != str(case.version):
        raise UserError(
            f"engine.url: a server with the rollout's weights, version {case.version}; got {label} at {server.url}; push them, or "
            "leave engine.url out"
        )
    values, ours = [], []
    plain = [
        logprobs(logits, row, 1.0, with_support=False).cpu()
        for logits, row in zip(case.judge.logits(case.rows), case.rows, strict=True)
    ]
    for row, own in zip(case.rows, plain, strict=True):
        body = {
            "input_ids": row.prompt + row.tokens,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = server.post("/generate", body)
        theirs = torch.tensor([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][len(row.prompt) :]])
        if len(theirs) != len(own):
            raise UserError(
                f"engine.url: {server.url} gives a log-probability a token; got {len(theirs)} for {len(own)}; see its log"
            )
        ours.append(float((theirs - own)[row.own_T].abs().sum()))
        values.append(ours[-1])
    mean = sum(values) / max(case.tokens, 1)
    if case.side != "engine":
        return []
    says = (
        f"{server.url} scores these tokens in one pass as the judge does (mean difference {mean:.2g} nats): what it reported while "
        "decoding is off ({before} nats), so look at its cache, batching and sampling kernels"
    )
    found = case.finding("decoding", (server.url,), values, says)
    return [found] if found.convicts else []
