"""Golden losses: runs three tiny configs and writes, or compares, their losses and gradient norms to the last bit.

    python tools/golden.py            # compare with tests/golden/*.json; status 1 and the first difference where one differs
    python tools/golden.py --write    # write them anew: after a change that means to alter numbers, with the reason in docs/LOG.md

Each config runs in a process of its own with one thread, and with the instruction sets of torch, MKL and oneDNN held at what every
x86-64 processor has, so that another machine gives the same bits. They hold for the torch version that the files name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "golden"
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
STEPS = 12
SMALL = ["model.hidden_size=64", "model.num_layers=3", "model.vocab_size=320", "model.num_experts=8", "model.moe_ffn_size=32"]
CONFIGS: dict[str, list[str]] = {
    "moe": [*SMALL],
    "grouped_yarn": [
        *SMALL,
        "model.q_lora_rank=24",
        "model.num_groups=4",
        "model.topk_groups=2",
        "model.num_mtp_layers=0",
        "model.max_position_embeddings=128",
        "model.yarn.factor=4",
        "model.yarn.original_max_position_embeddings=32",
    ],
    "two_ranks": [*SMALL, "launch.processes=2", "parallel.expert=2"],
}
"""Name to overrides of ``pretrain``."""


def main(arguments: list[str]) -> int:
    """Write or compare; returns the exit status."""
    if arguments not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    status = 0
    with tempfile.TemporaryDirectory(prefix="golden-") as place:
        for name in CONFIGS:
            made, path = measure(name, Path(place)), FOLDER / f"{name}.json"
            if arguments:
                path.write_text(json.dumps(made, indent=1) + "\n")
                continue
            told = difference(json.loads(path.read_text()), made)
            print(f"{name}: {told or 'equal'}")
            status |= bool(told)
    return status


def measure(name: str, place: Path) -> dict[str, Any]:
    """``{"torch": version, "loss": [...], "grad_norm": [...]}`` of a config, floats as hexadecimal text; works below ``place``."""
    data = place / "data"
    if not data.is_dir():
        text = place / "text.txt"  # the same on every machine, unlike the library of a Python
        lines = [f"{left} times {right} makes {left * right}." for left in range(60) for right in range(40)]
        text.write_text("\n".join(lines))
        _python(["-m", "r1mega", "prepare", f"out={data}", f"text=[{text}]", "tokenizer.vocab_size=320"])
    program = (
        "import json, sys, torch\n"
        "from r1mega import api\n"
        "from r1mega.train import fit\n"
        "seen, true = [], fit.Trainee.step\n"
        "def step(self, *args):\n"
        "    result = true(self, *args)\n"
        "    seen.append((float(result.loss).hex(), float(result.grad_norm).hex()))\n"
        "    return result\n"
        "fit.Trainee.step = step\n"
        "api.pretrain(*sys.argv[2:])\n"
        "import os\n"
        "if os.environ.get('RANK', '0') == '0':\n"
        "    losses, norms = zip(*seen)\n"
        "    made = {'torch': torch.__version__.partition('+')[0], 'loss': losses, 'grad_norm': norms}\n"
        "    open(sys.argv[1], 'w').write(json.dumps(made))\n"
    )
    overrides = [
        "model=tiny", *CONFIGS[name], f"out={place / name}", f"tokenizer={data}/tokenizer", f"data.train={{{data}/text: 1}}",
        "data.sequence_length=64", f"trainer.steps={STEPS}", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
        "optim.lr=3e-3", "optim.warmup_steps=2", "trainer.peak_tflops=1", "device.threads=1",
    ]  # fmt: skip
    result, script = place / f"{name}.result", place / "golden_run.py"
    script.write_text(program)
    processes = next((int(item.partition("=")[2]) for item in overrides if item.startswith("launch.processes=")), 1)
    arguments = [str(script), str(result), *(item for item in overrides if not item.startswith("launch."))]
    if processes == 1:
        _python(arguments)
    else:
        starter = f"from r1mega.launch.local import start_ranks; start_ranks({arguments!r}, {processes})"
        _python(["-c", starter])
    return json.loads(result.read_text())


def difference(wanted: dict[str, Any], made: dict[str, Any]) -> str:
    """The first difference of two results, or ""."""
    if wanted["torch"] != made["torch"]:
        return f"made with torch {wanted['torch']}; got {made['torch']}; install that one, or run tools/golden.py --write"
    for key in ("loss", "grad_norm"):
        for step, (old, new) in enumerate(zip(wanted[key], made[key], strict=True), start=1):
            if old != new:
                return f"{key} of step {step} is {float.fromhex(old)!r}; got {float.fromhex(new)!r}"
    return ""


def _python(arguments: list[str]) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **PORTABLE, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"golden: {' '.join(arguments)[:200]} ended with status {done.returncode}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
