"""Whether this machine can confine programs."""

from __future__ import annotations

import os

import pytest

from r1mega.rl import sandbox


@pytest.fixture(scope="session")
def may_confine() -> bool:
    """CI's machine must."""
    reason = sandbox.why_not()
    assert not reason or "R1MEGA_CI" not in os.environ, reason
    return not reason
