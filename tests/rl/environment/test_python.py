"""The Python tool: what is a call, what the policy reads, what stays between calls, and what it may not do."""

from __future__ import annotations

import subprocess
import time
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.data.problems import Problem
from r1mega.rl import sandbox
from r1mega.rl.environment.python import PythonTool, call_of, output_of
from r1mega.rl.sandbox import Result

PROBLEM = Problem("p", "What is 1 + 2?", "3", "here")


@pytest.fixture
def tool(may_confine: bool):
    """``tool(*cells, **knobs)``: what the policy reads of each in one episode."""
    made = []

    def run(*cells: str, **knobs) -> list[str]:
        kind = {} if may_confine else {"sandbox": "process"}
        environment = PythonTool(max_turns=100, **kind, **knobs).build()
        made.append(environment)
        episode = environment.begin(PROBLEM)
        seen = [episode.step(f"Let me see. <tool>{cell}</tool>").observation for cell in cells]
        assert all(text.startswith("<result>") and text.endswith("</result>") for text in seen)
        return [text[len("<result>") : -len("</result>")] for text in seen]

    yield run
    for environment in made:
        environment.close()


def test_what_a_cell_says(tool) -> None:
    said = tool(
        "1 + 2", "print('a')\n'b'", "None", "", "print('x', end='')", "import math\nmath.sqrt(4)", "x = 3", "for i in range(2): i"
    )
    assert said == ["3", "a\n'b'", "", "", "x", "2.0", "", ""]


def test_names_imports_and_files_stay_and_output_is_not_said_again(tool) -> None:
    said = tool(
        "print('once'); x = 5; open('note', 'w').write('kept'); import json",
        "def twice(n): return 2 * n",
        "twice(x)",
        "x += 1; raise ValueError(x)",
        "x, open('note').read(), json.dumps([x])",
        "import os; os.system('echo hidden'); 0",
        "x",
    )
    assert said[2] == "10" and said[3].endswith("ValueError: 6") and said[4] == "(6, 'kept', '[6]')"
    assert said[0] == "once\n4" or said[0] == "once" and said[6] == "6"


def test_errors_name_the_line_and_nothing_of_ours(tool) -> None:
    zero, syntax, deep, ended = tool("x = 1\n1 / 0", "x = (", "def f():\n    return y\nf()", "print(1)\nraise SystemExit('enough')")
    assert zero == 'Traceback (most recent call last):\n  File "<call 1>", line 2, in <module>\nZeroDivisionError: division by zero'
    assert syntax.endswith("SyntaxError: '(' was never closed") and "run.py" not in syntax + deep
    assert 'File "<call 3>", line 2, in f' in deep and deep.endswith("NameError: name 'y' is not defined")
    assert ended == "1\nenough"


def test_limits_are_told_and_leave_the_earlier_cells(tool) -> None:
    began = time.perf_counter()
    said = tool("x = 1", "while True: pass", "import os; os._exit(0)", "os.abort()", "x = [0] * (1 << 40)", "x", call_seconds=0.5)
    assert said[1] in ("stopped: processor time of 0.5 s", "stopped: wall time of 1.5 s") and said[2] == "stopped: exit 0"
    assert said[3].endswith("NameError: name 'os' is not defined") and said[4].endswith("MemoryError") and said[5] == "1"
    assert time.perf_counter() - began < 20
    assert tool("import os; os.abort()") == ["stopped: signal 6"]


def test_long_output_loses_its_middle(tool) -> None:
    (said,) = tool("print('a' * 5000 + 'b' * 5000)", output_chars=25)
    assert said == "a" * 10 + " ... " + "b" * 10
    flood, after = tool("while True: print('x' * 10000)", "1", output_chars=40, call_seconds=1)
    assert len(flood) == 40 and flood.endswith("bytes") and after == "1"
    result = Result("exit", 70, b"\xff" + b"y" * 9, b"", 0.1)
    assert output_of(result, 10) == "\ufffd" + "y" * 9 and all(len(output_of(result, most)) <= most for most in range(1, 12))


def test_it_is_confined(tool, may_confine: bool) -> None:
    if not may_confine:
        pytest.skip("no sandbox on this machine")
    said = tool(
        "open('/etc/passwd').read()", "import socket\nsocket.create_connection(('127.0.0.1', 1))", "import os\nsorted(os.environ)"
    )
    assert said[0].endswith("No such file or directory: '/etc/passwd'") and "Error" in said[1]
    assert "R1MEGA" not in said[2] and "'HOME'" in said[2]


def test_packages(tool, tmp_path) -> None:
    (tmp_path / "helper.py").write_text("three = 3\n")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    assert tool("import helper\nhelper.three", packages=str(tmp_path)) == ["3"]
    assert tool("import helper")[0].endswith("ModuleNotFoundError: No module named 'helper'")


def test_episodes_are_apart_and_nothing_is_left(may_confine: bool) -> None:
    environment = PythonTool(sandbox="namespaces" if may_confine else "process").build()
    one, other = environment.begin(PROBLEM), environment.begin(PROBLEM)
    assert one.step("<tool>x = 1</tool>").observation == "<result></result>"
    assert other.step("<tool>x</tool>").observation.endswith("NameError: name 'x' is not defined</result>")
    pids = [held.process.pid for held in environment._all]
    one.close()
    one.close()
    environment.close()
    environment.close()
    assert len(pids) == 1 and subprocess.run(["ps", "-p", str(pids[0])], capture_output=True).returncode == 1


@pytest.mark.parametrize("turn, code", [
    ("<tool>1</tool>", "1"),
    ("I add. <tool>\n1 +\\\n 2\n</tool>\n ", "1 +\\\n 2"),
    ("<tool>1</tool> and <tool>2</tool>", "2"),
    ("<tool>1</tool> so 1</think><answer>1</answer>", None),
    ("1</tool>", None),
    ("<tool>1", None),
    ("", None),
])  # fmt: skip
def test_what_is_a_call(turn: str, code: str | None) -> None:
    assert call_of(turn, "<tool>", "</tool>") == code


def test_other_marks_an_instruction_and_the_last_turn(may_confine: bool) -> None:
    kind = "namespaces" if may_confine else "process"
    knobs = {"call_open": "```python\n", "call_close": "```", "result_open": "```output\n", "result_close": "\n```"}
    environment = PythonTool(max_turns=2, instruction="You may run Python.", sandbox=kind, **knobs).build()
    episode = environment.begin(PROBLEM)
    assert episode.reset() == "What is 1 + 2?\nYou may run Python."
    assert episode.step("So:\n```python\nprint(1 + 2)\n```").observation == "```output\n3\n```"
    assert episode.step("So:\n```python\nprint(1 + 2)\n```").observation is None, "a call in the last turn is not run"
    environment.close()


def test_a_machine_without_namespaces_is_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr(sandbox.box, "why_not", lambda: "unshare(CLONE_NEWUSER): Operation not permitted")
    with pytest.raises(UserError, match=r"environment.sandbox: .*Operation not permitted; .*environment.sandbox=process"):
        PythonTool().check()
    PythonTool(sandbox="process").check()
    environment = PythonTool().build()
    monkeypatch.setattr(sandbox.Sandbox, "run", lambda *_: Result("refused", 0, b"", b"", 0.0, "unshare: no"))
    with pytest.raises(RuntimeError, match="no sandbox: unshare: no"):
        environment.begin(SimpleNamespace(question="q")).step("<tool>1</tool>")
