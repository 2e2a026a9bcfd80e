"""What differs between the versions of JAX that the library runs on.

Nothing else asks for a version, or for a name that only some of them have.
"""

from typing import Any

import jax
import jax.extend.core as jex

LOWEST_JAX = (0, 7)


def require_jax(version: str) -> None:
    """Raises ImportError for a version of JAX below the supported range.

    Args:
      version: as in `jax.__version__`.
    """
    lowest = ".".join(map(str, LOWEST_JAX))
    release = tuple(int(part) for part in version.split(".")[: len(LOWEST_JAX)])
    if release < LOWEST_JAX:
        raise ImportError(
            f"hardvary needs jax {lowest} or newer, found jax {version}: "
            f'pip install --upgrade "jax>={lowest}"'
        )


require_jax(jax.__version__)

# jax.extend.core has them since jax 0.10; before, jax.core had.
_core: Any = jex if hasattr(jex, "DebugInfo") else jax.core
DebugInfo: Any = _core.DebugInfo
gensym: Any = _core.gensym
get_opaque_trace_state: Any = _core.get_opaque_trace_state
jaxprs_in_params: Any = _core.jaxprs_in_params

# Whether XLA on CPU has the convolutions that were measured: not with jax 0.8.3, where
# one with a window as large as an image is three times slower, and with 0.9.2.
NEW_CPU_CONVOLUTIONS = jax.__version_info__ >= (0, 9, 2)

# Whether XLA on CPU has the library with which sums of what is made for them, and
# products, were measured.
NEW_CPU_LIBRARY = jax.__version_info__ >= (0, 10)

# Whether that library works on one core at convolutions of images: not with jax 0.11.2
# and 0.12.0.
ONE_CORE_CONVOLUTIONS = (0, 10) <= jax.__version_info__ < (0, 11)

# Whether a device's place along an axis of one `jax.shard_map` can be told inside of
# another: before, what was lowered did not pass its verification, or hung there.
NESTED_AXIS_INDEX = jax.__version_info__ >= (0, 10)


def varying_axes(aval: Any) -> frozenset[Any]:
    """Mapped axes of `jax.shard_map` along which values of a type differ."""
    if hasattr(aval, "manual_axis_type"):
        return aval.manual_axis_type.varying
    # Before jax 0.10.
    return aval.vma


def vary(array: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    """`array` as one that may differ along further mapped axes of `jax.shard_map`."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    # Before jax 0.8.
    return jax.lax.pvary(array, axes)  # type: ignore[attr-defined]


def vary_call(what: str, axes: tuple[Any, ...]) -> str:
    """How a user writes what `vary` does."""
    if hasattr(jax.lax, "pcast"):
        return f"jax.lax.pcast({what}, {axes}, to='varying')"
    # Before jax 0.8.
    return f"jax.lax.pvary({what}, {axes})"


# How a user enters a mesh; the other before jax 0.7.1.
SET_MESH = "jax.set_mesh" if hasattr(jax, "set_mesh") else "jax.sharding.use_mesh"


def reshard(array: jax.Array, spec: Any) -> jax.Array:
    """`array` spread over explicit axes of a mesh as `spec` says."""
    if hasattr(jax, "reshard"):
        return jax.reshard(array, spec)
    # Before jax 0.8.
    return jax.sharding.reshard(array, spec)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a `scan` equation's inputs are constants, and how many carries."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # Since jax 0.11.
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)
