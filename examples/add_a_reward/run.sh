#!/usr/bin/env bash
# Reinforce the model of examples/rl_your_jsonl with a reward that lies outside the package: my_reward.py of this folder.
# Usage: run.sh [OUTPUT FOLDER] [OUTPUT FOLDER OF rl_your_jsonl]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/add_a_reward}
base=${2:-runs/rl_your_jsonl}
r1mega=${R1MEGA:-r1mega}

# 1. The problems and the cold start of the other example, unless they are there.
[ -d "$base/sft/checkpoints" ] || "$here/../rl_your_jsonl/run.sh" "$base"

# 2. Three rollouts. The reward is named by its module and class, its weight stands beside the others', its knob is an option.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
$r1mega rl "out=$out/rl" "init=$base/sft" "data.problems=$base/data/problems/train.jsonl" \
    "reward.weights={accuracy: 1, format: 1, my_reward.Brief: 0.5}" "reward.options={my_reward.Brief: {half: 20}}" \
    rl.rollouts=3 rl.prompts_per_rollout=8 rl.group_size=8 rl.micro_batch_size=64 rl.sampling.max_new_tokens=24 \
    optim.lr=3e-4 optim.min_lr=3e-4
