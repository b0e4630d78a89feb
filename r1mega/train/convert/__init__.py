"""Conversion between published checkpoints (Hugging Face folders of safetensors) and native ones (Megatron's distributed format).

``shards`` and ``native`` read and write the two kinds of files, a tensor at a time; ``fp8`` is DeepSeek's block-scaled format.
"""
