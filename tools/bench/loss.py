"""The training loss of one model in several precisions, on the same batches from the same weights; how far they lie from the first.

    python tools/bench/loss.py tokens=runs/prepare/text device=cuda model=small steps=300 precisions=bf16,fp8 out=runs/loss

``precisions``: the first is what the others are compared with; what shall be otherwise in one of them follows behind plus signs,
as in ``bf16,fp8,fp8+precision.expert_weight_gradients=bf16``. ``warm``: steps in the first precision before; all begin from its
weights and moments after them. The first hundreds of steps from random weights leave a plateau at a time that the last bit
decides: two roundings of one precision lie further apart there than two precisions later. ``tokens``: a token file of ``r1mega
prepare``, without its suffix. Each precision trains in a process of its own; one that lies in ``out`` with the same options is
not trained again. The difference is that of means over ``window`` steps, relative to the first precision's (DeepSeek-V3 3.3:
below 0.25%); single steps are noise. Writes loss.json and loss.html, a page with the curves and their difference, into ``out``;
prints one JSON line. Status 1: a difference is above ``limit``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r1mega.config.errors import UserError

DEFAULTS = {
    "device": "cpu", "model": "tiny", "steps": 300, "batch": 8, "micro": 8, "length": 1024, "lr": 4e-4, "seed": 1, "warm": 0,
    "precisions": "bf16,fp8", "tokens": "runs/prepare/text", "out": "runs/loss", "window": 50, "limit": 0.0025,
}  # fmt: skip

COMPARISON = ("precisions", "out", "window", "limit")
"""Options of the comparison, which do not change what one precision learns."""
WARM = "warm"
"""The folder in ``out`` of the checkpoint after the warm steps; behind a plus sign, the job that makes it."""


def trained(options: dict, precision: str) -> list[float]:
    """The loss of each step after the warm ones; these are made, and kept in ``out``, where :data:`WARM` is asked for."""
    from r1mega.compat import megatron_jit
    from r1mega.config.compose import compose
    from r1mega.config.run import LaunchConfig, ParallelConfig
    from r1mega.config.train import OptimConfig
    from r1mega.data.loader import PretrainLoader
    from r1mega.device import open_device
    from r1mega.mesh import close_mesh, open_mesh
    from r1mega.model.forward import token_losses
    from r1mega.train import checkpoint
    from r1mega.train.checkpoint import TrainState
    from r1mega.train.fit import masked_sum, tensors
    from r1mega.train.schedule import learning_rate
    from r1mega.train.trainee import Trainee

    megatron_jit.apply()
    precision, *changes = precision.split("+")
    is_warming = WARM in changes
    changes = [change for change in changes if change != WARM]
    chosen = [f"{key}={options[key]}" for key in ("device", "model")]
    config = compose("bench", ["bench=step", f"precision={precision}", f"sequence_length={options['length']}", *chosen, *changes])
    mesh = open_mesh(open_device(config.device), ParallelConfig(), LaunchConfig(), options["seed"])
    optim = OptimConfig(lr=options["lr"], min_lr=options["lr"] / 10, warmup_steps=(options["warm"] or options["steps"]) // 10)
    trainee = Trainee(config.model, optim, mesh, config.precision)
    loader = PretrainLoader({options["tokens"]: 1.0}, options["length"], options["batch"], options["seed"])
    place, last = Path(options["out"]) / WARM, options["warm"] + options["steps"]
    found = []
    for step in range(options["warm"] if is_warming else last):
        parts = tensors(loader.next(), options["micro"], mesh, segments=False)
        if step < options["warm"] and not is_warming:
            continue
        if step == options["warm"] > 0:
            checkpoint.load(trainee, place)
        rate = learning_rate(optim, step, last)
        found.append(trainee.step(parts, token_losses, masked_sum, rate, lambda loss, norm: "").loss)
    if is_warming:
        shutil.rmtree(place, ignore_errors=True)
        checkpoint.save(trainee, TrainState(step=step + 1), place, keep_last=1, tokenizer=None, parent=None, command="bench")
    close_mesh()
    return found


def means(losses: list[float], window: int) -> list[float]:
    """The mean of each ``window`` steps up to a step, from the first whole one on."""
    return [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]


def page(losses: dict[str, list[float]], differences: dict[str, list[float]], options: dict) -> str:
    """Both plots as one HTML page."""
    from r1mega.report.plot import PLOT_CSS, Series, line_plot

    curves = [Series(name, list(enumerate(values, 1)), colour) for colour, (name, values) in enumerate(losses.items())]
    first = options["window"]
    apart = [
        Series(name, [(first + idx, 100 * value) for idx, value in enumerate(values)], colour)
        for colour, (name, values) in enumerate(differences.items(), 1)
    ]
    plots = [
        line_plot(curves, "step", "training loss (nats a token)", title="Loss"),
        line_plot(apart, "step", f"difference of means over {first} steps (%)", title=f"Difference to {next(iter(losses))}"),
    ]
    colours = ":root{--ink:#222;--muted:#667;--rule:#ddd}"
    style = f"{colours}body{{font:15px system-ui,sans-serif;max-width:48rem;margin:2rem auto}}{PLOT_CSS}"
    return f"<!doctype html><meta charset=utf-8><title>Loss by precision</title><style>{style}</style>{''.join(plots)}"


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    options = dict(DEFAULTS)
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if key not in DEFAULTS or not sign:
            print(f"loss: key=value of {', '.join(DEFAULTS)}; got {argument!r}", file=sys.stderr)
            return 2
        options[key] = type(DEFAULTS[key])(value)
    names, out = options["precisions"].split(","), Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    losses = {}
    warming = [f"{names[0]}+{WARM}"] if options["warm"] and len(names) > 1 else []
    for name in [*warming, *names]:
        own = out / f"{name}.json"
        asked = {key: value for key, value in options.items() if key not in COMPARISON}
        kept = json.loads(own.read_text()) if own.is_file() else {}
        if kept.get("options") != asked and len(names) > 1:
            alone = [f"{key}={value}" for key, value in (options | {"precisions": name}).items()]
            status = subprocess.run([sys.executable, __file__, *alone]).returncode
            if status:
                return status  # it has told why
            kept = json.loads(own.read_text())
        if len(names) == 1:
            try:
                own.write_text(json.dumps({"options": asked, "losses": trained(options, name)}))
            except UserError as error:
                print(error, file=sys.stderr)
                return 2
            return 0
        if name in names:
            losses[name] = kept["losses"]
    plain = means(losses[names[0]], options["window"])
    differences = {}
    for name in names[1:]:
        own = means(losses[name], options["window"])
        differences[name] = [value / base - 1 for value, base in zip(own, plain, strict=True)]
    worst = {name: max(map(abs, values)) for name, values in differences.items()}
    last = {name: values[-1] for name, values in differences.items()}
    (out / "loss.json").write_text(json.dumps({"options": options, "losses": losses, "differences": differences}))
    (out / "loss.html").write_text(page(losses, differences, options))
    ends = {name: round(means(values, options["window"])[-1], 4) for name, values in losses.items()}
    print(json.dumps({"last_mean": ends, "worst_difference": worst, "last_difference": last, "page": str(out / "loss.html")}))
    return int(max(worst.values()) > options["limit"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
