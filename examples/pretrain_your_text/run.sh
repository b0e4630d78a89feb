#!/usr/bin/env bash
# Pretrain a very small DeepSeek-shaped model on the texts in text/ and let it write. Usage: run.sh [OUTPUT FOLDER] [TEXT FOLDER]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/pretrain_your_text}
text=${2:-$here/text}
r1mega=${R1MEGA:-r1mega}

# 1. Text to a tokenizer and token files. A tenth of the text is held out for the validation loss.
$r1mega prepare "out=$out/data" "text=[$text]" tokenizer.vocab_size=400 valid_share=0.1

# 2. Pretraining. model=tiny gives the shape, the model.* values make it smaller still.
$r1mega pretrain "out=$out/pretrain" \
    model=tiny model.name=tinier model.vocab_size=400 model.hidden_size=64 model.num_layers=2 model.num_heads=2 \
    model.ffn_size=192 model.num_experts=4 model.num_groups=2 model.topk_groups=1 model.top_k=2 model.moe_ffn_size=48 \
    "tokenizer=$out/data/tokenizer" "data.train={$out/data/text: 1}" "data.valid=$out/data/text_valid" data.sequence_length=64 \
    trainer.steps=100 trainer.global_batch_size=8 trainer.valid_every=20 \
    optim.lr=3e-3 optim.min_lr=3e-4 optim.warmup_steps=10

# 3. The checkpoint as a Hugging Face model, and one question to it.
$r1mega export "out=$out/export" "checkpoint=$out/pretrain" "target=$out/model"
$r1mega chat "checkpoint=$out/pretrain" sampling.max_new_tokens=40 "prompt='How do you repair a lamp?'"
