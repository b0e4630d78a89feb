"""``r1mega bench bench=moe`` without installing: ``python tools/bench/moe.py device=cuda precision=bf16 ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r1mega.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "bench=moe", *sys.argv[1:]]))
