"""The experiments of the paper, each one started with `python -m experiments.NAME`."""
