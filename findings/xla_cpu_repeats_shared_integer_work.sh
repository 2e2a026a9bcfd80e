#!/usr/bin/env bash
# What two results share is computed twice, however much it is, as long as no single step is "dear".
#
# jax 0.10.2 on a CPU. XLA fuses an elementwise value into everything that reads it, and whether it
# may do so more than once it decides by the kind of the last operation, not by how many stand
# before it. An exponential is not repeated. Forty population counts, with the additions and shifts
# around them, are: two readers, eighty counts. `jax.lax.optimization_barrier` does not keep them
# apart. A sum over an axis of the counts does: a reduction is dear, and is written down once.
#
# Seen: population counts in the program with 40 in the source, two readers: alone 80, behind a
# barrier 80, with an exponential behind them 40, added up by a reduction 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/repeats.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

COUNTS = 40


def counts(words):
    return [lax.population_count(words ^ np.uint32(i)) for i in range(COUNTS)]


def alone(words):
    total = sum(counts(words))
    return total.astype(jnp.float32)


def behind_a_barrier(words):
    return lax.optimization_barrier(alone(words))


def with_an_exponential(words):
    return jnp.exp(alone(words))


def by_a_reduction(words):
    masks = np.arange(COUNTS, dtype=np.uint32)[:, None, None]
    each = lax.population_count(words ^ masks)
    return lax.reduce(each, np.uint32(0), lax.add, (0,)).astype(jnp.float32)


def counted(make):
    def two_readers(words):
        shared = make(words)
        return shared * 2, jnp.where(shared > 3, words, 0)

    words = jax.ShapeDtypeStruct((512, 512), jnp.uint32)
    return jax.jit(two_readers).lower(words).compile().as_text().count(" popcnt(")


for make in (alone, behind_a_barrier, with_an_exponential, by_a_reduction):
    print(make.__name__, counted(make))
PYTHON
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/repeats.py" | tee /dev/stderr)
test "$seen" = "alone 80
behind_a_barrier 80
with_an_exponential 40
by_a_reduction 1"
