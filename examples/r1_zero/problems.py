"""Writes countdown problems, and how a search for a solution reads: FOLDER/{text,sft,train,test}.jsonl.

Usage: problems.py FOLDER [DOCUMENTS]: how many searches are written as plain text to pretrain on (40,000).
"""

import itertools
import json
import random
import sys
from pathlib import Path

folder = Path(sys.argv[1])
DOCUMENTS = int(sys.argv[2]) if len(sys.argv) > 2 else 40000
LARGEST, NUMBERS, TEST, SHOWN = 12, 3, 200, 4000
GIVES_UP = {"text": 0.04, "sft": 0.15}
"""Chance that a search ends after a try that failed. What is shown gives up early; reinforcement finds out that it pays not to."""
TARGETS = range(10, 100)
draw = random.Random(1)


def chains(numbers):
    """Ways to work through ``numbers`` from left to right without going below zero: [(order, operators)]. Of 5+8 and 8+5 one."""
    return [
        (order, operators)
        for order in set(itertools.permutations(numbers))
        for operators in itertools.product("+-*", repeat=len(order) - 1)
        if (operators[0] == "-" or order[0] >= order[1]) and all(value >= 0 for *_, value in steps(order, operators))
    ]


def steps(order, operators):
    """(value before, operator, number, value after) of each step."""
    value = order[0]
    for operator, number in zip(operators, order[1:], strict=True):
        after = {"+": value + number, "-": value - number, "*": value * number}[operator]
        yield value, operator, number, after
        value = after


def written(order, operators):
    """The chain as one expression: ((3+8)*2)-7."""
    text = str(order[0])
    for place, (operator, number) in enumerate(zip(operators, order[1:], strict=True)):
        text = f"({text}){operator}{number}" if place else f"{text}{operator}{number}"
    return text


def search(numbers, target, gives_up):
    """(reasoning, answer): tries of chance, each once, until one is right or the search gives up; the last one is the answer."""
    said = []
    for order, operators in draw.sample(known[numbers], len(known[numbers])):
        done = list(steps(order, operators))
        is_right = done[-1][-1] == target
        said.append(" ".join(f"{a}{operator}{b}={c}" for a, operator, b, c in done) + f" {target}? {'yes' if is_right else 'no'}")
        if is_right or draw.random() < gives_up:
            break
    return "\n".join(said), written(order, operators)


def question(numbers, target):
    return f"Use {', '.join(map(str, numbers))} to make {target}."


def write(name, records):
    with open(folder / f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


known = {numbers: chains(numbers) for numbers in itertools.combinations_with_replacement(range(1, LARGEST + 1), NUMBERS)}
problems = sorted(
    (numbers, target)
    for numbers, found in known.items()
    for target in {[*steps(*chain)][-1][-1] for chain in found}
    if target in TARGETS
)
draw.shuffle(problems)
test, train = problems[:TEST], problems[TEST:]
folder.mkdir(parents=True, exist_ok=True)
for name, part in (("test", test), ("train", train)):
    write(name, [{"question": question(*one), "answer": str(one[1]), "source": "countdown"} for one in part])
texts = []
for one in draw.choices(train, k=DOCUMENTS):
    reasoning, answer = search(*one, GIVES_UP["text"])
    texts.append({"text": f"{question(*one)}\n{reasoning}\n{answer}"})
write("text", texts)
shown = []
for one in draw.choices(train, k=SHOWN):
    reasoning, answer = search(*one, GIVES_UP["sft"])
    shown.append({"question": question(*one), "answer": answer, "response": f"{reasoning}</think><answer>{answer}</answer>"})
write("sft", shown)
print(f"{len(train)} problems to train on, {len(test)} held out")
