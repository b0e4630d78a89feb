"""``python -m r1mega``, which is what started ranks run."""

import sys

from r1mega.cli import main

if __name__ == "__main__":
    sys.exit(main())
