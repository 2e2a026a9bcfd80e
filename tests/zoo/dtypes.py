"""Parameters and computations in half precision."""

import jax
import jax.numpy as jnp

from tests.zoo.blocks import cast, conv, mlp, mlp_params, mse, pairs, regression, weight
from tests.zoo.model import model


# bfloat16 has 8 bits, and XLA keeps more of them where it fuses: two routes to the same
# gradient differ by a percent, and the signs of small components say nothing.
@model(rounding=5e-3, decided=0.3)
def bfloat16_compute_of_float32_parameters(rng):
    def predict(params, x):
        x = x.astype(jnp.bfloat16)
        for layer in cast(params, jnp.bfloat16):
            x = jnp.tanh(x @ layer["w"] + layer["b"][None])
        return x.astype(jnp.float32)

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (3, 5), (3, 3))


@model(rounding=5e-3, decided=0.3)
def bfloat16_compute_one_row(rng):
    def predict(params, x):
        x = x.astype(jnp.bfloat16)
        for layer in cast(params, jnp.bfloat16):
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x.astype(jnp.float32)

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (5,), (3,))


# Before jax 0.10 such a convolution has no derivative.
WIDE_CONVOLUTION = (
    {"preferred_element_type": jnp.float32} if jax.__version_info__ >= (0, 10) else {}
)


@model(rounding=5e-3, decided=0.3)
def bfloat16_products_summed_in_float32(rng):
    params = {"w": weight(rng, 5, 3), "k": weight(rng, 2, 1, 2)}

    def predict(p, x):
        y = jnp.matmul(
            x.astype(jnp.bfloat16),
            p["w"].astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        y = conv(
            y[..., None].astype(jnp.bfloat16),
            p["k"].astype(jnp.bfloat16),
            **WIDE_CONVOLUTION,
        )
        return jnp.tanh(y.astype(jnp.float32))

    return params, regression(predict), pairs(rng, (3, 5), (3, 3, 2))


@model(rounding=5e-3, decided=0.3)
def bfloat16_parameters(rng):
    params = cast(mlp_params(rng, [5, 4, 3]), jnp.bfloat16)

    def loss_fn(params, batch):
        return mse(mlp(params, batch["x"].astype(jnp.bfloat16)), batch["y"]).astype(
            jnp.float32
        )

    batch = pairs(rng, (2, 5), (2, 3))
    return params, loss_fn, {**batch, "y": batch["y"].astype(jnp.bfloat16)}


@model(rounding=1e-3, decided=0.5)
def float16_parameters(rng):
    params = cast(mlp_params(rng, [5, 4, 3]), jnp.float16)
    batch = cast(pairs(rng, (2, 5), (2, 3)), jnp.float16)
    return params, regression(mlp), batch


@model(rounding=1e-3, decided=0.5)
def parameters_of_several_dtypes(rng):
    params = {"half": weight(rng, 5, 4).astype(jnp.float16), "full": weight(rng, 4, 3)}

    def predict(p, x):
        hidden = jnp.tanh(x @ p["half"].astype(jnp.float32))
        return hidden @ p["full"]

    return params, regression(predict), pairs(rng, (5,), (3,))
