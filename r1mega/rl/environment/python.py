"""A Python tool: code that the policy writes runs in a sandbox, and it reads what that printed. Registers ``environment=python``.

A turn that ends in ``<tool>CODE</tool>`` is a call: CODE runs (:mod:`r1mega.rl.sandbox`), and the observation is
``<result>OUTPUT</result>``. A turn that ends in anything else is the last one. OUTPUT is what the cell printed, then the value of
an expression at its end, as in a notebook, then its error; a cell that met a limit says so. Where it is too long its middle is cut
out.

Names, imports and files stay from call to call: each runs in a sandbox of its own after all earlier cells of the episode, whose
output is dropped. So no process waits while the policy writes, and nothing of one episode meets another; but the time limit is that
of all cells together, and clocks and random numbers without a seed give other values again. A cell that met a limit or killed its
process is not run again; one that raised is, up to where it did.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.config.knob import above, at_least, knob, one_of
from r1mega.registry import register
from r1mega.rl.environment.contract import Environment, Step
from r1mega.rl.sandbox import PYTHON, Job, Limits, Result, Sandbox, require

if TYPE_CHECKING:
    from r1mega.data.problems import Problem

CLOCK = 3
"""Seconds of the clock for a second of a processor: a loaded machine decides no call."""
START_SECONDS = 80.0
"""Longest start of a sandbox and of its supervisor, and the end of both."""
CUT = " ... "
ENDED = 70
"""Exit status of a cell that ran to its end or to its error, and whose process is whole: what it did can be done again."""
RUNNER = """
import _ast, os, sys
cells, scope = int(sys.argv[1]), {"__name__": "__main__", "__builtins__": __builtins__}
sys.argv = [""]

def run(number):
    name = f"cell{number}.py"
    with open(name, encoding="utf-8") as file:
        tree = compile(file.read(), f"<call {number}>", "exec", 0x400)
    body = tree.body
    last = [body.pop()] if body and isinstance(body[-1], _ast.Expr) else []
    exec(compile(tree, f"<call {number}>", "exec"), scope)
    if last:
        exec(compile(_ast.Interactive(last), f"<call {number}>", "single"), scope)

kept = [os.dup(1), os.dup(2)]
nowhere = os.open("/dev/null", os.O_WRONLY)
os.dup2(nowhere, 1)
os.dup2(nowhere, 2)
for number in range(1, cells):
    try:
        run(number)
    except BaseException:
        pass
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass
os.dup2(kept[0], 1)
os.dup2(kept[1], 2)
for fd in (*kept, nowhere):
    os.close(fd)
try:
    run(cells)
except BaseException as error:
    inner = error.__traceback__.tb_next.tb_next
    if isinstance(error, SystemExit):
        print(*(error.args[:1] if isinstance(error.code, str) else ()), file=sys.stderr)
    else:
        sys.excepthook(type(error), error.with_traceback(inner), inner)
sys.exit(ENDED)
""".replace("ENDED", str(ENDED))
"""Runs ``cell1.py`` to ``cellN.py`` in one scope; of all but the last nothing is printed. Imports what starts fast."""


@register("environment", "python")
@dataclass(frozen=True)
class PythonTool:
    """The policy may run Python before it answers."""

    max_turns: int = knob(4, "turns of an episode; a call in the last one is not run", "turns", **at_least(2))
    instruction: str = knob("", "added to each question on a line of its own: how the tool is used; empty: nothing", "text")
    call_open: str = knob("<tool>", "what code begins with", "text")
    call_close: str = knob("</tool>", "what code, and with it the turn, ends with", "text")
    result_open: str = knob("<result>", "what output begins with", "text")
    result_close: str = knob("</result>", "what output ends with", "text")
    output_chars: int = knob(1000, "longest output that the policy reads, without its marks", "characters", **at_least(1))
    call_seconds: float = knob(
        4.0, "processor time of one call, earlier cells included; three times as much may pass on the clock", "seconds", **above(0)
    )
    memory_bytes: int = knob(512 << 20, "memory of one call's processes, together", "bytes", **at_least(32 << 20))
    processes: int = knob(16, "processes and threads of one call", "processes", **at_least(1))
    workers: int = knob(8, "calls that run at once on each rank", "calls", **at_least(1))
    packages: str | None = knob(
        None, "folder of Python packages that code may import, read-only; null: the standard library only", "path"
    )
    sandbox: str = knob(
        "namespaces",
        "namespaces and a filter of system calls, refused at the start where the machine has none; process: limits only, weaker: "
        "code sees the files and processes of the user",
        "name",
        **one_of("namespaces", "process"),
    )

    def check(self) -> None:
        """Raises UserError where this machine has no sandbox."""
        if self.sandbox == "namespaces":
            require("environment.sandbox", "accept limits alone, which are weaker: environment.sandbox=process")

    def build(self) -> Environment:
        """The environment."""
        return _Python(self)


class _Python:
    """One sandbox a thread: its supervisor lives as long as the thread that started it."""

    def __init__(self, knobs: PythonTool):
        self.knobs, self.max_turns, self.workers = knobs, knobs.max_turns, knobs.workers
        self.longest_seconds = START_SECONDS + CLOCK * knobs.call_seconds
        self._own, self._all, self._lock = threading.local(), [], threading.Lock()

    def begin(self, problem: Problem) -> _Session:
        return _Session(self, problem.question)

    def run(self, cells: list[str]) -> Result:
        """The last cell after the others. Raises RuntimeError where no sandbox starts."""
        knobs = self.knobs
        if not hasattr(self._own, "sandbox"):
            self._own.sandbox = Sandbox([knobs.packages] if knobs.packages else [], knobs.sandbox == "namespaces")
            with self._lock:
                self._all.append(self._own.sandbox)
        begin = f"import sys; sys.path.append({knobs.packages!r})\n" if knobs.packages else ""
        files = {f"cell{number}.py": cell.encode("utf-8", "surrogatepass") for number, cell in enumerate(cells, 1)}
        files["run.py"] = (begin + RUNNER).encode()
        argv = (PYTHON, "-I", "-S", "run.py", str(len(cells)))
        limits = Limits(
            wall_seconds=CLOCK * knobs.call_seconds,
            cpu_seconds=knobs.call_seconds,
            memory_bytes=knobs.memory_bytes,
            processes=knobs.processes,
            output_bytes=max(1 << 16, 8 * knobs.output_chars),
        )
        result = self._own.sandbox.run(Job(argv, b"", files), limits)
        if result.end == "refused":
            raise RuntimeError(f"no sandbox: {result.detail}")
        return result

    def close(self) -> None:
        with self._lock:
            for sandbox in self._all:
                sandbox.close()
            self._all.clear()


class _Session:
    def __init__(self, home: _Python, question: str):
        self._home, self._question = home, question
        self._cells: list[str] = []
        self._turns = 0

    def reset(self) -> str:
        instruction = self._home.knobs.instruction
        return f"{self._question}\n{instruction}" if instruction else self._question

    def step(self, response: str) -> Step:
        knobs, self._turns = self._home.knobs, self._turns + 1
        code = call_of(response, knobs.call_open, knobs.call_close)
        if code is None or self._turns >= knobs.max_turns:
            return Step()
        result = self._home.run([*self._cells, code])
        if result.end == "exit" and result.status == ENDED:
            self._cells.append(code)
        return Step(f"{knobs.result_open}{output_of(result, knobs.output_chars)}{knobs.result_close}")

    def close(self) -> None:
        self._cells.clear()


def call_of(response: str, begin: str, end: str) -> str | None:
    """The code of a turn that ends in a call, None for any other turn."""
    text = response.rstrip()
    if not text.endswith(end):
        return None
    _, found, code = text.removesuffix(end).rpartition(begin)
    return code.strip("\r\n") if found else None


def output_of(result: Result, most: int) -> str:
    """What the policy reads of a cell, at most ``most`` characters: output, then errors, then the limit that it met."""
    parts = [part.decode("utf-8", "replace").strip() for part in (result.stdout, result.stderr)]
    if result.end in ("ok", "exit", "signal"):
        parts.append("" if result.status == ENDED else f"stopped: {result.end.replace('ok', 'exit')} {result.status}")
    else:
        parts.append(f"stopped: {result.detail}")
    text = "\n".join(filter(None, parts))
    if len(text) <= most:
        return text
    room = max(most - len(CUT), 0)
    return f"{text[: room - room // 2]}{CUT}{text[len(text) - room // 2 :]}"[:most]
