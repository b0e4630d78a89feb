"""``r1mega convert`` against copying the same files with a sync, side by side on the same disk, caches dropped before each.

    python tools/bench/convert.py folder=/scratch gib=8 rounds=2

Makes a checkpoint of DeepSeek-V3's tensor shapes (random weights, few layers, as many experts as the size takes) in FOLDER, which
needs 3 times its size. In each round, in turn: a copy, hf to native, native to hf, each in a process of its own. Prints seconds,
the ratio to the round's copy and the process's largest resident memory, against the largest file; then the verifying pass's time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def sized(gib: float) -> Any:
    """DeepSeek-V3 with two layers and as many experts as ``gib`` GiB of BF16 take."""
    from r1mega.config.compose import preset
    from r1mega.model.names import parts

    few = {"num_layers": 2, "first_k_dense": 1, "num_mtp_layers": 0, "num_groups": 1, "topk_groups": 1, "top_k": 4}
    model = replace(preset("model", "deepseek_v3"), **few, num_experts=8)
    size = sum(2 * math.prod(part.shape) for part in parts(model))
    one = 3 * 2 * model.hidden_size * model.moe_ffn_size
    return replace(model, num_experts=max(8, 8 + int((gib * 2**30 - size) // one)))


def make(folder: Path, model: Any, shard_gib: float) -> None:
    """A published BF16 checkpoint of ``model`` with random numbers, written tensor by tensor."""
    import torch

    from r1mega.model.names import parts
    from r1mega.model.published import published_config
    from r1mega.train.convert.shards import ShardWriter, file_name, write_index

    groups, held = [[]], 0
    for part in parts(model):
        nbytes = 2 * math.prod(part.shape)
        if groups[-1] and held + nbytes > shard_gib * 2**30:
            groups.append([])
            held = 0
        groups[-1].append(part)
        held += nbytes
    folder.mkdir(parents=True)
    noise = (torch.randn(1 << 26) * 0.02).to(torch.bfloat16)
    where, total, owners = {}, 0, {}
    for number, group in enumerate(groups, 1):
        name = file_name(number, len(groups))
        rows = [(part.name, "F32" if part.role == "bias" else "BF16", part.shape) for part in group]
        writer = ShardWriter(folder / name, rows)
        for part in group:
            count = math.prod(part.shape)
            period = min(count, 1 << 24)
            at = owners.setdefault((part.key, part.start), 7_654_321 * (len(owners) + 1) % (1 << 25))  # a copy has its owner's
            value = noise[at : at + period].repeat(-(-count // period))[:count].reshape(part.shape)
            writer.write(part.name, value.float() if part.role == "bias" else value)
            where[part.name], total = name, total + value.nbytes
        writer.close()
    write_index(folder, where, total)
    config = published_config(model, bos_id=0, eos_id=1, pad_id=1, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))


def drop_caches(*folders: Path) -> None:
    """Write everything out and forget it: by the kernel where this user may, else file by file."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(source: Path, target: Path) -> None:
    """Every file, each synced, as a careful administrator would."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 << 20)
            writer.flush()
            os.fsync(writer.fileno())


def convert(*arguments: str) -> tuple[float, int, dict]:
    """Seconds and largest resident bytes of one conversion in a fresh process, without its start, and its result."""
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from r1mega.train.convert.run import convert\n"
        "from r1mega.config.convert import ConvertConfig, ConversionConfig\n"
        "import torch, safetensors, tqdm\n"
        "options = json.loads(sys.argv[1])\n"
        "how = ConversionConfig(verify=options.pop('verify', False), probe_bytes=0)\n"
        "def status(name):\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return 1024 * int(text.split(name + ':')[1].split()[0])\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "base = status('VmRSS')\n"
        "began = time.perf_counter()\n"
        "result = convert(ConvertConfig(**options, convert=how))\n"
        "seconds = time.perf_counter() - began\n"
        "print('RESULT', json.dumps([seconds, status('VmHWM'), base, result]))\n"
    )
    options = dict(argument.split("=", 1) for argument in arguments)
    options = {key: value == "true" if key == "verify" else value for key, value in options.items()}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(options)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak, base, result = json.loads(done.stdout.split("RESULT", 1)[1])
    return seconds, peak - base, result


def main() -> None:
    options = {"folder": ".", "gib": "8", "shard_gib": "4", "rounds": "2"} | dict(
        argument.split("=", 1) for argument in sys.argv[1:]
    )
    place = Path(options["folder"]) / "bench_convert"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    source = place / "hf"
    make(source, sized(float(options["gib"])), float(options["shard_gib"]))
    largest = max(path.stat().st_size for path in source.iterdir())
    total = sum(path.stat().st_size for path in source.iterdir())
    print(f"{total / 2**30:.2f} GiB in {len(list(source.glob('*.safetensors')))} files, the largest {largest / 2**30:.2f} GiB")
    ratios: dict[str, list[float]] = {"hf to native": [], "native to hf": []}
    found: dict = {"bytes": total, "largest_file": largest, "rounds": []}
    for _ in range(int(options["rounds"])):
        for name in ("copy", "native", "back"):
            shutil.rmtree(place / name, ignore_errors=True)
        drop_caches(source)
        began = time.perf_counter()
        copy(source, place / "copy")
        row = {"copy": time.perf_counter() - began}
        shutil.rmtree(place / "copy")
        for name, arguments in (
            ("hf to native", (f"source={source}", f"target={place / 'native'}")),
            ("native to hf", (f"source={place / 'native'}", f"target={place / 'back'}")),
        ):
            drop_caches(source, place / "native")
            seconds, peak, _ = convert(*arguments)
            row[name] = seconds
            row[f"{name}: memory"] = peak
            ratios[name].append(seconds / row["copy"])
            speed, ratio = total / seconds / 2**20, ratios[name][-1]
            print(f"{name}: {seconds:.1f} s, {speed:.0f} MiB/s, {ratio:.2f} x the copy ({row['copy']:.1f} s)", end="; ")
            print(f"memory {peak / 2**30:.2f} GiB, {peak / largest:.2f} x the largest file", flush=True)
        found["rounds"].append(row)
    drop_caches(source, place / "native")
    _, _, result = convert(f"source={source}", f"target={place / 'native'}", "verify=true")
    found["verify_seconds"] = result["verified"]["seconds"]
    found["ratio"] = {name: statistics.median(values) for name, values in ratios.items() if values}
    print(f"verifying pass: {found['verify_seconds']:.1f} s")
    print(json.dumps(found))
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
