"""Small models of every kind, and what their gradient statistics must be.

`ZOO` maps a name to a `Model`; calling it with a `numpy.random.Generator` returns
`(params, loss_fn, batch)`, where every leaf of batch is `[env, ...]`. Parameters are
drawn with NumPy: one eager JAX initialiser costs more than the whole test of a model.
"""

# Importing them registers their models.
from tests.zoo import (  # noqa: F401
    attention,
    complex_values,
    control_flow,
    convolution,
    dense,
    derivatives,
    dtypes,
    flax_modules,
    layouts,
    lookup,
    norms,
    recurrent,
    reparametrised,
    sharing,
    unusual,
)
from tests.zoo.blocks import conv
from tests.zoo.compare import (
    QUICK,
    Stacked,
    assert_stats_match,
    compile_quickly,
    fields_by_path,
    poison,
)
from tests.zoo.model import ZOO, Model

__all__ = [
    "QUICK",
    "ZOO",
    "Model",
    "Stacked",
    "assert_stats_match",
    "compile_quickly",
    "conv",
    "fields_by_path",
    "poison",
]
