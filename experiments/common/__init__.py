"""What every experiment shares: run directories, the training loop, CLI and plots."""
