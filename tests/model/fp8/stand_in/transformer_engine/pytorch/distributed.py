"""Named in Megatron's imports; nothing is recomputed."""

activation_recompute_forward = None


class CudaRNGStatesTracker:
    """Only derived from."""
