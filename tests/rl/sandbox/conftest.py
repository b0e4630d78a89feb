"""What the sandbox's tests share: they are skipped by name on a machine without namespaces, but not in CI."""

from __future__ import annotations

import os

import pytest

from r1mega.rl.sandbox import why_not


@pytest.fixture(scope="session", autouse=True)
def namespaces() -> None:
    """A machine that can confine programs."""
    reason = why_not()
    if reason:
        assert "R1MEGA_CI" not in os.environ, f"CI runs programs in sandboxes; here: {reason}"
        pytest.skip(f"no sandbox on this machine: {reason}")
