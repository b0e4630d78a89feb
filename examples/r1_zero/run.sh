#!/usr/bin/env bash
# R1-Zero in miniature: search for countdown solutions, read from plain text, shown 4,000 times, then reinforced.
# Usage: run.sh [OUTPUT FOLDER] [cpu | h200 | smoke] [OVERRIDES OF THE RL COMMAND]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/r1_zero}
size=${2:-cpu}
r1mega=${R1MEGA:-r1mega}
length=640 # tokens of the longest search there is
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
case $size in
    cpu)
        documents=40000
        model=(model=tiny)
        pretrain=(trainer.steps=1600 trainer.global_batch_size=6 trainer.micro_batch_size=6 optim.lr=3e-3 optim.min_lr=2e-4)
        sft=(trainer.steps=150 trainer.global_batch_size=6 trainer.micro_batch_size=6 optim.lr=5e-4 optim.min_lr=5e-5)
        rl=(rl.rollouts=25 rl.prompts_per_rollout=16 rl.group_size=16 rl.updates_per_rollout=2 rl.micro_batch_size=32 optim.lr=1e-4 optim.min_lr=1e-4 rl.save_every=10)
        common=()
        ;;
    h200)
        documents=100000
        model=(model=small model.num_layers=6 model.vocab_size=512)
        pretrain=(trainer.steps=1400 trainer.global_batch_size=64 trainer.micro_batch_size=64 optim.lr=6e-4 optim.min_lr=6e-5 trainer.async_save=false)
        sft=(trainer.steps=80 trainer.global_batch_size=64 trainer.micro_batch_size=64 optim.lr=2e-4 optim.min_lr=2e-5 trainer.async_save=false)
        rl=(rl.rollouts=60 rl.prompts_per_rollout=32 rl.group_size=16 rl.updates_per_rollout=2 rl.micro_batch_size=64 optim.lr=1e-5 optim.min_lr=1e-5 rl.save_every=40 rl.async_save=false)
        rl+=(engine=sglang +engine.args.mem_fraction_static=0.3 +engine.args.cuda_graph_max_bs_decode=512 +engine.args.max_running_requests=512)
        common=(device=cuda precision=bf16)
        ;;
    smoke) # a few steps of each command: does it run here?
        documents=300
        model=(model=tiny)
        pretrain=(trainer.steps=2 trainer.global_batch_size=2 trainer.micro_batch_size=2 optim.warmup_steps=1)
        sft=(trainer.steps=2 trainer.global_batch_size=2 trainer.micro_batch_size=2 optim.warmup_steps=1)
        rl=(rl.rollouts=1 rl.prompts_per_rollout=2 rl.group_size=2 rl.sampling.max_new_tokens=16 rl.valid.every=1 rl.valid.limit=2 optim.warmup_steps=0)
        common=()
        ;;
    *) echo "run.sh: cpu, h200 or smoke; got $size" >&2; exit 2 ;;
esac

# Problems, 200 of them held out; searches as text and as conversations; a tokenizer.
if [ ! -f "$out/data/sft.json" ]; then
    python3 "$here/problems.py" "$out/problems" "$documents"
    $r1mega prepare "out=$out/data" "text=[$out/problems/text.jsonl]" tokenizer.vocab_size=512 "sft_from=$out/problems/sft.jsonl"
fi

# 1. Read.
$r1mega pretrain "out=$out/pretrain" "${model[@]}" "${common[@]}" "tokenizer=$out/data/tokenizer" "data.train={$out/data/text: 1}" \
    "data.valid=$out/data/text_valid" "data.sequence_length=$length" data.packing=isolated optim.warmup_steps=50 trainer.valid_every=200 \
    "${pretrain[@]}"

# 2. Be shown: conversations in R1's format, whose searches give up early.
$r1mega sft "out=$out/sft" "init=$out/pretrain" "${common[@]}" "data.train={$out/data/sft: 1}" "data.sequence_length=$length" \
    optim.warmup_steps=10 "${sft[@]}"

# 3. Find out: GRPO, with the held-out problems every five rollouts.
$r1mega rl "out=$out/rl" "init=$out/sft" "${common[@]}" "data.problems=$out/problems/train.jsonl" "rl.valid.problems=$out/problems/test.jsonl" \
    "reward.weights={countdown.Countdown: 1, format: 0}" "~reward.weights.accuracy" rl.valid.verifier=countdown.Countdown rl.valid.every=5 rl.valid.temperature=1 \
    "rl.sampling.max_new_tokens=$length" policy_loss.kl_coef=0 optim.warmup_steps=4 "${rl[@]}" "${@:3}"

$r1mega report "run=$out/rl"
