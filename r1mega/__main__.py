"""``python -m r1mega``: the command line, and the program of every rank."""

import os
import sys

from r1mega.cli import main

if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:  # threads of a process group whose peers have gone can turn a good end into an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
