"""Spirals behind shortcuts: section 3.1 of the paper."""
