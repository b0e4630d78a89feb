"""Named in Megatron's annotations."""


class Sequential:
    """Never made."""


class FusibleOperation:
    """Never made."""
