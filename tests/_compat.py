"""What the tests need of JAX that differs between its versions."""

import jax
from jax import experimental

from hardvary._compat import jaxprs_in_params

# As a context manager; jax 0.7.0 has it by another name.
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh

# jax 0.7 has it in jax.experimental only.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64


def subjaxprs(jaxpr):
    """The jaxprs that equations of a jaxpr hold."""
    return [inner for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)]


def equations_of(jaxpr):
    """All equations, those inside of others too."""
    found = list(jaxpr.eqns)
    for inner in subjaxprs(jaxpr):
        found += equations_of(inner)
    return found
