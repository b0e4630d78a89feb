"""Evaluation and conversation, through the engine and the rewards that RL uses."""
