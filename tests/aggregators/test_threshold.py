"""The comparison with the threshold is exact where they tie.

`jnp.mean(jnp.sign(g)) >= k / d` loses hundreds of these ties to rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardvary
from tests._inputs import aggregate

pytestmark = pytest.mark.optimized

MAX_ENVS = 256


def votes(num_envs, num_components=None):
    """Gradients `[num_envs, num_components]` of which component k has k votes net.

    The others vote in pairs against each other; where one is left, it abstains.
    """
    components = num_envs + 1 if num_components is None else num_components
    grads = np.zeros((num_envs, components), np.float32)
    for k in range(min(num_envs + 1, components)):
        grads[:k, k] = 1.0
        pairs = (num_envs - k) // 2
        grads[k : k + pairs, k] = 1.0
        grads[k + pairs : k + 2 * pairs, k] = -1.0
    return grads


def stats_of(sign_sum, num_envs):
    """GradStats whose update is the mask itself."""
    return hardvary.GradStats(
        mean=jnp.ones_like(sign_sum), sign_sum=sign_sum, num_envs=num_envs
    )


def test_and_mask_eager_float_threshold_keeps_exactly_the_tie():
    lost = []
    for d in range(1, MAX_ENVS + 1):
        num_envs = jnp.float32(d)
        for k in {1, d // 3, d // 2, d - 1, d} - {0}:
            stats = stats_of(np.array([k, k - 1, -k], np.float32), num_envs)
            mask = hardvary.and_mask(k / d).update(stats, None)[0]
            if np.asarray(mask).tolist() != [1, 0, 1]:
                lost.append((d, k))
    assert lost == []


@pytest.mark.parametrize(
    ("dtype", "jit"),
    [("float32", False), ("float32", True), ("bfloat16", True), ("float16", True)],
    ids=lambda value: {False: "eager", True: "jit"}.get(value, value),
)
def test_and_mask_threshold_of_a_dtype_keeps_exactly_the_tie(dtype, jit):
    # A rounded threshold is a tie's as long as it rounds by less than half a vote:
    # for every d in float16, up to 128 in bfloat16.
    largest = 128 if dtype == "bfloat16" else MAX_ENVS

    @jax.vmap
    def masks(num_envs, threshold):
        sign_sum = jnp.arange(MAX_ENVS + 1, dtype=jnp.float32)
        stats = stats_of(sign_sum, num_envs)
        return hardvary.and_mask(threshold).update(stats, None)[0]

    # Without jit one operation after the other, of all d and k together.
    masks = jax.jit(masks) if jit else masks
    d, k = np.array([(d, k) for d in range(1, largest + 1) for k in range(d + 1)]).T
    actual = masks(jnp.asarray(d, jnp.float32), jnp.asarray(k / d, dtype))
    expected = np.arange(MAX_ENVS + 1) >= k[:, None]
    wrong = np.argwhere(np.asarray(actual, bool) != expected)
    assert [(d[i], k[i], component) for i, component in wrong[:10]] == []


def test_hard_masks_jit_stacked_traced_threshold_keep_exactly_the_tie():
    # Absent environments instead of shapes: one compilation for every d.
    @jax.jit
    def masks(grads, present, thresholds):
        def apply(make, threshold):
            return make(threshold).update(grads, None, env_weights=present)[0] != 0

        # Votes that cancel leave a mean of zero, which the XOR-mask cannot show.
        return jax.vmap(
            lambda threshold: (
                apply(hardvary.and_mask, threshold),
                apply(hardvary.xor_mask, threshold),
            )
        )(thresholds)

    levels = np.arange(MAX_ENVS + 1)
    for d in range(1, MAX_ENVS + 1):
        grads = np.zeros((MAX_ENVS, MAX_ENVS + 1), np.float32)
        grads[:d] = votes(d, MAX_ENVS + 1)
        present = (np.arange(MAX_ENVS) < d).astype(np.float32)
        thresholds = (levels.clip(max=d) / d).astype(np.float32)
        kept, rest = (np.asarray(m)[: d + 1] for m in masks(grads, present, thresholds))
        k = np.arange(d + 1)[:, None]
        voting = (levels > 0) & (levels <= d)
        np.testing.assert_array_equal(kept, voting & (levels >= k))
        np.testing.assert_array_equal(rest, voting & (levels < k))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("d", [1, 2, 5, 10, 25, 41, 47, 55, 256])
def test_and_mask_stacked_float_threshold_keeps_exactly_the_tie(d, jit):
    # Ties that a float mean is known to lose are among these d.
    grads = votes(d)
    levels = sorted({0, 1, 2, d // 5, d // 3, d // 2, d - 1, d} & set(range(d + 1)))

    def kept_fractions(grads):
        return [aggregate(hardvary.and_mask(k / d), grads)[1] for k in levels]

    actual = (jax.jit(kept_fractions) if jit else kept_fractions)(grads)
    # Components k to d of 0 to d pass.
    expected = [(d + 1 - k) / (d + 1) for k in levels]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("make", [int, np.int32, jnp.int32], ids=lambda t: t.__name__)
def test_and_mask_integer_threshold_is_the_mean_or_unanimity(make):
    grads = votes(4)
    everything, kept_all = aggregate(hardvary.and_mask(make(0)), grads)
    unanimous, kept_one = aggregate(hardvary.and_mask(make(1)), grads)
    np.testing.assert_array_equal(everything, grads.mean(0))
    np.testing.assert_array_equal(unanimous, [0, 0, 0, 0, 1])
    assert float(kept_all) == 1
    np.testing.assert_allclose(kept_one, 1 / 5)


@pytest.mark.parametrize("weight", [0.1, 1e7, 3e9])
@pytest.mark.parametrize("d", [3, 5, 7, 25, 39, 100])
def test_hard_masks_of_weighted_votes_keep_exactly_the_tie(d, weight):
    # Weights that are no integers sum to something rounded; large ones may be numbers
    # of examples, for which a slack in absolute votes would lose ties.
    weights = np.full(d, weight, np.float32)
    grads = votes(d)
    for k in range(1, d + 1):
        _, kept = aggregate(hardvary.and_mask(k / d), grads, env_weights=weights)
        np.testing.assert_allclose(kept, (d + 1 - k) / (d + 1), rtol=1e-6)


@pytest.mark.parametrize("k", range(6))
def test_xor_mask_and_geometric_mean_at_the_tie_follow_the_and_mask(k):
    grads = votes(5)
    _, kept = aggregate(hardvary.and_mask(k / 5), grads)
    _, geometric = aggregate(hardvary.geometric_mean(k / 5), grads)
    _, rest = aggregate(hardvary.xor_mask(k / 5), grads)
    assert float(geometric) == float(kept)
    np.testing.assert_allclose(rest, k / 6, rtol=1e-6)


@pytest.mark.parametrize("k", range(5))
def test_sand_mask_at_the_tie_is_closed_and_just_above_it_open(k):
    # Identical magnitudes: small variance, so that rounding at the tie would show.
    grads = 1e-3 * votes(5)
    tx = hardvary.sand_mask(k / 5, 1.0, rescale=False)
    update, _ = aggregate(tx, grads)
    assert np.all(np.asarray(update[: k + 1]) == 0)
    assert np.all(np.asarray(update[k + 1 :]) > 0)
