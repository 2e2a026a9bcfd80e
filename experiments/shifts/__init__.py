"""Shifts between environments: what helps, and what does not."""
