"""Settings of the theory experiments, one dataclass for each subcommand."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from experiments.common.cli import Preset
from experiments.common.validation import (
    require,
    require_ascending,
    require_at_least,
    require_choice,
    require_distinct,
    require_kinds,
    require_non_negative,
    require_positive,
    require_positive_share,
    require_seeds,
    require_share,
)

Method = Literal["erm", "and_mask", "geometric_mean"]
METHODS: tuple[Method, ...] = get_args(Method)
Decay = Literal["after", "before"]


@dataclasses.dataclass(frozen=True)
class LandscapesConfig:
    """Figure 1: two environments with a consistent and a patchwork minimum."""

    sharpness: float = 20.0
    """Curvature across a valley of the patchwork, against 1 along it."""
    angle: float = 20.0
    """Degrees from the first axis to A's valley, and from the second to B's."""
    threshold: float = 1.0
    """Agreement needed to pass the mask."""
    learning_rate: float = 0.02
    """Step size of both descents."""
    steps: int = 3000
    """Steps of both descents."""
    starts_per_side: int = 5
    """Starting points on each side of the square grid that they form."""
    epsilon: float = 0.01
    """Rise of the loss up to which a neighbourhood of a minimum reaches."""
    searches: int = 4
    """Searches for the inconsistency of each minimum, from random starts."""
    resolution: int = 200
    """Points on each side of the grid behind the contours."""

    def __post_init__(self) -> None:
        require("sharpness", self.sharpness, 1 < self.sharpness <= 1e4, "in (1, 1e4]")
        require("angle", self.angle, 0 < self.angle < 45, "in (0, 45)")
        require_share(self, "threshold")
        # Beyond twice the inverse of the largest curvature, descent diverges.
        stable = 0 < self.learning_rate * self.sharpness < 2
        rule = f"positive and below 2 / sharpness ({2 / self.sharpness:g})"
        require("learning_rate", self.learning_rate, stable, rule)
        require_positive(self, "epsilon")
        require_at_least(self, 1, "steps", "starts_per_side", "searches")
        require_at_least(self, 2, "resolution")


@dataclasses.dataclass(frozen=True)
class MeansConfig:
    """Figures 3 and 12: two Hessians and their means."""

    first: tuple[float, float] = (0.5, 6.0)
    """Eigenvalues of A's Hessian."""
    second: tuple[float, float] = (4.0, 1.0)
    """Eigenvalues of B's Hessian."""
    angle: float = 50.0
    """Degrees from A's axes to B's where the two cannot be diagonalised together."""
    epsilon: float = 1.0
    """Loss on the ellipses, and rise up to which a neighbourhood reaches."""

    def __post_init__(self) -> None:
        for field in ("first", "second"):
            for value in getattr(self, field):
                require(field, value, 1e-4 <= value <= 1e4, "between 1e-4 and 1e4")
        require("angle", self.angle, 0 < self.angle < 90, "in (0, 90)")
        require_positive(self, "epsilon")


@dataclasses.dataclass(frozen=True)
class NormsConfig:
    """Figure 4: how averaging and the AND-mask shrink gradients that are noise."""

    components: int = 3000
    """Components of the gradient."""
    threshold: float = 0.6
    """Agreement needed to pass the mask; 0.6 asks for 80 % equal signs."""
    num_envs: tuple[int, ...] = tuple(range(10, 301, 10))
    """Numbers of environments, in ascending order."""
    repetitions: int = 100
    """Gradients that are drawn for each number of environments."""
    conditional_draws: int = 20_000
    """Components that are drawn given that they pass, for each number."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "components")
        require_at_least(self, 2, "repetitions")
        require_at_least(self, 2, "conditional_draws")
        require_share(self, "threshold")
        require_ascending(self, "num_envs")
        require_at_least(self, 1, "num_envs")
        require_seeds(self, "seed")


@dataclasses.dataclass(frozen=True)
class StaircaseConfig:
    """Figure 10: two sigmoids that fit a staircase, each in one environment."""

    epsilon: float = 0.01
    """Rise of the loss up to which a neighbourhood reaches."""
    points: int = 101
    """Inputs in each environment, equally spaced."""
    lowest: float = -1.0
    """Lowest value of theta6 along the line."""
    highest: float = 2.0
    """Highest value of theta6 along the line."""
    resolution: int = 301
    """Points along the line."""
    searches: int = 4
    """Searches for the inconsistency of theta*, from random starts."""
    max_distance: float = 1.5
    """Distance from theta* that they keep within; 1.5 takes theta6 to -0.5."""

    def __post_init__(self) -> None:
        require_positive(self, "epsilon")
        require_at_least(self, 2, "points")
        require_at_least(self, 2, "resolution")
        require_at_least(self, 1, "searches")
        require_positive(self, "max_distance")
        finite = math.isfinite(self.lowest) and self.lowest <= -0.5
        require("lowest", self.lowest, finite, "finite and at most -0.5")
        finite = math.isfinite(self.highest) and self.highest >= 1
        require("highest", self.highest, finite, "finite and at least 1")


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Figure 11: pairs of quadratic landscapes, more and more inconsistent."""

    ratios: tuple[float, ...] = (1.0, 2.0, 5.0, 20.0)
    """Curvature of A over that of B, along one axis or, and the reverse, along both."""
    epsilon: float = 1.0
    """Rise of the loss up to which a neighbourhood reaches."""

    def __post_init__(self) -> None:
        require("ratios", self.ratios, len(self.ratios) > 0, "one or more numbers")
        for ratio in self.ratios:
            require("ratios", ratio, 1 <= ratio <= 1e4, "between 1 and 1e4")
        require_positive(self, "epsilon")


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
    """The linear regression: one strong feature per example, one weak one shared."""

    train_envs: Literal[2, 4] = 4
    """Examples to train on, of four; with 2 the loss on the other two is the test."""
    noise: float = 0.0
    """The features that are not shared get uniform noise in [-noise, noise]."""
    fresh_noise: bool = False
    """Draw the noise anew at every step."""
    threshold: float = 1.0
    """Agreement needed to pass the AND-mask and that of the geometric mean."""
    learning_rate: float = 0.3
    """Initial learning rate."""
    learning_rate_decay: float = 0.9995
    """Factor of the learning rate after every step."""
    weight_decay: float = 0.01
    """Strength of the L2 decay, times the learning rate in each step."""
    decay: Decay = "after"
    """Where the decay joins: after the mask, as the paper advises, or before it, in
    the loss of every environment."""
    steps: int = 1000
    """Steps."""
    initial_std: float = 0.01
    """Standard deviation of the initial weights."""
    seeds: tuple[int, int] = (0, 9)
    """First and last seed of initial weights and noise, both included."""

    def __post_init__(self) -> None:
        require_choice("train_envs", self.train_envs, (2, 4))
        require_kinds(self, decay=Decay)
        require_non_negative(self, "noise", "weight_decay", "initial_std")
        if self.fresh_noise and self.noise == 0:
            raise ValueError("fresh_noise needs noise above 0, got noise 0.0")
        require_share(self, "threshold")
        require_positive(self, "learning_rate")
        require_positive_share(self, "learning_rate_decay")
        require_at_least(self, 1, "steps")
        require_seeds(self, "seeds")


@dataclasses.dataclass(frozen=True)
class DescentConfig:
    """Proposition 1: masked gradient descent on a smooth problem."""

    num_envs: int = 8
    """Environments."""
    examples_per_env: int = 30
    """Examples in each environment."""
    dims: int = 50
    """Parameters."""
    shift_std: float = 1.0
    """Deviation of an environment's own solution from the common one; 0 for none."""
    thresholds: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Thresholds of the mask, a descent for each."""
    step_size: float = 1.0
    """Step size in units of 1 / (Lipschitz constant of the gradient)."""
    steps: int = 10_000
    """Steps of each descent."""
    seed: int = 0
    """Seed of the problem."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_envs", "examples_per_env", "dims", "steps")
        require_non_negative(self, "shift_std")
        # The proposition says nothing about longer steps.
        require_positive_share(self, "step_size")
        require_distinct(self, "numbers", "thresholds")
        require_share(self, "thresholds")
        require_seeds(self, "seed")


# The paper gives sizes for figure 4 and the regression alone. They take less than a
# minute on two cores, so `cpu` has them too; `paper` draws more often.
LANDSCAPES_PRESETS: dict[Preset, LandscapesConfig] = {
    "smoke": LandscapesConfig(steps=500, starts_per_side=2, searches=1, resolution=20),
    "cpu": LandscapesConfig(),
    "paper": LandscapesConfig(),
}
MEANS_PRESETS: dict[Preset, MeansConfig] = {
    "smoke": MeansConfig(),
    "cpu": MeansConfig(),
    "paper": MeansConfig(),
}
NORMS_PRESETS: dict[Preset, NormsConfig] = {
    "smoke": NormsConfig(
        components=300,
        num_envs=(10, 20),
        repetitions=20,
        conditional_draws=1000,
    ),
    "cpu": NormsConfig(),
    "paper": NormsConfig(repetitions=1000),
}
STAIRCASE_PRESETS: dict[Preset, StaircaseConfig] = {
    "smoke": StaircaseConfig(points=21, resolution=31, searches=1),
    "cpu": StaircaseConfig(),
    "paper": StaircaseConfig(),
}
PAIRS_PRESETS: dict[Preset, PairsConfig] = {
    "smoke": PairsConfig(ratios=(1.0, 2.0)),
    "cpu": PairsConfig(),
    "paper": PairsConfig(),
}
REGRESSION_PRESETS: dict[Preset, RegressionConfig] = {
    "smoke": RegressionConfig(steps=50, seeds=(0, 1)),
    "cpu": RegressionConfig(),
    "paper": RegressionConfig(),
}
DESCENT_PRESETS: dict[Preset, DescentConfig] = {
    "smoke": DescentConfig(dims=10, thresholds=(0.0, 1.0), steps=50),
    "cpu": DescentConfig(),
    "paper": DescentConfig(),
}
