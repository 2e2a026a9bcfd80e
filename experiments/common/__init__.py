"""Shared by all experiments: run directories, the training loop, CLI and plots."""
