"""How fast training with the AND-mask is, beside the same training in PyTorch."""
