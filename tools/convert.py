"""``r1mega convert`` from a checkout that is not installed: ``python tools/convert.py source=DIR target=DIR [key=value] ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1mega.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
