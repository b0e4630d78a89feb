"""Training with FP8 matrix products as DeepSeek-V3 does it (arXiv 2412.19437, section 3.3): 1x128 activations, 128x128 weights."""
