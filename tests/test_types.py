"""What a type checker says of a user's file; mypy is the one that is run."""

import pathlib
import re

import mypy.api

ROOT = pathlib.Path(__file__).parent.parent

# A line with `# no` is one that has to be refused, `# TYPE` one that has this type.
USER = """
import jax
import jax.numpy as jnp
import optax

import hardvary


def loss(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(x @ w)


w, x = jnp.ones(2), jnp.ones((3, 4, 2))
hardvary.grad_stats(loss, method="fuse")  # no
hardvary.grad_stats(loss, method="fused")
hardvary.value_and_grad_stats(loss, method="fuse")  # no
hardvary.grad_stats(loss, stats=("means",))  # no
hardvary.grad_stats(loss, stats=("mean", "square"))
hardvary.and_mask("0.8")  # no
hardvary.and_mask({"w": 0.8, "b": optax.constant_schedule(0.5)})
hardvary.and_mask(lambda count: 0.01 * count)
hardvary.and_mask(0.8, rescale="yes")  # no
hardvary.sand_mask(0.5, sharpness="steep")  # no
hardvary.spectral_and_mask("0.8")  # no
hardvary.relative_gauss_newton("30")  # no
hardvary.agr_rand(0, std="small")  # no
hardvary.grad_drop("0")  # no
hardvary.cagrad("0.5")  # no
hardvary.cagrad(optax.constant_schedule(0.5))
hardvary.cagrad(lambda count: 0.5)
hardvary.clip_env_norms("1")  # no
hardvary.temporal_and_mask_adam("0.1")  # no
hardvary.temporal_and_mask_adam(optax.constant_schedule(0.1))
hardvary.add_l1_decay("0.1")  # no
hardvary.objectives.vrex_penalty("losses")  # no
losses, grads = hardvary.value_and_env_grads(loss)(w, x)
reveal_type(losses)  # Array
(losses, aux), grads = hardvary.value_and_env_grads(loss, has_aux=True)(w, x)
reveal_type(losses)  # Array
reveal_type(hardvary.value_and_env_grads(loss, 0, True)(w, x))  # Any
reveal_type(hardvary.value_and_grad_stats(loss)(w, x)[0])  # Array
reveal_type(hardvary.value_and_grad_stats(loss, has_aux=True)(w, x)[0][0])  # Array
reveal_type(hardvary.value_and_per_env_grad(loss, has_aux=True)(w, x)[0][0])  # Array
reveal_type(hardvary.value_and_env_grads_of_losses(loss)(w, x)[0])  # Array
""".strip().splitlines()


def test_a_users_file_is_refused_where_it_is_wrong_and_nowhere_else(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)  # where the configuration and the cache of `make lint` are
    path = tmp_path / "user.py"
    path.write_text("\n".join(USER) + "\n")
    report, problem, _ = mypy.api.run([str(path)])
    assert not problem
    pattern = r'user\.py:(\d+): (?:error|note: Revealed type is "(?:\S*\.)?(\w+)")'
    found = {int(line): kind or "no" for line, kind in re.findall(pattern, report)}
    expected = {
        number: line.split("# ")[1]
        for number, line in enumerate(USER, start=1)
        if "  # " in line
    }
    assert found == expected, report
