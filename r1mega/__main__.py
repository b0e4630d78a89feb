"""``python -m r1mega``: the command line, and the program of every rank."""

import os
import sys

from r1mega.cli import main
from r1mega.launch.local import NOTES_VARIABLE, rank_ended, tie_to_launcher

if __name__ == "__main__":
    notes = os.environ.pop(NOTES_VARIABLE, None)
    if notes is not None:
        tie_to_launcher()
    status = main()
    if "RANK" in os.environ:  # threads of a process group whose peers have gone can turn a good end into an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(rank_ended(status, notes))
    sys.exit(status)
