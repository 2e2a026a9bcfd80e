import io

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.common.plots import METHOD_COLORS, METHOD_LABELS
from experiments.synthetic import figures
from experiments.synthetic.config import METHODS, PRESETS, TrainConfig
from experiments.synthetic.figures import (
    EXTENT,
    Trained,
    draw,
    grid_ticks,
    region_probability,
)
from experiments.synthetic.training import METRICS, dataset_for, make_keys, make_trainer


def test_region_probability_rows_go_up_and_columns_right():
    def apply(params, features):
        return (
            params
            * jnp.where(features[..., 0] > 0, 1.0, -1.0)
            * (1 + (features[..., 1] > 0))
        )

    probability = region_probability(apply, 2.0, jnp.zeros((3, 4)), grid=6)
    assert probability.shape == (6, 6)
    expected = 1 / (1 + np.exp(-2.0 * np.array([[-1, 1], [-2, 2]])))
    np.testing.assert_allclose(
        probability, expected.repeat(3, 0).repeat(3, 1), rtol=1e-5
    )


def test_region_probability_samples_the_ticks():
    def apply(params, features):
        return features[..., 0]

    probability = region_probability(apply, None, jnp.zeros((1, 1)), grid=5)
    sampled = np.log(probability / (1 - probability))[0]
    np.testing.assert_allclose(sampled, grid_ticks(5), rtol=1e-4, atol=1e-6)
    assert grid_ticks(5)[[0, -1]].tolist() == [-EXTENT, EXTENT]


def test_region_probability_averages_over_shortcuts():
    def apply(params, features):
        return 100 * features[..., 2]

    shortcuts = jnp.array([[1.0], [1.0], [1.0], [-1.0]])
    probability = region_probability(apply, None, shortcuts, grid=2)
    np.testing.assert_allclose(probability, 0.75, rtol=1e-6)


def test_draw_compiles_once_for_all_methods():
    config = TrainConfig(**{**PRESETS["smoke"], "hidden_units": 11})
    dataset = dataset_for(config, 0)
    params = make_trainer(config).init(make_keys(0)).variables
    history = [{"epoch": 1, **dict.fromkeys(METRICS, 0.5)}]
    compiled = (figures._region_probability, figures._logits)
    before = [function._cache_size() for function in compiled]
    for methods in (["erm"], ["and_mask"], ["erm", "and_mask", "geometric_mean"]):
        draw(config, dataset, dict.fromkeys(methods, Trained(params, history)))
    after = [function._cache_size() for function in compiled]
    assert after == [size + 1 for size in before]


def test_draw_again_samples_a_network_once(monkeypatch):
    config = TrainConfig(**PRESETS["smoke"])
    dataset = dataset_for(config, 0)
    params = make_trainer(config).init(make_keys(0)).variables
    history = [{"epoch": 1, **dict.fromkeys(METRICS, 0.5)}]
    results = {method: Trained(params, history) for method in ("erm", "and_mask")}
    sampled = []

    def sample(*args):
        sampled.append(args)
        return region_probability(*args)

    monkeypatch.setattr(figures, "region_probability", sample)
    for method, trained in results.items():
        draw(config, dataset, {method: trained})
    draw(config, dataset, results)
    assert len(sampled) == 2


@pytest.mark.parametrize("methods", [["erm"], ["erm", "and_mask", "geometric_mean"]])
def test_draw_shows_every_method_with_its_accuracy(methods):
    config = TrainConfig(**PRESETS["smoke"])
    params = make_trainer(config).init(make_keys(0)).variables
    history = [
        {"epoch": epoch, **dict.fromkeys(METRICS, 0.25 * epoch)} for epoch in (1, 2, 3)
    ]
    results = {method: Trained(params, history) for method in methods}
    figure = draw(config, dataset_for(config, 0), results)
    text = [t.get_text() for axes in figure.axes for t in axes.texts]
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(figure.axes) == 2 + len(methods)
    assert len(titles) == len(methods)
    assert text.count("o.o.d. test 75.0%, training 75.0%") == len(methods)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert len(buffer.getvalue()) < 600_000
    buffer.seek(0)
    pixels = imread(buffer)[..., :3]
    # Nothing touches the border, so nothing is cut off.
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 1).all()


def test_every_method_has_a_label_and_a_colour_of_its_own():
    for table in (METHOD_LABELS, METHOD_COLORS):
        assert table.keys() >= set(METHODS)
        assert len(set(table.values())) == len(table)
