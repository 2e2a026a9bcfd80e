"""Every method of the comparison, as one table: what it does with the gradients.

A method is a transformation that turns the environments' gradients into one, and an
optimizer behind it. Methods that change the objective fit in as well: a penalty on each
environment goes into its loss, and one on all losses together weights the gradients.
So one training loop runs all of them; see `experiments.shifts.training`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.shifts.config import MethodName
from hardvary.objectives import fishr_penalty, iga_penalty, vrex_penalty

# adam: a step size for every weight, which brings the basis of the weights back.
# temporal: the same where signs have agreed over time; the number is its threshold.
# layer: one for all weights of a layer.
Optimizer = Literal["adam", "temporal", "layer"]
# From the method's own number and the number of environments.
Make = Callable[[Any, int], optax.GradientTransformationExtraArgs]


class Whitening(NamedTuple):
    """How inputs of layers are whitened; see `hardvary.whiten_inputs`."""

    damping: float
    decay: float
    every: int


class Recipe(NamedTuple):
    """What all methods of a shift have in common.

    `b1`, `b2` and `eps` are Adam's, and `b3` is the temporal form's. `l2` is added
    before its moments: however small, it becomes the whole step of weights whose
    gradient a mask has taken. `weight_decay` is what replaces it behind steps of a
    whole layer, added to them.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    l2: float = 0.0
    weight_decay: float = 0.0
    b3: float = 0.9


class Setting(NamedTuple):
    """What is chosen for a method; both may be traced.

    `number` is the method's own: a threshold, a share, a weight; 0 where it has none.
    """

    learning_rate: Any
    number: Any


# Of parameters and examples [example, ...], their mean.
Loss = Callable[[Any, Any], jax.Array]


class Tie(NamedTuple):
    """A penalty on the gradients of all environments together.

    `penalty` takes a `Loss`, parameters and a batch [env, example, ...]. `last_layer`:
    it looks at the gradients of the last layer alone.
    """

    penalty: Callable[[Loss, Any, Any], jax.Array]
    last_layer: bool = False


class Method(NamedTuple):
    """How to train.

    `make` gives the rule that combines gradients. `whitened`: it sees them as for
    inputs of layers that are white. `optimizer` comes behind it. `numbers` are values
    of its own number, `name_of_number`, to choose from. `penalized`: the number is the
    weight of IRM's penalty in every environment's loss. `tie`: it is the weight of this
    penalty on all of them, and `make` gets the gradient of mean loss and penalty.
    `oracle`: it is trained on data in which nothing spurious tells the label.
    """

    label: str
    make: Make
    optimizer: Optimizer
    whitened: bool = False
    name_of_number: str | None = None
    numbers: tuple[float, ...] = (0.0,)
    penalized: bool = False
    tie: Tie | None = None
    oracle: bool = False


def vrex(weight: Any, num_envs: int) -> optax.GradientTransformationExtraArgs:
    """V-REx: the gradient of the mean loss plus `weight` times the variance of losses.

    Divided by the weight where that is above 1, as its authors do.
    """

    def objective(losses: jax.Array) -> jax.Array:
        total = losses.mean() + weight * vrex_penalty(losses)
        return total / jnp.maximum(weight, 1.0)

    def update(
        grads: Any, state: Any, params: Any = None, *, env_losses: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        return hardvary.combine(grads, jax.grad(objective)(env_losses)), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def group_dro(step_size: Any, num_envs: int) -> optax.GradientTransformationExtraArgs:
    """Group DRO: weights of environments that grow exponentially with their losses.

    Sagawa et al. 2020 (arXiv 1911.08731), algorithm 1. The weights are kept as
    logarithms, of which none gets lost for good.
    """

    def init(params: Any) -> jax.Array:
        return jnp.zeros(num_envs)

    def update(
        grads: Any,
        state: jax.Array,
        params: Any = None,
        *,
        env_losses: jax.Array,
        **_: Any,
    ) -> tuple[Any, jax.Array]:
        state = jax.nn.log_softmax(state + step_size * env_losses)
        return hardvary.combine(grads, jnp.exp(state)), state

    return optax.GradientTransformationExtraArgs(init, update)


def mean(number: Any, num_envs: int) -> optax.GradientTransformationExtraArgs:
    """The mean of the gradients: an AND-mask that everything passes."""
    return hardvary.and_mask(0.0)


def iga(loss: Loss, params: Any, batch: Any) -> jax.Array:
    """IGA's penalty: how far environments differ in their gradients."""
    return iga_penalty(hardvary.grad_stats(loss, stats=_MOMENTS)(params, batch))


def fishr(loss: Loss, params: Any, batch: Any) -> jax.Array:
    """Fishr's penalty: how far they differ in the variances of examples' gradients."""

    def of_one(params: Any, example: Any) -> jax.Array:
        return loss(params, jax.tree.map(lambda leaf: leaf[None], example))

    of_env = hardvary.grad_stats(of_one, stats=_MOMENTS)
    return fishr_penalty(jax.vmap(of_env, (None, 0))(params, batch))


def given(number: Any, num_envs: int) -> optax.GradientTransformationExtraArgs:
    """The gradient as it is, of a method whose objective is one for all."""
    return optax.with_extra_args_support(optax.identity())


def _thresholded(rule: Callable[[Any], Any]) -> Make:
    return lambda number, num_envs: rule(number)


def _plain(rule: Callable[[], Any]) -> Make:
    return lambda number, num_envs: rule()


_MOMENTS: tuple[Literal["mean", "square"], ...] = ("mean", "square")
_and_mask = _thresholded(hardvary.and_mask)
_spectral = _thresholded(hardvary.spectral_and_mask)
_drop = _thresholded(hardvary.drop_disagreement)
_gauss_newton = _thresholded(hardvary.relative_gauss_newton)
_THRESHOLDS = (0.8, 1.0)
_ENERGIES = (0.9, 0.99, 0.999, 0.9999)
_STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1000.0)
_WEIGHTS = (10.0, 30.0, 100.0, 1000.0, 10000.0)

METHODS: dict[MethodName, Method] = {
    "averaging": Method("Averaging", mean, "adam"),
    "averaging_whitened": Method("Averaging, whitened", mean, "layer", True),
    "and_mask": Method(
        "AND-mask",
        _and_mask,
        "adam",
        name_of_number="threshold",
        numbers=_THRESHOLDS,
    ),
    "and_mask_whitened": Method(
        "AND-mask, whitened", _and_mask, "layer", True, "threshold", _THRESHOLDS
    ),
    "soft_and_mask": Method(
        "Soft AND-mask",
        _thresholded(hardvary.soft_and_mask),
        "adam",
        name_of_number="threshold",
        numbers=_THRESHOLDS,
    ),
    "sand_mask": Method(
        "SAND-mask",
        _thresholded(lambda n: hardvary.sand_mask(n, 10.0)),
        "adam",
        name_of_number="threshold",
        numbers=(0.5, 0.8),
    ),
    "geometric_mean": Method(
        "Geometric mean",
        _thresholded(hardvary.geometric_mean),
        "adam",
        name_of_number="threshold",
        numbers=_THRESHOLDS,
    ),
    "spectral_and_mask": Method(
        "Spectral AND-mask",
        _spectral,
        "layer",
        name_of_number="threshold",
        numbers=_THRESHOLDS,
    ),
    "spectral_and_mask_whitened": Method(
        "Spectral AND-mask, whitened",
        _spectral,
        "layer",
        True,
        "threshold",
        _THRESHOLDS,
    ),
    "drop_disagreement": Method(
        "Dropped disagreement",
        _drop,
        "layer",
        name_of_number="energy",
        numbers=_ENERGIES,
    ),
    "drop_disagreement_whitened": Method(
        "Dropped disagreement, whitened", _drop, "layer", True, "energy", _ENERGIES
    ),
    "relative_gauss_newton": Method(
        "Relative Gauss-Newton",
        _gauss_newton,
        "layer",
        name_of_number="strength",
        numbers=_STRENGTHS,
    ),
    "relative_gauss_newton_whitened": Method(
        "Relative Gauss-Newton, whitened",
        _gauss_newton,
        "layer",
        True,
        "strength",
        _STRENGTHS,
    ),
    "upgrad_whitened": Method(
        "UPGrad, whitened", _plain(hardvary.upgrad), "layer", True
    ),
    "mgda_whitened": Method("MGDA, whitened", _plain(hardvary.mgda), "layer", True),
    "pcgrad_whitened": Method(
        "PCGrad, whitened", _plain(lambda: hardvary.pcgrad(0)), "layer", True
    ),
    "cagrad_whitened": Method(
        "CAGrad, whitened",
        _thresholded(hardvary.cagrad),
        "layer",
        True,
        "c",
        (0.5, 0.9),
    ),
    "irm": Method(
        "IRM",
        mean,
        "adam",
        name_of_number="weight",
        numbers=_WEIGHTS,
        penalized=True,
    ),
    "irm_whitened": Method(
        "IRM, whitened", mean, "layer", True, "weight", _WEIGHTS, penalized=True
    ),
    "vrex": Method("V-REx", vrex, "adam", name_of_number="weight", numbers=_WEIGHTS),
    "vrex_whitened": Method("V-REx, whitened", vrex, "layer", True, "weight", _WEIGHTS),
    "group_dro": Method(
        "Group DRO",
        group_dro,
        "adam",
        name_of_number="step size",
        numbers=(0.01, 0.1, 1.0),
    ),
    "temporal_and_mask": Method(
        "Temporal AND-mask",
        mean,
        "temporal",
        name_of_number="threshold",
        numbers=(0.2, 0.4, 0.6),
    ),
    "fishr": Method(
        "Fishr",
        given,
        "adam",
        name_of_number="weight",
        numbers=_WEIGHTS,
        tie=Tie(fishr, last_layer=True),
    ),
    "iga": Method(
        "IGA",
        given,
        "adam",
        name_of_number="weight",
        numbers=_WEIGHTS,
        tie=Tie(iga),
    ),
    "oracle": Method("Oracle", mean, "layer", True, oracle=True),
}


def make_optimizer(
    method: Method,
    setting: Setting,
    num_envs: int,
    schedule: optax.Schedule,
    whitening: Whitening,
    recipe: Recipe,
) -> optax.GradientTransformationExtraArgs:
    """From the gradients of all environments to an update.

    Args:
      method: how to train.
      setting: what was chosen for it, possibly traced.
      num_envs: the number of environments.
      schedule: what the learning rate is multiplied by, as a function of the step.
      whitening: how inputs are whitened, for methods that do.
      recipe: of the shift.

    Returns:
      A transformation whose `update` takes `env_losses` and `baseline_losses`, [env].
    """
    rule = method.make(setting.number, num_envs)
    b1, b2, eps = recipe.b1, recipe.b2, recipe.eps
    if method.optimizer == "layer":
        rule = optax.chain(rule, optax.scale_by_novograd(b1=0.9, b2=0.9))
    else:
        adam = (
            optax.scale_by_adam(b1, b2, eps)
            if method.optimizer == "adam"
            else hardvary.scale_by_temporal_and_mask_adam(
                b1, b2, recipe.b3, setting.number, eps
            )
        )
        rule = optax.chain(rule, optax.add_decayed_weights(recipe.l2), adam)
    if method.whitened:
        # The optimizer inside: the length of a layer's update is then one that no
        # basis of the inputs changes.
        rule = hardvary.whiten_inputs(rule, **whitening._asdict())
    if method.optimizer == "layer":
        rule = optax.chain(rule, optax.add_decayed_weights(recipe.weight_decay))
    return optax.chain(
        rule,
        optax.scale_by_schedule(schedule),
        optax.scale_by_learning_rate(setting.learning_rate),
    )
