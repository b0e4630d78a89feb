"""The code reward: what passes, what fails and how it says so, in sandboxes; and the extraction and comparison without one."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.rl import sandbox
from r1mega.rl.reward import code as code_module
from r1mega.rl.reward.code import CodeReward, extract_code, same_output, same_value
from r1mega.rl.reward.runner import RewardRunner
from r1mega.testing.contracts import check_reward


@pytest.fixture
def confined() -> None:
    """A machine that can confine programs; CI must."""
    reason = sandbox.why_not()
    if reason:
        assert "R1MEGA_CI" not in os.environ, reason
        pytest.skip(f"no sandbox on this machine: {reason}")


def problem(**metadata):
    return SimpleNamespace(id="p", question="?", answer="", source="s", metadata=metadata, solution=None)


def answer(program: str) -> str:
    return f"Thought.</think><answer>\nHere it is:\n```python\n{program}\n```\n</answer>"


SUM = problem(inputs=["1 2\n", "3 4\n", "5 6\n"], outputs=["3\n", "7\n", "11\n"])
ADD = problem(inputs=[[1, 2], [[3], [4]]], outputs=[3, [3, 4]], fn_name="Solution.add")
ROWS = [
    (SUM, "print(sum(map(int, input().split())))", 1.0, ""),
    (SUM, "a, b = open(0).read().split(); print(int(a) + int(b), end='  ')", 1.0, ""),
    (SUM, "a, b = open('/dev/stdin').read().split(); print(int(a) + int(b)); exit()", 1.0, ""),
    (SUM, "print(7)", 0.0, "passed 0 of 3; test 1: wrong"),
    (SUM, "print(3)", 0.0, "passed 1 of 3; test 2: wrong"),
    (SUM, "print(3); 1 / 0", 0.0, "passed 0 of 3; test 1: exit 1, ZeroDivisionError"),
    (SUM, "print(3", 0.0, "passed 0 of 3; test 1: exit 1, SyntaxError"),
    (SUM, "import os; os.abort()", 0.0, "passed 0 of 3; test 1: signal 6"),
    (SUM, "x = [1] * (1 << 40)", 0.0, "passed 0 of 3; test 1: memory"),
    (SUM, "while True: print('x' * 10000)", 0.0, "passed 0 of 3; test 1: output"),
    (SUM, "print(open('/etc/passwd').read())", 0.0, "passed 0 of 3; test 1: exit 1, FileNotFoundError"),
    (ADD, "def add(a, b):\n    print('noise'); return a + b", 1.0, ""),
    (ADD, "class Solution:\n    def add(self, a: List[int], b) -> Optional[int]:\n        return a + b", 1.0, ""),
    (ADD, "def add(a, b): return a - b", 0.0, "passed 0 of 2; test 1: wrong"),
    (ADD, "def sub(a, b): return a - b", 0.0, "passed 0 of 2; test 1: exit 1, KeyError"),
    (ADD, "def add(a, b): return 3", 0.0, "passed 1 of 2; test 2: wrong"),
    (ADD, "import os\nos.write(1, b'3'); os._exit(0)", 0.0, "passed 0 of 2; test 1: wrong"),
    (problem(), "print(3)", 0.0, "no tests: metadata has inputs and outputs of one length, at least one"),
]


def test_values_and_notes(confined: None) -> None:
    """All rows in two reward processes: values, notes, no failure."""
    with RewardRunner({"code": 1.0}, workers=2, rewards={"code": CodeReward(memory_bytes=256 << 20)}) as runner:
        records = runner.score([row[0] for row in ROWS], [answer(row[1]) for row in ROWS])
    for (_, program, value, note), record in zip(ROWS, records, strict=True):
        record = record["code"]
        assert (record.value, record.failure, record.note) == (value, "", note), program


def test_share_and_first_tests(confined: None) -> None:
    only_three = answer("print(3)")
    share = CodeReward(partial=True).build()(SUM, only_three)
    assert share == pytest.approx(1 / 3) and share.note == "passed 1 of 3; test 2: wrong"
    assert CodeReward(most_tests=1).build()(SUM, only_three) == 1.0


def test_time_of_one_test(confined: None) -> None:
    value = CodeReward(test_seconds=0.5).build()(SUM, answer("while True: pass"))
    assert value == 0.0 and value.note == "passed 0 of 3; test 1: time"


def test_total_time(confined: None) -> None:
    slow = answer("import time; time.sleep(0.6); print(3)")
    value = CodeReward(partial=True, total_seconds=1.2).build()(problem(inputs=["x"] * 9, outputs=["3"] * 9), slow)
    assert 0 <= value <= 1 / 9 and value.note.endswith("total time")


def test_packages(confined: None, tmp_path) -> None:
    (tmp_path / "helper.py").write_text("def three():\n    return 3\n")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    program = answer("import helper, sys\nif __name__ == '__main__':\n    print(helper.three(), sys.stdin.read())")
    given = problem(inputs=["x"], outputs=["3 x"])
    assert CodeReward(packages=str(tmp_path)).build()(given, program) == 1.0
    assert CodeReward().build()(given, program).note == "passed 0 of 1; test 1: exit 1, ModuleNotFoundError"


def test_the_weaker_kind_says_the_same() -> None:
    reward = CodeReward(sandbox="process").build()
    for given, program, value, note in (ROWS[0], ROWS[4], ROWS[5], ROWS[11]):
        assert (got := reward(given, answer(program))) == value and got.note == note


def test_a_machine_without_namespaces_is_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr(sandbox.box, "why_not", lambda: "unshare(CLONE_NEWUSER): Operation not permitted")
    with pytest.raises(UserError, match=r"got unshare\(CLONE_NEWUSER\): Operation not permitted; .*sandbox=process"):
        RewardRunner({"code": 1.0})
    CodeReward(sandbox="process").check()


def test_no_sandbox_in_the_middle_is_a_failure(monkeypatch) -> None:
    refused = sandbox.Result("refused", 0, b"", b"", 0.0, "unshare: no")
    monkeypatch.setattr(code_module.Sandbox, "run", lambda *_: refused)
    with pytest.raises(RuntimeError, match="no sandbox: unshare: no"):
        CodeReward().build()(SUM, answer("print(3)"))


def test_contract(confined: None) -> None:
    check_reward(CodeReward())


@pytest.mark.parametrize("response, program", [
    ("no end", None),
    ("t</think> print(1)", None),
    ("t</think><answer>print(1)</answer>", "print(1)"),
    ("```python\nprint(0)\n```</think><answer>```python\nprint(1)\n```</answer>", "print(1)\n"),
    ("t</think><answer>a\n```\nx\n```\nb\n```py\nprint(1)\n```\nc\n```text\nout\n```</answer>", "print(1)\n"),
    ("t</think><answer>\n~~~\nprint(1)\n~~~\n```\nprint(2)\n```</answer>", "print(2)\n"),
    ("t</think><answer>```Python3\r\nprint(1)\r\n```</answer>", "print(1)\r\n"),
])  # fmt: skip
def test_extraction(response, program) -> None:
    assert extract_code(response) == program


def test_comparison_of_outputs() -> None:
    assert same_output("1 2\n3", "1  2 \n3\n\n", 0) and same_output("", "\n", 0)
    assert not same_output("1 2 3", "1 2\n3", 0) and not same_output("1", "2", 1) and not same_output("1", "1 1", 0)
    assert same_output("0.3333333", "0.33333331", 1e-6) and not same_output("0.33", "0.34", 1e-6)
    assert not same_output("3.0", "3", 1e-6) and same_output("3", "3.0", 1e-6) and not same_output("x", "1.5", 1)
    assert not same_output("nan", "1.0", 1e-6)


def test_comparison_of_values() -> None:
    assert same_value([1, {"a": 2.0}], [1, {"a": 2}], 0) and same_value(0.1 + 0.2, 0.3, 1e-9)
    for got, wanted in ((True, 1), (1, True), ("1", 1), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (None, 0), (10**400, 0.5)):
        assert not same_value(got, wanted, 1e-6), (got, wanted)
    assert same_value(None, None, 0) and same_value("x", "x", 0)
