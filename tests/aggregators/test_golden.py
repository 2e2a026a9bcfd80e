"""Agreement with the routine that the paper's authors published.

The file is described in tests/golden/README.md.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary

pytestmark = pytest.mark.optimized

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "and_mask.npz")
NUM_PARAMS = sum(key.startswith("param_") for key in GOLDEN.files)
AGGREGATORS = {"and_mask": hardvary.and_mask, "geom_mean": hardvary.geometric_mean}
THRESHOLDS = ("0.0", "0.2", "0.5", "0.6", "0.8", "1.0")
STATS = ("mean", "sign", "log_abs")


def golden_tree(prefix):
    return [GOLDEN[f"{prefix}_{i}"] for i in range(NUM_PARAMS)]


def loss_fn(params, batch):
    x, y = batch
    layers = list(zip(params[::2], params[1::2], strict=True))
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias[None]
        if i < len(layers) - 1:
            x = jnp.where(x > 0, x, float(GOLDEN["leaky_slope"]) * x)
    logits = x.reshape(y.shape)
    return optax.sigmoid_binary_cross_entropy(logits, y).mean()


@pytest.fixture(scope="module")
def gradients():
    """The same gradients by each route, made once."""
    params = golden_tree("param")
    batch = (GOLDEN["x"], GOLDEN["y"].astype(np.float32))

    def oracle(**settings):
        return jax.jit(hardvary.grad_stats(loss_fn, stats=STATS, **settings))

    return {
        "golden": golden_tree("env_grad"),
        "stacked": jax.jit(hardvary.per_env_grad(loss_fn))(params, batch),
        "vmap": oracle(method="vmap")(params, batch),
        "scan": oracle(method="scan")(params, batch),
        "scan_by_5": oracle(method="scan", microbatch_size=5)(params, batch),
    }


def test_per_env_grad_of_the_golden_network_matches_pytorch(gradients):
    for actual, expected in zip(gradients["stacked"], gradients["golden"], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("route", ["golden", "stacked", "vmap", "scan", "scan_by_5"])
@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("method", AGGREGATORS)
def test_aggregators_on_golden_gradients_match_the_authors(
    gradients, method, threshold, rescale, route
):
    tx = AGGREGATORS[method](float(threshold), rescale=rescale)
    params = golden_tree("param")
    updates, state = tx.update(gradients[route], tx.init(params), params)

    key = f"{method}|{threshold}|{int(rescale)}"
    masks = golden_tree(f"{key}|mask")
    for update, expected, mask in zip(
        updates, golden_tree(f"{key}|grad"), masks, strict=True
    ):
        np.testing.assert_allclose(update, expected, rtol=0, atol=1e-5)
        # No gradient in the file is zero, so a zero update is a closed component.
        np.testing.assert_array_equal(np.asarray(update) != 0, mask)
    kept = sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
    np.testing.assert_allclose(state.kept_fraction, kept, rtol=1e-6)
