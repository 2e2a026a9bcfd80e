"""Random programs, whose fused gradients must be those of `vmap(grad)`.

A program is a list of lists of numbers: which options were picked, first for the whole,
then for each layer. `networks.py` says what there is to pick from, `programs.py` runs
one, `minimise.py` makes one that fails smaller, `__main__.py` is `make fuzz`.
"""
