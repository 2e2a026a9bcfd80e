"""Physics and statistics: operators, KANs, potentials, state spaces, transport, GPs."""

import dynamax.linear_gaussian_ssm as lgssm
import jax
import jax.numpy as jnp
import jax_md
import jaxopt
import ott
import pdequinox
import tinygp
from jaxkan.models.KAN import KAN
from ott.neural.networks.icnn import ICNN
from ott.tools.sinkhorn_divergence import sinkhorn_divergence

from tests.models.families._parts import KEY, case, equinox, flax_nnx, linen, stir
from tests.zoo.blocks import inputs, normal


def fourier_neural_operator(rng):
    def make(key):
        return pdequinox.arch.ClassicFNO(
            1, 2, 1, hidden_channels=4, num_modes=3, num_blocks=2, key=key
        )

    return equinox(rng, make, lambda m, x: m(x), inputs(rng, 2, 12))


def u_net_of_a_pde(rng):
    def make(key):
        return pdequinox.arch.ClassicUNet(
            2, 2, 1, hidden_channels=4, num_levels=1, key=key
        )

    return equinox(rng, make, lambda m, x: m(x), inputs(rng, 2, 8, 8))


def kolmogorov_arnold(rng):
    module = KAN([3, 4, 2], "base", {"k": 3, "G": 3}, seed=0)
    return flax_nnx(rng, module, lambda m, x: m(x), 0.4 * inputs(rng, 4, 3))


def behler_parrinello_potential(rng):
    displacement, _ = jax_md.space.free()
    energy = jax_md.energy.behler_parrinello(displacement, key=KEY, mlp_sizes=(6,))

    def call(model, positions):
        value, slopes = jax.value_and_grad(model)(positions)
        return value[None], slopes

    return flax_nnx(rng, energy.model, call, 2 * inputs(rng, 5, 3))


def kalman_filter(rng):
    model = lgssm.LinearGaussianSSM(2, 2)
    initial, _ = model.initialize(KEY)

    def covariance(factor):
        return factor @ factor.T + 0.1 * jnp.eye(2)

    params = {
        "dynamics": initial.dynamics.weights,
        "emissions": initial.emissions.weights,
        "noise": jnp.eye(2),
        "emission_noise": jnp.eye(2),
    }

    def predict(params, emissions):
        dynamics = initial.dynamics._replace(
            weights=params["dynamics"], cov=covariance(params["noise"])
        )
        observed = initial.emissions._replace(
            weights=params["emissions"], cov=covariance(params["emission_noise"])
        )
        model_params = initial._replace(dynamics=dynamics, emissions=observed)
        return model.marginal_log_prob(model_params, emissions)[None]

    return case(rng, predict, stir(rng, params), inputs(rng, 6, 2))


def sinkhorn_divergence_of_a_map(rng):
    params = {"w": jnp.eye(2), "b": jnp.zeros(2)}

    def predict(params, pair):
        moved = jnp.tanh(pair[0] @ params["w"] + params["b"])
        return sinkhorn_divergence(
            ott.geometry.pointcloud.PointCloud, x=moved, y=pair[1], epsilon=0.5
        )[0][None]

    return case(rng, predict, stir(rng, params), (inputs(rng, 5, 2), inputs(rng, 4, 2)))


def input_convex_network(rng):
    return linen(rng, ICNN(2, (6, 6), pos_weights=True), inputs(rng, 3, 2))


def gaussian_process(rng):
    params = {"scale": jnp.ones(2), "amplitude": jnp.zeros(()), "noise": jnp.zeros(())}

    def predict(params, pair):
        kernel = jnp.exp(params["amplitude"]) * tinygp.transforms.Linear(
            params["scale"], tinygp.kernels.Matern52()
        )
        process = tinygp.GaussianProcess(kernel, pair[0], diag=jnp.exp(params["noise"]))
        return process.log_probability(pair[1])[None]

    return case(rng, predict, stir(rng, params), (inputs(rng, 5, 2), inputs(rng, 5)))


def quadratic_program_layer(rng):
    params = {"q": normal(rng, 3, 3), "c": normal(rng, 2, 3)}

    def predict(params, x):
        solver = jaxopt.EqualityConstrainedQP()
        quadratic = params["q"] @ params["q"].T + jnp.eye(3)
        equality = jnp.ones((1, 3)), jnp.ones(1)
        solution = solver.run(
            params_obj=(quadratic, x @ params["c"]), params_eq=equality
        )
        return solution.params.primal

    return case(rng, predict, params, inputs(rng, 2))


def ridge_by_lbfgs(rng):
    params = {"w": normal(rng, 3, 3), "strength": jnp.zeros(())}

    def objective(v, features, target, strength):
        penalty = jnp.exp(strength) * jnp.sum(v**2)
        return jnp.mean((features @ v - target) ** 2) + penalty

    def predict(params, pair):
        features = jnp.tanh(pair[0] @ params["w"])
        solver = jaxopt.LBFGS(objective, maxiter=30, tol=1e-6)
        return solver.run(jnp.zeros(3), features, pair[1], params["strength"]).params

    return case(rng, predict, params, (inputs(rng, 5, 3), inputs(rng, 5)))
