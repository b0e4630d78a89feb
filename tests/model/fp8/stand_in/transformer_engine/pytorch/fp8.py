"""The context in which layers compute in FP8."""

import contextlib


class FP8GlobalStateManager:
    """Its state is the recipe that is entered."""

    recipe = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """True inside :func:`fp8_autocast`."""
        return cls.recipe is not None


@contextlib.contextmanager
def fp8_autocast(enabled=True, fp8_recipe=None, fp8_group=None):
    """Inside, products are in FP8 by ``fp8_recipe``."""
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before
