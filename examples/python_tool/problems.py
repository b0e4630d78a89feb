"""Writes sums that a very small model cannot work out, and how a tool does: FOLDER/{train,test,sft,text}.jsonl."""

import json
import random
import sys
from pathlib import Path

TRAIN, TEST, SHOWN, READ = 400, 60, 400, 6000
draw = random.Random(1)
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
numbers = range(500, 1000)
pairs = draw.sample([(left, right) for left in numbers for right in numbers], TRAIN + TEST + SHOWN + READ)


def problem(left: int, right: int) -> dict:
    return {"question": f"{left} + {right}", "answer": str(left + right)}


def turns(left: int, right: int) -> list[str]:
    """What the model writes, what it reads, what it writes."""
    total = left + right
    return [f"<tool>{left} + {right}</tool>", f"<result>{total}</result>", f"</think><answer>{total}</answer>"]


def write(name: str, records: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


train, test, shown, read = (
    pairs[start:stop]
    for start, stop in ((0, TRAIN), (TRAIN, TRAIN + TEST), (TRAIN + TEST, TRAIN + TEST + SHOWN), (TRAIN + TEST + SHOWN, len(pairs)))
)
write("train", [problem(*pair) for pair in train])
write("test", [problem(*pair) for pair in test])
write("sft", [{**problem(*pair), "turns": turns(*pair)} for pair in shown])
write("text", [{"text": f"{left} + {right} {' '.join(turns(left, right))}"} for left, right in read])
