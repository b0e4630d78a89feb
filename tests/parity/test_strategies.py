"""The parity kit on strategies from outside the package: it takes the examples as they are, and says what is wrong with wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.testing.parity import Case, ParityError, check
from tests.parity.strategies import DoublesAGradient, DropsAToken

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.mark.slow
def test_the_examples_pass_and_wrong_ones_are_rejected(folder: Path, monkeypatch) -> None:
    for name in ("custom_dispatcher", "custom_pipeline"):
        monkeypatch.syspath_prepend(str(EXAMPLES / name))
    from gpipe import GPipe
    from ring_dispatcher import Ring

    right = [
        Case("ring", {"expert": 2}, dispatcher=Ring(), steps=2),
        Case("gpipe", {"pipeline": 2}, pipeline=GPipe(), steps=2),
    ]
    wrong = [
        Case("drops", {"expert": 2}, dispatcher=DropsAToken(), steps=2),
        Case("doubles", {"expert": 2}, dispatcher=DoublesAGradient(), steps=2),
    ]
    with pytest.raises(ParityError) as caught:
        check([*right, *wrong], 2, keep=folder)
    lines = {line.partition(":")[0]: line for line in str(caught.value).splitlines()}
    assert lines.keys() == {"drops", "doubles"}, "the examples are right"
    assert "loss of step 1" in lines["drops"]
    # the backward pass meets MTP's router first, and behind it nothing is right
    assert "grad_norm of step 1" in lines["doubles"]
    assert "first tensor: gradient of mtp.layers.0.transformer_layer.mlp.router.weight" in lines["doubles"]
