"""A stand-in for Transformer Engine on a CPU: the surface that Megatron-Core 0.16.1 and r1mega touch, and its rules for weights.

Numbers are rounded to E4M3 with one scale a tensor. What matters is kept to the letter: a quantised weight is cached from the first
microbatch of a step on, the first gradient overwrites ``main_grad`` and later ones are added, the gradient returned beside it is
garbage, rows of FP8 products come in sixteens, and every layer has an extra state. No test may take a number of it for the real
one's: tests/model/fp8/engine_cases.py runs on a GPU with that.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0+stand.in"
__all__ = ["common", "pytorch"]
