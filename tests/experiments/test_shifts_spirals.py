"""The spirals with rotated inputs."""

import jax
import numpy as np
import pytest

from experiments.shifts.config import SPIRALS_PRESETS
from experiments.shifts.spirals import data_for
from tests.experiments.conftest import read_csv, shifts


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


def test_spirals_look_smoke_shows_each_layer_of_both_inputs_twice(tmp_path):
    assert shifts("spirals-look", "--preset", "smoke", "--out", tmp_path / "look") == 0
    rows = read_csv(tmp_path / "look" / "look.csv")
    seen = [(row["problem"], row["epochs"], row["layer"][-1]) for row in rows]
    assert seen == [
        (problem, epochs, layer)
        for problem in ("spirals", "spirals_rotated")
        for epochs in "01"
        for layer in "012"
    ]
