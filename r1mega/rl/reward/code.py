"""The code reward: does a program pass its tests; in: a problem with tests and a response's text, out: 0 to 1. Asks no model.

The program is the last fenced block of the answer, or the answer itself. Tests are of standard input and output or of a function
(:mod:`r1mega.data.code_tests`). Each runs in a sandbox of its own (:mod:`r1mega.rl.sandbox`), which never holds an expected output.
What happened is noted in the record: ``passed 2 of 5; test 3: wrong``; kinds are wrong, time, memory, output, processes, signal,
exit (it ended with an error), and total time (it was not run any more).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from r1mega.config.knob import above, at_least, knob, one_of
from r1mega.data.code_tests import read_tests
from r1mega.registry import register
from r1mega.rl.reward.format import extract_answer
from r1mega.rl.sandbox import PYTHON, Job, Limits, Result, Sandbox, require
from r1mega.rl.types import Noted

FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*([\w+-]*)[ \t]*\r?\n(.*?)^[ \t]*(?:```|~~~)[ \t]*$", re.MULTILINE | re.DOTALL)
CLOCK = 3
"""Seconds of the clock for a second of a processor: a loaded machine decides no test."""
PROGRAM, CALLER = "main.py", "caller.py"
LARGEST_INPUT = 8 << 20
CALL = """
import json, os, runpy, sys, typing

def listed(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if hasattr(value, "__iter__") else str(value)

out = os.dup(1)
os.dup2(2, 1)
name, arguments = json.load(sys.stdin)
known = runpy.run_path("main.py", {each: getattr(typing, each) for each in typing.__all__}, "solution")
function = known.get(name) or getattr(known["Solution"](), name)
text = json.dumps(function(*arguments), default=listed).encode()
while text:
    text = text[os.write(out, text):]
"""
"""Calls the function that standard input names, and writes its result as JSON where the program's prints do not go."""


@register("reward", "code")
@dataclass(frozen=True)
class CodeReward:
    """1 when the program of the answer passes its problem's tests, else 0, or the share that it passes."""

    partial: bool = knob(
        False, "the value is the share of tests passed; else 1 for all and 0 otherwise, ended at the first failure", "bool"
    )
    test_seconds: float = knob(4.0, "processor time of one test; three times as much may pass on the clock", "seconds", **above(0))
    total_seconds: float = knob(30.0, "time of all tests of one response; those not reached are not passed", "seconds", **above(0))
    memory_bytes: int = knob(512 << 20, "memory of one test's processes, together", "bytes", **at_least(32 << 20))
    processes: int = knob(16, "processes and threads of one test", "processes", **at_least(1))
    output_bytes: int = knob(1 << 20, "output of one test", "bytes", **at_least(1))
    most_tests: int = knob(0, "tests run, the first ones; 0: all", "tests", **at_least(0))
    tolerance: float = knob(1e-6, "relative and absolute error of numbers with a fraction", "1", **at_least(0))
    packages: str = knob(
        "", "folder of Python packages that programs may import, read-only; empty: the standard library only", "path"
    )
    sandbox: str = knob(
        "namespaces",
        "namespaces and a filter of system calls, refused at the start where the machine has none; process: limits only, weaker: "
        "a program sees the files and processes of the user",
        "name",
        **one_of("namespaces", "process"),
    )
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def longest_seconds(self) -> float:
        """Longest time of a call."""
        return self.total_seconds + 2.0

    def check(self) -> None:
        """Raises UserError where this machine has no sandbox."""
        if self.sandbox == "namespaces":
            require("reward.options.code.sandbox", "accept limits alone, which are weaker: reward.options.code.sandbox=process")

    def build(self) -> Callable[[Any, str], float]:
        """``(problem, response_text) -> value`` from 0 to 1 with a note; raises RuntimeError where no sandbox starts."""
        return _Code(self)


class _Code:
    def __init__(self, knobs: CodeReward):
        self.knobs = knobs

    def __call__(self, problem: Any, response: str) -> float:
        code = extract_code(response)
        if code is None:
            return Noted(0.0, "no program in the answer")
        try:
            inputs, outputs, name = read_tests(problem.metadata)
        except ValueError as error:
            return Noted(0.0, f"no tests: {error}")
        if self.knobs.most_tests:
            inputs, outputs = inputs[: self.knobs.most_tests], outputs[: self.knobs.most_tests]
        return self.score(code, inputs, outputs, name)

    def score(self, code: str, inputs: list, outputs: list, name: str | None) -> Noted:
        deadline = time.monotonic() + self.knobs.total_seconds
        passed, said = 0, ""
        with Sandbox([self.knobs.packages] if self.knobs.packages else [], self.knobs.sandbox == "namespaces") as sandbox:
            for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True), 1):
                left = deadline - time.monotonic()
                fault = self.fault(sandbox, code, given, wanted, name, left) if left > 0 else "total time"
                passed += not fault
                said = said or (f"test {number}: {fault}" if fault else "")
                if fault and (not self.knobs.partial or fault == "total time"):
                    break
        value = passed / len(inputs) if self.knobs.partial else float(passed == len(inputs))
        return Noted(value, f"passed {passed} of {len(inputs)}; {said}" if said else "")

    def fault(self, sandbox: Sandbox, code: str, given: Any, wanted: Any, name: str | None, left: float) -> str:
        """How one test is not passed; "" where it is."""
        knobs = self.knobs
        stdin = (given if name is None else json.dumps([name, given])).encode("utf-8", "surrogatepass")
        if len(stdin) > LARGEST_INPUT:
            return f"input above {LARGEST_INPUT} bytes"
        files = {PROGRAM: code.encode("utf-8", "surrogatepass")} | ({CALLER: CALL.encode()} if name else {})
        start = CALLER if name else PROGRAM
        argv = [PYTHON, "-s", start]
        if knobs.packages:
            begin = f"import runpy, sys; sys.path.append({knobs.packages!r}); runpy.run_path({start!r}, run_name='__main__')"
            argv = [PYTHON, "-s", "-c", begin]
        wall = CLOCK * knobs.test_seconds
        limits = Limits(
            wall_seconds=min(wall, left),
            cpu_seconds=knobs.test_seconds,
            memory_bytes=knobs.memory_bytes,
            processes=knobs.processes,
            output_bytes=knobs.output_bytes,
        )
        result = sandbox.run(Job(tuple(argv), stdin, files), limits)
        if result.end == "refused":
            raise RuntimeError(f"no sandbox: {result.detail}")
        if result.end == "time" and left < wall and result.detail.startswith("wall"):
            return "total time"
        return ended(result) or ("" if self.agrees(result.stdout, wanted, name) else "wrong")

    def agrees(self, output: bytes, wanted: Any, name: str | None) -> bool:
        """Whether an output is the wanted one."""
        text = output.decode("utf-8", "replace")
        if name is None:
            return same_output(text, wanted, self.knobs.tolerance)
        try:
            got = json.loads(text)
        except (ValueError, RecursionError):
            return False
        # Some sets wrap a result into a list of one.
        return same_value(got, wanted, self.knobs.tolerance) or (
            isinstance(wanted, list) and len(wanted) == 1 and same_value(got, wanted[0], self.knobs.tolerance)
        )


def extract_code(response: str) -> str | None:
    """The program of a response: the last fenced block of its answer, Python's before others, or the whole answer; or None."""
    answer = extract_answer(response)
    if answer is None:
        return None
    blocks = FENCE.findall(answer)
    python = [body for language, body in blocks if language.lower() in ("python", "python3", "py")]
    bodies = python or [body for _, body in blocks]
    return bodies[-1] if bodies else answer


def ended(result: Result) -> str:
    """How a program failed; "" for one that ended well."""
    if result.end == "ok":
        return ""
    if result.end == "exit":
        last = result.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        kind = re.match(r"[A-Za-z_][\w.]*(?=:|$)", last)
        if kind and kind[0] == "MemoryError":
            return "memory"
        return f"exit {result.status}" + (f", {kind[0]}" if kind else "")
    return f"signal {result.status}" if result.end == "signal" else result.end


def same_output(got: str, wanted: str, tolerance: float) -> bool:
    """Whether two outputs are the same but for white space at the ends of lines and of the text, and the error of fractions."""
    got_lines, wanted_lines = ([line.split() for line in text.strip().splitlines()] for text in (got, wanted))
    if len(got_lines) != len(wanted_lines):
        return False
    pairs = list(zip(got_lines, wanted_lines, strict=True))
    if any(len(mine) != len(theirs) for mine, theirs in pairs):
        return False
    return all(_same_word(*words, tolerance) for mine, theirs in pairs for words in zip(mine, theirs, strict=True))


def _same_word(got: str, wanted: str, tolerance: float) -> bool:
    if got == wanted:
        return True
    if not any(mark in wanted for mark in ".eE"):
        return False
    try:
        return _near(float(got), float(wanted), tolerance)
    except ValueError:
        return False


def same_value(got: Any, wanted: Any, tolerance: float) -> bool:
    """Whether two JSON values are the same but for the error of fractions; true is not 1."""
    if isinstance(got, bool) or isinstance(wanted, bool):
        return got is wanted
    if isinstance(got, int | float) and isinstance(wanted, int | float):
        return got == wanted or (isinstance(got, float) or isinstance(wanted, float)) and _near(got, wanted, tolerance)
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(same_value(*pair, tolerance) for pair in zip(got, wanted, strict=True))
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(same_value(got[key], wanted[key], tolerance) for key in got)
    return type(got) is type(wanted) and got == wanted


def _near(got: float, wanted: float, tolerance: float) -> bool:
    try:
        return math.isclose(got, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:
        return False
