"""Settings of the synthetic experiment, and the recipe that its presets share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro

from experiments.common.choices import Preset, Sampler
from experiments.common.settings import fields_of
from experiments.common.validation import (
    require,
    require_ascending,
    require_at_least,
    require_decay,
    require_distinct,
    require_each,
    require_kinds,
    require_max_rescale,
    require_non_negative,
    require_positive,
    require_seeds,
    require_share,
)

# A loss of all environments.
Objective = Literal["erm", "irm", "vrex", "group_dro", "dann"]
# These turn the gradients of environments into one: component by component, with a
# threshold or without, and by inner products.
Mask = Literal["and_mask", "geometric_mean", "sand_mask", "soft_and_mask"]
Vote = Literal["grad_drop", "disjoint_mean", "majority_sign", "agr_rand"]
GramianRule = Literal[
    "upgrad",
    "dualproj",
    "mgda",
    "cagrad",
    "nash_mtl",
    "fairgrad",
    "imtl_g",
    "aligned_mtl",
    "config",
    "pcgrad",
    "grad_vac",
    "clip_env_norms",
]
Method = Literal[Objective, Mask, Vote, GramianRule]
METHODS: tuple[Method, ...] = get_args(Method)
OBJECTIVES: tuple[Method, ...] = get_args(Objective)
MASKS: tuple[Method, ...] = get_args(Mask)
GRAMIAN_RULES: tuple[Method, ...] = get_args(GramianRule)
# Those whose searches and runs are kept in docs/results/synthetic/.
SEARCHED_METHODS: tuple[Method, ...] = (
    *OBJECTIVES,
    "and_mask",
    "geometric_mean",
    "sand_mask",
)
# These add a penalty to the mean loss.
PENALIZED: tuple[Method, ...] = ("irm", "vrex")


# What settings are chosen by: other examples of the training environments, other
# environments, or the test set.
Rule = Literal["training", "held_out", "oracle"]
RULES: tuple[Rule, ...] = get_args(Rule)


Optimizer = Literal["adam", "sgd"]
Schedule = Literal["step", "cosine", "constant"]
Oracle = Literal["fused", "scan", "vmap"]
# What the AND-mask acts on.
Placement = Literal["gradients", "moments", "update"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

Value = TypeVar("Value")
# A setting that is no flag of the command.
Hidden = Annotated[Value, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Data, model and training; all that a run depends on besides method and seed."""

    num_envs: int = 16
    """Training environments, each with a shortcut of its own."""
    examples_per_env: int = 1024
    """Training examples in each environment."""
    shortcut_dims: int = 16
    """Input dimensions of the shortcut, beside the two of the spirals."""
    shortcut_std: float = 1.0
    """Standard deviation of the shortcut's components; the spirals' is 1."""
    revolutions: float = 3.0
    """Turns of each spiral from centre to rim."""
    hidden_units: int = 256
    """Width of the MLP's hidden layers."""
    hidden_layers: int = 3
    """Number of the MLP's hidden layers; dann has three."""
    batch_norm: bool = False
    """Normalise before each LeakyReLU, with the statistics of all environments."""
    dropout: float = 0.0
    """Share of hidden units that are left out of a step."""
    epochs: int = 300
    """Passes over the training data."""
    fitted_epochs: int = 0
    """End once the training accuracy has been above 99.5 % for so many epochs in a row;
    0: after all epochs."""
    batch_size: int = 128
    """Examples per step from each environment."""
    optimizer: Optimizer = "adam"
    """adam, or sgd with momentum 0.9."""
    learning_rate: float = 1e-2
    """Initial learning rate."""
    schedule: Schedule = "step"
    """step: a tenth at 1/2 and again at 3/4 (the paper's); cosine, to 0; constant."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.9
    """Adam's decay of the second moment."""
    eps: float = 1e-15
    """Added to Adam's denominator."""
    threshold: float = 1.0
    """Agreement needed to pass a mask: 0 (all pass) to 1 (unanimity)."""
    rescale: bool = False
    """Scale what passes by (components of the layer) / (those that passed)."""
    max_rescale: float | None = None
    """Upper limit of that factor; only with rescale."""
    sharpness: float = 10.0
    """sand_mask: steepness of the mask."""
    penalty_weight: float = 100.0
    """irm and vrex: weight of the penalty against the mean loss."""
    penalty_annealing: int = 4
    """irm and vrex: first epochs, in which that weight is at most 1."""
    reversal_scale: float = 1.0
    """dann: scale of the reversed gradient from the domain discriminator."""
    dro_step_size: float = 0.01
    """group_dro: how fast the weights of environments follow their losses."""
    cagrad_c: float = 0.5
    """cagrad: radius around the mean gradient, relative to its norm; 0 is the mean."""
    fairgrad_alpha: float = 2.0
    """fairgrad: degree of fairness; 1 is nash_mtl."""
    grad_vac_beta: float = 0.01
    """grad_vac: share of a new cosine in the average that is its goal."""
    max_norm: float = 1.0
    """clip_env_norms: length that no gradient of an environment exceeds."""
    l2: float = 1e-7
    """L2 decay added to the aggregated gradient, before the optimizer's moments."""
    l1: float = 0.0
    """L1 decay added to the aggregated gradient, before the optimizer's moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay, added to the optimizer's update."""
    oracle: Oracle = "fused"
    """How gradients are reduced: fused (layer by layer), scan (few environments at a
    time), vmap (stacked)."""
    microbatch_size: int = 1
    """Environments at a time for scan: speed against memory. Sums are rounded
    differently."""
    checkpoint_every: int = 50
    """Epochs between checkpoints: one takes as long as an epoch."""

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            "num_envs",
            "examples_per_env",
            "shortcut_dims",
            "hidden_units",
            "hidden_layers",
            "epochs",
            "batch_size",
            "microbatch_size",
            "checkpoint_every",
        )
        require_positive(
            self,
            "revolutions",
            "learning_rate",
            "sharpness",
            "fairgrad_alpha",
            "max_norm",
        )
        require_non_negative(
            self,
            "shortcut_std",
            "eps",
            "l2",
            "l1",
            "weight_decay",
            "penalty_weight",
            "fitted_epochs",
            "penalty_annealing",
            "reversal_scale",
            "dro_step_size",
            "cagrad_c",
        )
        require_decay(self, "b1", "b2", "dropout")
        require_share(self, "threshold", "grad_vac_beta")
        require_max_rescale(self)
        if self.batch_norm and self.oracle == "scan":
            raise ValueError(
                "batch_norm needs all environments at once: use oracle=fused or vmap, "
                "got scan"
            )
        require_kinds(self, optimizer=Optimizer, schedule=Schedule, oracle=Oracle)
        require(
            "batch_size",
            self.batch_size,
            self.batch_size <= self.examples_per_env,
            f"at most examples_per_env ({self.examples_per_env})",
        )
        require(
            "microbatch_size",
            self.microbatch_size,
            self.num_envs % self.microbatch_size == 0,
            f"a divisor of num_envs ({self.num_envs})",
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; an incomplete last batch is dropped."""
        return self.examples_per_env // self.batch_size


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """One method, one seed."""

    method: Method = "and_mask"
    """erm averages the losses; irm, vrex, group_dro and dann change the objective; the
    others are the library's rules, which aggregate the environments' gradients."""
    placement: Placement = "gradients"
    """What and_mask acts on, and whose signs have to agree: gradients (those, before
    adam's moments), moments (first moments, one for each environment: as many copies of
    the parameters), update (what adam makes of the mean; signs are of gradients)."""
    seed: int = 0
    """Seed of the data, the initial weights and the order of examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, method=Method)
        _require_suited(self, [self.method], [self.threshold])
        require_kinds(self, placement=Placement)
        fine = self.placement == "gradients" or (
            self.method == "and_mask" and self.optimizer == "adam" and not self.rescale
        )
        rule = "gradients for all but and_mask with adam and without rescale"
        require("placement", self.placement, fine, rule)
        fine = self.oracle == "vmap" or self.placement != "moments"
        rule = "vmap for placement=moments, which looks at every gradient"
        require("oracle", self.oracle, fine, rule)
        require_seeds(self, "seed")


@dataclasses.dataclass(frozen=True)
class CompareConfig(Settings):
    """Several methods on the same data, from the same initial weights."""

    methods: tuple[Method, ...] = ("erm", "and_mask")
    """The methods, in the order of the table and the figure."""
    seed: int = 0
    """Seed of the data, the initial weights and the order of examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, methods=Method)
        require_distinct(self, "methods", "methods")
        _require_suited(self, self.methods, [self.threshold])
        require_seeds(self, "seed")

    def train_config(self, method: Method) -> TrainConfig:
        """The config of one method's run."""
        return TrainConfig(**shared_settings(self), method=method, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class RerunConfig(Settings):
    """One method, many seeds."""

    method: Method = "and_mask"
    """The method, as for train."""
    seeds: tuple[int, int] = (0, 49)
    """First and last seed, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, method=Method)
        _require_suited(self, [self.method], [self.threshold])
        require_seeds(self, "seeds")

    def train_configs(self) -> list[TrainConfig]:
        """The config of every seed's run."""
        first, last = self.seeds
        return [
            TrainConfig(**shared_settings(self), method=self.method, seed=seed)
            for seed in range(first, last + 1)
        ]


Space = Literal["paper", "wide", "small", "smoke"]
Stop = Literal["fitted", "held_out", "test", "never"]


@dataclasses.dataclass(frozen=True)
class SearchConfig(Settings):
    """Settings that a search draws, and the ones that stay as they are."""

    # What a trial draws is no flag.
    hidden_units: Hidden[int] = 256
    hidden_layers: Hidden[int] = 3
    batch_norm: Hidden[bool] = False
    dropout: Hidden[float] = 0.0
    fitted_epochs: Hidden[int] = 0
    batch_size: Hidden[int] = 128
    optimizer: Hidden[Optimizer] = "adam"
    learning_rate: Hidden[float] = 1e-2
    b1: Hidden[float] = 0.9
    b2: Hidden[float] = 0.9
    eps: Hidden[float] = 1e-15
    threshold: Hidden[float] = 1.0
    rescale: Hidden[bool] = False
    max_rescale: Hidden[float | None] = None
    sharpness: Hidden[float] = 10.0
    penalty_weight: Hidden[float] = 100.0
    penalty_annealing: Hidden[int] = 4
    reversal_scale: Hidden[float] = 1.0
    dro_step_size: Hidden[float] = 0.01
    cagrad_c: Hidden[float] = 0.5
    fairgrad_alpha: Hidden[float] = 2.0
    grad_vac_beta: Hidden[float] = 0.01
    max_norm: Hidden[float] = 1.0
    l2: Hidden[float] = 0.0
    l1: Hidden[float] = 0.0
    weight_decay: Hidden[float] = 0.0
    # Batch norm, which a trial may draw, does not go with the scan.
    oracle: Hidden[Oracle] = "fused"
    microbatch_size: Hidden[int] = 1
    checkpoint_every: Hidden[int] = 10

    method: Method = "and_mask"
    """The method, as for train."""
    space: Space = "small"
    """Ranges: paper (tables 1 and 2), wide (and those of this project's recipe), small
    (smaller networks), smoke."""
    trials: int = 16
    """Finished trials; those that ended early count."""
    sampler: Sampler = "random"
    """random; or tpe, which looks at what `rule` looks at, at all settings together, or
    univariate_tpe, as searches of the paper's time, at one after the other."""
    stop: Stop = "fitted"
    """A trial ends at a training accuracy above 97 % (fitted), or at that with less
    than 60 % on held_out environments or on the test set, as in the paper; or never
    before its last epoch."""
    patience: int = 25
    """Epochs in a row, after the annealing of a penalty, that this has to last."""
    rule: Rule = "held_out"
    """Metric that tpe looks at: training (other examples of the training
    environments), held_out (other environments), oracle (the test set)."""
    seed: int = 1000
    """Seed of data, initial weights and the order of examples, in all trials."""
    search_seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(
            self,
            method=Method,
            rule=Rule,
            space=Space,
            sampler=Sampler,
            stop=Stop,
        )
        require_at_least(self, 1, "trials", "patience")
        require_seeds(self, "seed", "search_seed")

    @property
    def clean_rules(self) -> tuple[Rule, ...]:
        """The rules whose choice has seen no more than they name.

        What ends trials or guides the sampler decides what there is to choose from.
        """
        seen = {"held_out": 1, "test": 2}.get(self.stop, 0)
        if self.sampler != "random":
            seen = max(seen, RULES.index(self.rule))
        return RULES[seen:]


@dataclasses.dataclass(frozen=True)
class SelectedConfig:
    """Several methods with chosen settings, on seeds that nothing was chosen on."""

    methods: tuple[Method, ...] = SEARCHED_METHODS
    """The methods, in the order of the figure."""
    selected: str | None = "docs/results/synthetic/selected"
    """Directory with METHOD.json, the selected.json of each method's search; None: all
    methods with the preset's settings."""
    rule: Rule = "held_out"
    """Which rule's choice."""
    seeds: tuple[int, int] = (0, 9)
    """First and last seed, both included."""
    many: tuple[Method, ...] = ("irm", "and_mask")
    """Methods with more seeds (the paper's are these two)."""
    many_seeds: tuple[int, int] = (0, 49)
    """First and last seed of those."""
    reruns: tuple[str, ...] = ()
    """Tables of reruns to show beside the methods in figure 6, as LABEL=FILE."""

    def __post_init__(self) -> None:
        require_kinds(self, methods=Method)
        require_distinct(self, "methods", "methods")
        require_kinds(self, many=Method, rule=Rule)
        for rerun in self.reruns:
            label, _, file = rerun.partition("=")
            require("reruns", rerun, bool(label and file), "given as LABEL=FILE")
        require_seeds(self, "seeds", "many_seeds")

    def seeds_of(self, method: Method) -> range:
        """The seeds of a method."""
        first, last = self.many_seeds if method in self.many else self.seeds
        return range(first, last + 1)


@dataclasses.dataclass(frozen=True)
class EnvsConfig(Settings):
    """Methods against the number of training environments, at equal cost."""

    # These follow from the number of environments and the settings below.
    num_envs: Hidden[int] = 16
    batch_size: Hidden[int] = 128
    epochs: Hidden[int] = 300
    fitted_epochs: Hidden[int] = 0
    threshold: Hidden[float] = 1.0

    methods: tuple[Method, ...] = ("erm", "and_mask")
    """The methods."""
    envs: tuple[int, ...] = tuple(2**k for k in range(1, 11))
    """Numbers of training environments."""
    thresholds: tuple[float, ...] = (1.0, 0.8)
    """Thresholds that masks are trained with; the best on held-out environments
    counts."""
    steps: int = 2560
    """Optimizer steps of every run, rounded up to whole epochs."""
    examples_per_step: int = 2048
    """Examples in a step, as many of each environment; all if there are fewer."""
    seeds: tuple[int, int] = (0, 4)
    """First and last seed, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, methods=Method)
        require_distinct(self, "methods", "methods")
        require_distinct(self, "numbers", "envs")
        most = min(self.examples_per_step, 2**20)
        rule = f"between 1 and {most}"
        require_each(self, ["envs"], lambda value: 1 <= value <= most, rule)
        require_share(self, "thresholds")
        _require_suited(self, self.methods, self.thresholds)
        some = len(self.thresholds) > 0
        require("thresholds", self.thresholds, some, "at least one")
        require_at_least(self, 1, "steps")
        require_seeds(self, "seeds")

    def train_configs(self) -> list[TrainConfig]:
        """The config of every run, the cheap ones first."""
        first, last = self.seeds
        return [
            self._train_config(method, num_envs, threshold, seed)
            for num_envs in self.envs
            for seed in range(first, last + 1)
            for method in self.methods
            for threshold in self._thresholds(method)
        ]

    def _thresholds(self, method: Method) -> tuple[float, ...]:
        if method in MASKS:
            return self.thresholds
        return (self.threshold,)

    def _train_config(
        self, method: Method, num_envs: int, threshold: float, seed: int
    ) -> TrainConfig:
        settings = shared_settings(self)
        batch_size = min(self.examples_per_step // num_envs, self.examples_per_env)
        epochs = math.ceil(self.steps / (self.examples_per_env // batch_size))
        settings |= {
            "num_envs": num_envs,
            "batch_size": batch_size,
            "epochs": epochs,
            "threshold": threshold,
            # Few environments make for many short epochs.
            "checkpoint_every": max(self.checkpoint_every, epochs // 30),
        }
        return TrainConfig(**settings, method=method, seed=seed)


@dataclasses.dataclass(frozen=True)
class PlacementConfig(Settings):
    """The AND-mask on gradients, on moments, on updates, with each of some settings."""

    # One way for all, so that sums are rounded alike; Adam without rescaling is what
    # there are placements for.
    oracle: Hidden[Oracle] = "vmap"
    optimizer: Hidden[Optimizer] = "adam"
    rescale: Hidden[bool] = False
    max_rescale: Hidden[float | None] = None
    # Placements are compared after equally many epochs.
    fitted_epochs: Hidden[int] = 0
    # These are drawn from the settings below.
    threshold: Hidden[float] = 1.0
    weight_decay: Hidden[float] = 0.0

    placements: tuple[Placement, ...] = PLACEMENTS
    """What the mask acts on, as for train."""
    thresholds: tuple[float, ...] = (1.0, 0.8)
    """Thresholds of the mask."""
    weight_decays: tuple[float, ...] = (0.0, 0.3)
    """Decoupled weight decays, past the mask at every placement."""
    seeds: tuple[int, int] = (0, 2)
    """First and last seed, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, placements=Placement)
        require_distinct(self, "placements", "placements")
        require_distinct(self, "numbers", "thresholds", "weight_decays")
        require_share(self, "thresholds")
        require_non_negative(self, "weight_decays")
        require_seeds(self, "seeds")

    def train_configs(self) -> list[TrainConfig]:
        """The config of every run."""
        first, last = self.seeds
        shared = shared_settings(self)
        return [
            TrainConfig(
                **{**shared, "threshold": threshold, "weight_decay": decay},
                placement=placement,
                seed=seed,
            )
            for placement in self.placements
            for threshold in self.thresholds
            for decay in self.weight_decays
            for seed in range(first, last + 1)
        ]


@dataclasses.dataclass(frozen=True)
class CorrelationsConfig(Settings):
    """Gradients at random initial weights, and what masks leave of them."""

    revolutions: float = 1.0
    """Turns of each spiral: an untrained network hardly sees more of them."""
    logit_scale: float = 0.01
    """Factor of the logits; 1 leaves the network as initialised."""
    seeds: tuple[int, int] = (0, 9)
    """First and last seed of network and data, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "logit_scale")
        require_seeds(self, "seeds")


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig(Settings):
    """The consistency of what several methods converge to, from several seeds."""

    methods: tuple[Method, ...] = ("erm", "and_mask")
    """The methods."""
    seeds: tuple[int, int] = (0, 2)
    """First and last seed of data and initial weights, both included."""
    epsilon: float = 0.01
    """Change of an environment's loss up to which its neighbourhood reaches."""
    distances: tuple[float, ...] = (0.03, 0.1, 0.3)
    """How far a search may go, relative to the norm of what it varies."""
    num_pairs: int = 4
    """Ordered pairs of environments to search, drawn at random."""
    examples: int = 64
    """Training examples of each environment that the losses are taken over."""
    search_starts: int = 1
    """Random starts of a search for each pair."""
    search_steps: int = 8
    """Steps of a search."""
    search_seed: int = 0
    """Seed of the pairs and the searches."""
    searches_at_once: int = 1
    """Searches side by side: 1 for a CPU, more for an accelerator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, methods=Method)
        require_distinct(self, "methods", "methods")
        _require_suited(self, self.methods, [self.threshold])
        require_seeds(self, "seeds", "search_seed")
        require_positive(self, "epsilon")
        require_ascending(self, "distances")
        require_positive(self, "distances")
        most = self.num_envs * (self.num_envs - 1)
        fine = 1 <= self.num_pairs <= most
        require("num_pairs", self.num_pairs, fine, f"between 1 and {most}")
        fine = 1 <= self.examples <= self.examples_per_env
        rule = f"between 1 and examples_per_env ({self.examples_per_env})"
        require("examples", self.examples, fine, rule)
        require_at_least(self, 1, "search_starts", "search_steps", "searches_at_once")

    def train_configs(self) -> list[TrainConfig]:
        """The config of every network's run."""
        first, last = self.seeds
        return [
            TrainConfig(**shared_settings(self), method=method, seed=seed)
            for seed in range(first, last + 1)
            for method in self.methods
        ]


def _require_suited(
    config: Settings, methods: Sequence[Method], thresholds: Sequence[float]
) -> None:
    if "sand_mask" in methods:
        rule = "below 1 for sand_mask, whose mask is 0 at an agreement of the threshold"
        for threshold in thresholds:
            require("threshold", threshold, threshold < 1, rule)
    for method in methods:
        fine = config.oracle != "scan" or method not in GRAMIAN_RULES
        rule = f"fused or vmap for {method}, which needs inner products of gradients"
        require("oracle", config.oracle, fine, rule)


def shared_settings(config: Settings) -> dict[str, Any]:
    """The fields of `config` that all subcommands have."""
    return fields_of(config, Settings)


# The recipe, the same for every method, is the defaults of `Settings`. Presets change
# the size of the problem and what has to follow from it. So `paper` is the paper's size
# (32 environments of 1280 examples, 32 shortcut dimensions), not its recipe: threshold
# 0.8, batches of 256 and 160 epochs, where the paper has 1, 128 and 93.
PRESETS: dict[Preset, dict[str, Any]] = {
    "smoke": {
        "num_envs": 4,
        "examples_per_env": 64,
        "shortcut_dims": 4,
        "hidden_units": 16,
        "hidden_layers": 2,
        "epochs": 12,
        "batch_size": 32,
        "checkpoint_every": 2,
    },
    "cpu": {},
    "paper": {
        "num_envs": 32,
        "examples_per_env": 1280,
        "shortcut_dims": 32,
        "epochs": 160,
        "batch_size": 256,
        "threshold": 0.8,
    },
}

# A search on two cores: half the examples (so half the steps in each of twice the
# epochs) and smaller networks.
SEARCH_PRESETS: dict[Preset, SearchConfig] = {
    "smoke": SearchConfig(**PRESETS["smoke"], space="smoke", trials=3),
    "cpu": SearchConfig(examples_per_env=512, epochs=600),
    "paper": SearchConfig(
        **{**PRESETS["paper"], "epochs": 3000 // 32},
        space="paper",
        trials=100,
        stop="test",
        patience=1,
    ),
}
SELECTED_PRESETS: dict[Preset, SelectedConfig] = {
    "smoke": SelectedConfig(selected=None, seeds=(0, 1), many=()),
    "cpu": SelectedConfig(),
    "paper": SelectedConfig(),
}
CORRELATIONS_PRESETS: dict[Preset, CorrelationsConfig] = {
    "smoke": CorrelationsConfig(**PRESETS["smoke"]),
    "cpu": CorrelationsConfig(),
    # 16 environments and batches of 1024, unlike the paper's training.
    "paper": CorrelationsConfig(shortcut_dims=32),
}
CONSISTENCY_PRESETS: dict[Preset, ConsistencyConfig] = {
    "smoke": ConsistencyConfig(
        **PRESETS["smoke"],
        seeds=(0, 1),
        distances=(0.03, 0.3),
        num_pairs=2,
        examples=16,
        search_steps=2,
    ),
    "cpu": ConsistencyConfig(),
    "paper": ConsistencyConfig(**PRESETS["paper"], seeds=(0, 4), num_pairs=16),
}
PLACEMENT_PRESETS: dict[Preset, PlacementConfig] = {
    "smoke": PlacementConfig(
        **PRESETS["smoke"], thresholds=(0.5,), weight_decays=(0.0,), seeds=(0, 1)
    ),
    "cpu": PlacementConfig(),
    "paper": PlacementConfig(**PRESETS["paper"]),
}
ENVS_PRESETS: dict[Preset, EnvsConfig] = {
    "smoke": EnvsConfig(
        **PRESETS["smoke"],
        envs=(2, 4),
        steps=8,
        examples_per_step=64,
        seeds=(0, 1),
    ),
    "cpu": EnvsConfig(),
    "paper": EnvsConfig(
        **PRESETS["paper"],
        envs=tuple(2**k for k in range(1, 13)),
        steps=1280,
        examples_per_step=8192,
        thresholds=(1.0, 0.8, 0.6, 0.4, 0.2),
    ),
}
