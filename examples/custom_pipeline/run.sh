#!/usr/bin/env bash
# Draw GPipe, a schedule that lies outside the package: gpipe.py of this folder, beside 1F1B. Usage: run.sh [OUTPUT FOLDER]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/custom_pipeline}
r1mega=${R1MEGA:-r1mega}

# The schedule is named by its module and class; its module is found in this folder. No model is needed to see what it costs.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
for pipeline in 1f1b gpipe.GPipe; do
    $r1mega timeline "pipeline=$pipeline" ranks=4 microbatches=8 forward=1 input_grad=1 weight_grad=1 "out=$out/$pipeline"
done
