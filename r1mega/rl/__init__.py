"""Reinforcement learning with verifiable rewards: types, advantages, losses, rewards, engines, and the loop that orders them."""
