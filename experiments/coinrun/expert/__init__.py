"""The expert: its network, PPO, evaluation and file."""
