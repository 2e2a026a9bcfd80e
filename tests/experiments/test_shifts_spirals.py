"""The spirals with rotated inputs."""

import jax
import numpy as np
import pytest

from experiments.shifts.config import SPIRALS_PRESETS
from experiments.shifts.spirals import data_for


@pytest.fixture(scope="module")
def drawn():
    settings = SPIRALS_PRESETS["smoke"]
    return [data_for(settings, p, 0) for p in ("spirals", "spirals_rotated")]


def test_data_for_rotates_all_splits_alike(drawn):
    plain, turned = (
        np.concatenate(
            [np.asarray(split.features).reshape(-1, 4) for split in dataset]
        ).astype(float)
        for dataset in drawn
    )
    found = np.linalg.lstsq(plain, turned)[0]
    np.testing.assert_allclose(plain @ found, turned, atol=1e-5)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
    assert not np.allclose(found, np.eye(4), atol=0.1)


def test_data_for_keeps_labels(drawn):
    labels = [[split.labels for split in dataset] for dataset in drawn]
    jax.tree.map(np.testing.assert_array_equal, *labels)
