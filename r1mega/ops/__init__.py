"""The Python face of ``csrc/``: a file an op: its contract, reference, fake, autograd and cases. Nothing is loaded on import."""
