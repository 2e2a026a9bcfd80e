#!/usr/bin/env bash
# A linear algebra call of jax.numpy on a CPU keeps a processor busy after it has ended.
#
# jax 0.10.2 with scipy 1.17.1, on Linux with two processors. jaxlib takes its LAPACK from
# SciPy, whose wheel brings OpenBLAS with a pool of threads. These wait for more work in a
# loop, for tens of milliseconds, while XLA's own threads go on with whatever follows in the
# program. One Cholesky factor of 256 x 256, which takes half a millisecond, costs as much
# processor time in the sleep behind it as in a hundred such calls, and a program that goes on
# with products of matrices has half of a machine of two cores until then. With
# OPENBLAS_NUM_THREADS=1, which has to be set before SciPy is imported, nothing is left.
#
# Seen: busy for 48 ms after each call; with one thread: 0 ms
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 scipy==1.17.1 numpy==2.4.6
cat > "$folder/busy.py" <<'PYTHON'
import time

import jax
import jax.numpy as jnp

matrix = jnp.eye(256) * 2 + 1 / 256
factor = jax.jit(jnp.linalg.cholesky)
factor(matrix).block_until_ready()
time.sleep(0.5)
busy = 0.0
for _ in range(20):
    factor(matrix).block_until_ready()
    before = time.process_time()
    time.sleep(0.2)
    busy += time.process_time() - before
print(f"{busy / 20 * 1000:.1f}")
PYTHON
run() {
  env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE "$@" JAX_PLATFORMS=cpu \
    taskset --cpu-list 0,1 "$folder/venv/bin/python" "$folder/busy.py"
}
as_installed=$(run)
one_thread=$(run OPENBLAS_NUM_THREADS=1)
echo "busy for $as_installed ms after each call; with one thread: $one_thread ms"
"$folder/venv/bin/python" - "$as_installed" "$one_thread" <<'PYTHON'
import sys

as_installed, one_thread = map(float, sys.argv[1:])
assert one_thread < 1, "one thread is busy, too"
assert as_installed > 3, "nothing is busy after the call any more"
PYTHON
