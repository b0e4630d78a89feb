"""``r1mega bench bench=ops`` from a checkout that is not installed: ``python tools/bench/ops.py device=cuda op=permute rounds=30``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r1mega.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "bench=ops", *sys.argv[1:]]))
