"""The trainer of pretraining and SFT, the optimizer step that RL reuses, checkpoints."""
