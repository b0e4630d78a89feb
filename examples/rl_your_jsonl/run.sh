#!/usr/bin/env bash
# Teach a very small model to answer the problems of a JSONL, then reinforce it with GRPO.
# Usage: run.sh [OUTPUT FOLDER] [JSONL]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/rl_your_jsonl}
problems=${2:-$here/problems.jsonl}
r1mega=${R1MEGA:-r1mega}

# 1. 20 problems are held out. The others become pretraining text (worked) and conversations (sft): three quarters with the solution
#    of the file as the reasoning, the rest with a short remark instead of one.
$r1mega prepare "out=$out/data" "problems={mine: {kind: jsonl, path: $problems, num_train: -1, num_test: 20}}" \
    worked=-1 worked_careful_share=0.75 sft=-1 sft_careful_share=0.75 tokenizer.vocab_size=320

# 2. A short pretraining on the worked problems. The model is the preset configs/model/tinier.yaml of this folder.
$r1mega pretrain --config-dir "$here/configs" model=tinier "out=$out/pretrain" \
    "tokenizer=$out/data/tokenizer" "data.train={$out/data/worked: 1}" data.sequence_length=64 \
    trainer.steps=120 trainer.global_batch_size=16 trainer.micro_batch_size=16 \
    optim.lr=3e-3 optim.min_lr=3e-4 optim.warmup_steps=20

# 3. Cold start: the form of a conversation, with the loss on the answer alone.
$r1mega sft "out=$out/sft" "init=$out/pretrain" "data.train={$out/data/sft: 1}" data.sequence_length=64 \
    trainer.steps=120 trainer.global_batch_size=16 trainer.micro_batch_size=16 optim.lr=3e-3 optim.min_lr=3e-4

# 4. GRPO: 16 problems a rollout, 8 responses each, rewards for the right answer and for the form.
$r1mega rl "out=$out/rl" "init=$out/sft" "data.problems=$out/data/problems/train.jsonl" \
    rl.rollouts=10 rl.prompts_per_rollout=16 rl.group_size=8 rl.micro_batch_size=128 rl.sampling.max_new_tokens=24 \
    optim.lr=3e-4 optim.min_lr=3e-4

# 5. pass@1 on the problems that were held out.
$r1mega eval "out=$out/eval" "checkpoint=$out/rl" "data.problems=$out/data/problems/test.jsonl" samples=4 sampling.max_new_tokens=24
