"""The student: its network, its training with both Adams, and their comparison."""
