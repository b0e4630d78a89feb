"""``r1mega bench bench=ops`` without installing: ``python tools/bench/ops.py device=cuda op=permute ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r1mega.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "bench=ops", *sys.argv[1:]]))
