"""Behavioural cloning of an expert at CoinRun (paper, section 3.3)."""
