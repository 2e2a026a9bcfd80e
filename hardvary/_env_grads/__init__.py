"""Gradients of all environments, in three forms, and what takes any of them.

Mathematically the Jacobian of the vector of losses, a row per environment. Every form
is a tree shaped like the parameters, with at the leaves

- arrays `[env, *param.shape]`, the stacked gradients: the definition (`stacked.py`);
- `EnvGrad`, inside one trace, multiplied out as far as somebody asks (`env_grad.py`);
- `GradStats`, sums over environments as plain arrays (`grad_stats.py`).

`forms.py` reads any of them; `agreement.py` compares signs. The package has an
underscore because `hardvary.env_grads` is a function.
"""
