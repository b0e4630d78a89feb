"""What Megatron says of FP8: a format and a recipe."""

import enum


class Format(enum.Enum):
    """Of payloads."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Float8BlockScaling:
    """The blockwise recipe."""

    def __init__(self, fp8_format: Format):
        self.fp8_format = fp8_format


class DelayedScaling:
    """Only derived from."""
