"""Score the responses of this folder with the code reward, as a rollout does, and compare with what they should get."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from r1mega.data.problems import load_problems
from r1mega.rl.reward.code import CodeReward
from r1mega.rl.reward.runner import RewardRunner

HERE = Path(__file__).resolve().parent


def main() -> int:
    """0 when every response got its value."""
    problems = {problem.id: problem for problem in load_problems(HERE / "problems.jsonl")}
    rows = [json.loads(line) for line in (HERE / "responses.jsonl").open(encoding="utf-8")]
    code = CodeReward(partial=True, test_seconds=2.0, memory_bytes=256 << 20, sandbox=sys.argv[1] if sys.argv[1:] else "namespaces")
    with RewardRunner({"code": 1.0}, workers=2, rewards={"code": code}) as runner:
        records = runner.score([problems[row["id"]] for row in rows], [row["response"] for row in rows])
    bad = 0
    for row, record in zip(rows, records, strict=True):
        got = record["code"]
        fits = abs(got.value - row["value"]) < 1e-3 and got.note == row["note"] and not got.failure
        bad += not fits
        said = got.failure or got.note or "passed"
        print(f"{got.value:5.3f}  {row['id']:12}  {said}" + ("" if fits else f"   (expected {row['value']}: {row['note']})"))
    return min(bad, 1)


if __name__ == "__main__":  # reward processes are started by it
    sys.exit(main())
