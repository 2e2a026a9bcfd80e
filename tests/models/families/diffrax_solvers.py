"""Neural differential equations and implicit layers: Diffrax, Optimistix, Lineax."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import optimistix

from tests.models.families._parts import equinox
from tests.zoo.blocks import inputs


class _Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, size, out=None, *, key):
        self.mlp = eqx.nn.MLP(size, out or size, 8, 1, jnp.tanh, key=key)

    def __call__(self, t, y, args):
        return self.mlp(y)


def _solve(field, y0, adjoint, solver=None, controller=None):
    ts = jnp.linspace(0.0, 1.0, 4)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver or diffrax.Tsit5(),
        t0=ts[0],
        t1=ts[-1],
        dt0=0.2,
        y0=y0,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=controller or diffrax.ConstantStepSize(),
        adjoint=adjoint,
        max_steps=32,
    ).ys


def _ode(rng, adjoint, **settings):
    return equinox(
        rng,
        lambda key: _Field(3, key=key),
        lambda field, y0: _solve(field, y0, adjoint, **settings),
        inputs(rng, 3),
    )


def neural_ode(rng):
    return _ode(rng, diffrax.RecursiveCheckpointAdjoint())


def neural_ode_adaptive(rng):
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-4)
    return _ode(rng, diffrax.RecursiveCheckpointAdjoint(), controller=controller)


def neural_ode_direct(rng):
    return _ode(rng, diffrax.DirectAdjoint())


def neural_ode_backsolve(rng):
    return _ode(rng, diffrax.BacksolveAdjoint())


def neural_ode_stiff(rng):
    return _ode(
        rng,
        diffrax.RecursiveCheckpointAdjoint(),
        solver=diffrax.Kvaerno3(root_finder=diffrax.VeryChord(rtol=1e-6, atol=1e-6)),
    )


class _Cde(eqx.Module):
    initial: eqx.nn.MLP
    field: eqx.nn.MLP
    readout: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.initial = eqx.nn.MLP(3, 4, 8, 1, key=one)
        self.field = eqx.nn.MLP(4, 12, 8, 1, jnp.tanh, jnp.tanh, key=two)
        self.readout = eqx.nn.Linear(4, 2, key=three)

    def __call__(self, xs):
        ts = jnp.linspace(0.0, 1.0, len(xs))
        xs = jnp.concatenate([ts[:, None], xs], axis=1)
        path = diffrax.CubicInterpolation(
            ts, diffrax.backward_hermite_coefficients(ts, xs)
        )
        term = diffrax.ControlTerm(
            lambda t, y, args: self.field(y).reshape(4, 3), path
        ).to_ode()
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Heun(),
            t0=0.0,
            t1=1.0,
            dt0=0.25,
            y0=self.initial(xs[0]),
            max_steps=8,
        )
        return self.readout(solution.ys[-1])


def neural_cde(rng):
    return equinox(rng, _Cde, lambda m, xs: m(xs), inputs(rng, 5, 2))


class _Sde(eqx.Module):
    drift: _Field
    diffusion: _Field

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.drift, self.diffusion = _Field(3, key=one), _Field(3, 6, key=two)

    def __call__(self, y0, key):
        noise = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.1, shape=(2,), key=key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(self.drift),
            diffrax.ControlTerm(
                lambda t, y, args: self.diffusion(t, y, args).reshape(3, 2), noise
            ),
        )
        return diffrax.diffeqsolve(
            terms, diffrax.Euler(), t0=0.0, t1=1.0, dt0=0.25, y0=y0, max_steps=8
        ).ys


def neural_sde(rng):
    y0 = inputs(rng, 3)
    batch = (y0, jax.random.split(jax.random.key(1), len(y0)))
    return equinox(rng, _Sde, lambda m, pair: m(*pair), batch)


class _Equilibrium(eqx.Module):
    cell: eqx.nn.Linear
    inject: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.cell = eqx.nn.Linear(4, 4, key=one)
        self.inject = eqx.nn.Linear(3, 4, key=two)

    def __call__(self, x):
        def step(z, x):
            return jnp.tanh(0.5 * self.cell(z) + self.inject(x))

        solver = optimistix.FixedPointIteration(rtol=1e-6, atol=1e-6)
        return optimistix.fixed_point(step, solver, jnp.zeros(4), args=x).value


def deep_equilibrium(rng):
    return equinox(rng, _Equilibrium, lambda m, x: m(x), inputs(rng, 3))


def bilevel_least_squares(rng):
    def call(field, pair):
        def residual(y, args):
            return field(None, y, None) - args

        solver = optimistix.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
        return optimistix.least_squares(
            residual, solver, pair["x"], args=pair["y"], throw=False
        ).value

    batch = {"x": inputs(rng, 3), "y": 0.1 * inputs(rng, 5)}
    return equinox(rng, lambda key: _Field(3, 5, key=key), call, batch)


def linear_solve_layer(rng):
    def call(field, x):
        matrix = field(None, x, None).reshape(4, 4)
        matrix = matrix @ matrix.T + jnp.eye(4)
        operator = lineax.MatrixLinearOperator(matrix, lineax.positive_semidefinite_tag)
        vector = jnp.ones(4)
        direct = lineax.linear_solve(operator, vector, lineax.Cholesky()).value
        krylov = lineax.linear_solve(operator, vector, lineax.CG(1e-6, 1e-6)).value
        return direct, krylov

    return equinox(rng, lambda key: _Field(3, 16, key=key), call, inputs(rng, 3))
