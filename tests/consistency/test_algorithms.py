"""Invariant learning consistency of algorithms."""

import jax
import jax.numpy as jnp
import numpy as np

from hardvary.consistency import ilc
from tests.test_errors import raises


def test_ilc_is_minus_the_mean_score_over_initialisations():
    seen = []

    def train_fn(key):
        seen.append(jax.random.key_data(key).tolist())
        return jax.random.uniform(key)

    result = ilc(
        train_fn, lambda params, key: params, key=jax.random.key(0), num_inits=7
    )
    scores = np.asarray(result.scores)
    assert len({tuple(key) for key in seen}) == 7
    np.testing.assert_allclose(result.value, -scores.mean())
    np.testing.assert_allclose(
        result.standard_error, scores.std(ddof=1) / np.sqrt(7), rtol=1e-12
    )
    assert not np.allclose(scores, scores[0])


def test_ilc_of_training_and_scoring_uses_different_keys():
    result = ilc(
        lambda key: key,
        lambda params, key: jnp.asarray(
            (jax.random.key_data(params) == jax.random.key_data(key)).all(), "float32"
        ),
        key=jax.random.key(0),
        num_inits=3,
    )
    assert result.value == 0


def test_ilc_of_an_infinite_score_is_minus_infinity():
    result = ilc(
        lambda key: None,
        lambda params, key: jnp.inf,
        key=jax.random.key(0),
        num_inits=2,
    )
    assert result.value == -np.inf


def test_ilc_of_one_initialisation_has_no_standard_error():
    result = ilc(lambda key: None, lambda p, k: 1.0, key=jax.random.key(0), num_inits=1)
    assert result.value == -1
    assert np.isnan(result.standard_error)


def test_wrong_arguments_of_ilc_are_refused():
    key = jax.random.key(0)
    with raises(ValueError, "num_inits must be >= 1, got 0"):
        ilc(lambda key: None, lambda p, k: 1.0, key=key, num_inits=0)
    with raises(TypeError, "ilc: scores must be real floating", "int"):
        ilc(lambda key: None, lambda p, k: 1, key=key)
    with raises(TypeError, "score_fn must return a scalar", "got a tuple"):
        ilc(lambda key: None, lambda p, k: (1.0, 2.0), key=key)
    with raises(TypeError, "a score must be a scalar", "(2,)"):
        ilc(lambda key: None, lambda p, k: jnp.ones(2), key=key)
