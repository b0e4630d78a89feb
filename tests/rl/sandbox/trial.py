"""The attempts in sandboxes, as a function and as a program for another interpreter; imports nothing but the standard library."""

from __future__ import annotations

import json
import sys

from r1mega.rl.sandbox import PYTHON, Job, Limits, Sandbox
from tests.rl.sandbox.attempts import ATTEMPTS, HARNESS

LIMITS = Limits(wall_seconds=60.0, cpu_seconds=60.0, processes=8)


def attempt(facts: dict, parts: int) -> dict[str, list[str]]:
    """What each row came to: ["held" or "ESCAPED", how]."""
    rows, found = list(ATTEMPTS.items()), {}
    with Sandbox() as sandbox:
        for part in range(parts):
            body = json.dumps([{**facts, "python": PYTHON}, rows[part::parts]]).encode()
            result = sandbox.run(Job((PYTHON, "-s", "main.py"), body, {"main.py": HARNESS.encode()}), LIMITS)
            assert result.end == "ok", result
            for line in result.stdout.splitlines():
                name, *found[name] = json.loads(line)
    return found


if __name__ == "__main__":
    print(json.dumps(attempt(json.loads(sys.argv[1]), 1)))
