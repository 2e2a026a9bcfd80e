"""Memorisation and label noise on real images (paper, section 3.2)."""
