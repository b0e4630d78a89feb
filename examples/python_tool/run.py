"""A very small model learns to have sums worked out by a Python tool: cold start on written turns, then GRPO with the tool.

Usage: run.py [OUTPUT FOLDER] [more overrides of the rl command, such as environment.sandbox=process]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from r1mega import api

TINIER = {
    "vocab_size": 300, "max_position_embeddings": 128, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "ffn_size": 192, "moe_ffn_size": 48, "num_experts": 4, "top_k": 2, "num_groups": 2, "topk_groups": 1, "num_mtp_layers": 0,
}  # fmt: skip
"""What makes the preset model=tiny still smaller: two layers, one of them with experts."""

here = Path(__file__).resolve().parent
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/python_tool")
tool = ["environment=python", *sys.argv[2:]]

# 1. Problems to train and to test on; 400 conversations with the tool (sft.jsonl); the same as plain text to learn to read from.
subprocess.run([sys.executable, here / "problems.py", out / "problems"], check=True)
api.prepare(
    f"out={out}/data",
    f"text=[{out}/problems/text.jsonl]",
    "valid_share=0",
    "tokenizer.vocab_size=300",
    f"sft_from={out}/problems/sft.jsonl",
)

# 2. A short pretraining, and the cold start: only what the model writes is learnt, not what the tool says.
training = ["data.sequence_length=96", "trainer.global_batch_size=16", "trainer.micro_batch_size=16", "trainer.log_every=10"]
api.pretrain(
    "model=tiny",
    *(f"model.{name}={value}" for name, value in TINIER.items()),
    f"out={out}/pretrain",
    f"tokenizer={out}/data/tokenizer",
    f"data.train={{{out}/data/text: 1}}",
    "data.packing=isolated",
    "trainer.steps=30",
    "optim.lr=5e-3",
    "optim.min_lr=5e-4",
    "optim.warmup_steps=10",
    *training,
)
api.sft(
    f"out={out}/sft",
    f"init={out}/pretrain",
    f"data.train={{{out}/data/sft: 1}}",
    "trainer.steps=220",
    "optim.lr=5e-3",
    "optim.min_lr=5e-4",
    "optim.warmup_steps=10",
    *training,
)

# 3. The same checkpoint on the held-out sums, with the tool and without.
test = [f"data.problems={out}/problems/test.jsonl", "sampling.max_new_tokens=48", "sampling.temperature=1", "samples=1"]
with_tool = api.eval(f"out={out}/eval_sft", f"checkpoint={out}/sft", *test, *tool)
without = api.eval(f"out={out}/eval_without", f"checkpoint={out}/sft", *test)

# 4. GRPO: 8 problems a rollout, 8 episodes each.
api.rl(
    f"out={out}/rl",
    f"init={out}/sft",
    f"data.problems={out}/problems/train.jsonl",
    "rl.rollouts=6",
    "rl.prompts_per_rollout=8",
    "rl.group_size=8",
    "rl.micro_batch_size=64",
    "rl.sampling.max_new_tokens=48",
    "optim.lr=1e-4",
    "optim.min_lr=1e-4",
    "optim.warmup_steps=1",
    *tool,
)
after = api.eval(f"out={out}/eval_rl", f"checkpoint={out}/rl", *test, *tool)
for name, result in (("cold start without the tool", without), ("cold start with the tool", with_tool), ("after GRPO", after)):
    print(f"{name}: pass@1 {result['pass_at_1']:.3f} (standard error {result['standard_error']:.3f}), {result['turns']:.2f} turns")
