"""The filter of system calls: its numbers are the kernel's, its jumps end, and its rules say what they should."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from r1mega.rl.sandbox import seccomp

HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+)\s+(\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
}
REFUSE, MISSING = seccomp.FAIL | errno.EPERM, seccomp.FAIL | errno.ENOSYS
UNIX, INET, NEW_USER = 1, 2, 0x10000000


def answer(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter says of a call, by running its program."""
    body = seccomp.program(machine)
    code = [struct.unpack_from("<HBBI", body, at) for at in range(0, len(body), 8)]
    arguments = (*arguments, *([0] * (6 - len(arguments))))
    data = struct.pack("<iIQ6Q", number, seccomp.AUDIT[machine] if audit is None else audit, 0, *arguments)
    at = accumulator = 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == seccomp.LOAD:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif operation == seccomp.RETURN:
            return value
        else:
            tests = {
                seccomp.EQUAL: accumulator == value,
                seccomp.GREATER: accumulator > value,
                seccomp.ANY_BIT: accumulator & value,
            }
            at += yes if tests[operation] else no


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_numbers_are_those_of_the_headers(machine: str) -> None:
    path, pattern = HEADERS[machine]
    if not path.is_file():
        pytest.skip(f"no {path}")
    known = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
    column = seccomp.ARCHITECTURES.index(machine)
    tables = {**seccomp.REFUSED, **seccomp.MISSING, **seccomp.CONDITIONS}
    wrong = {name: pair for name, pair in tables.items() if name in known and pair[column] != known[name]}
    assert not wrong and len(set(tables) & set(known)) > 70


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_rules(machine: str) -> None:
    column = seccomp.ARCHITECTURES.index(machine)
    number = {name: pair[column] for name, pair in {**seccomp.REFUSED, **seccomp.CONDITIONS}.items()}
    for name in seccomp.REFUSED:
        if number[name] is not None:
            assert answer(machine, number[name]) == REFUSE, name
    for harmless in {"x86_64": (0, 1, 9, 59, 231), "aarch64": (63, 64, 222, 221, 94)}[machine]:
        assert answer(machine, harmless) == seccomp.ALLOW
    assert answer(machine, number["clone"], 0x1200011) == seccomp.ALLOW
    assert answer(machine, number["clone"], NEW_USER | 17) == REFUSE
    for name in ("socket", "socketpair"):
        assert answer(machine, number[name], UNIX) == seccomp.ALLOW
        assert answer(machine, number[name], INET) == answer(machine, number[name], 0) == REFUSE
        assert answer(machine, number[name], (1 << 32) | INET) == REFUSE
    assert answer(machine, number["prlimit64"], 0) == seccomp.ALLOW and answer(machine, number["prlimit64"], 1) == REFUSE
    assert answer(machine, number["ioctl"], 0, 0x5401) == seccomp.ALLOW
    assert answer(machine, number["ioctl"], 0, seccomp.TIOCSTI) == answer(machine, number["ioctl"], 0, seccomp.TIOCLINUX) == REFUSE
    assert answer(machine, 435) == answer(machine, seccomp.LAST + 1) == MISSING
    assert answer(machine, 0, audit=0x40000003) == seccomp.KILL
    if machine == "x86_64":
        assert answer(machine, seccomp.X32 + 41) == MISSING
