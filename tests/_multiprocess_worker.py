"""One of the processes of tests/test_multiprocess.py, started by it.

    python -m tests._multiprocess_worker COORDINATOR NUM_PROCESSES PROCESS_ID

Trains the model below on the devices of all processes, or on one device if there is one
process, and prints the result as the last line of its output, in JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hardvary

NUM_ENVS, DEVICES_PER_PROCESS, STEPS = 8, 2, 5


def make_batch():
    """Inputs and targets, [env, example, ...]; every process can make them all."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_ENVS, 3, 5)).astype(np.float32)
    # One feature that says the same everywhere, and what differs.
    y = 2 * x[..., :1] + rng.normal(size=(NUM_ENVS, 1, 2)).astype(np.float32)
    return x, y


def init_params():
    rng = np.random.default_rng(1)
    return {
        "w": rng.normal(size=(5, 4)).astype(np.float32),
        "b": rng.normal(size=4).astype(np.float32),
        "scale": np.float32(0.5),
        "out": rng.normal(size=(4, 2)).astype(np.float32),
    }


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w"] + params["b"]) * params["scale"]
    return jnp.mean(jnp.square(hidden @ params["out"] - y))


def train(params, batch, axis_name):
    """A few steps; the environments in `batch` are those of this device."""
    oracle = hardvary.value_and_grad_stats(loss_fn, method="fused", axis_name=axis_name)
    tx = optax.chain(hardvary.and_mask(threshold=0.5, rescale=True), optax.sgd(0.1))

    def step(carry, _):
        params, state = carry
        losses, stats = oracle(params, batch)
        updates, state = tx.update(stats, state, params)
        kept = optax.tree.get(state, "kept_fraction")
        votes = {name: leaf.sign_sum for name, leaf in stats.items()}
        log = {"losses": losses, "sign_sum": votes, "kept": kept}
        return (optax.apply_updates(params, updates), state), log

    (params, _), log = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return {"params": params, **log}


def train_by_products(params, batch, axis_name):
    """As `train`, with inner products of the environments of all devices."""
    oracle = hardvary.value_and_env_grads(loss_fn, axis_name=axis_name)
    tx = optax.chain(hardvary.cagrad(), optax.sgd(0.1))

    def step(carry, _):
        params, state = carry
        _, grads = oracle(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), hardvary.gramian(grads)

    (params, _), gramians = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return {"trained": params, "gramians": gramians}


def run_both(params, batch, axis_name):
    return {
        **train(params, batch, axis_name),
        **train_by_products(params, batch, axis_name),
    }


def main(coordinator, num_processes, process_id):
    if num_processes == 1:
        run = jax.jit(lambda params, batch: run_both(params, batch, None))
        result = run(init_params(), make_batch())
    else:
        jax.config.update("jax_num_cpu_devices", DEVICES_PER_PROCESS)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=40
        )
        assert jax.process_count() == num_processes
        assert jax.local_device_count() == DEVICES_PER_PROCESS
        mesh = jax.make_mesh(
            (num_processes * DEVICES_PER_PROCESS,),
            ("env",),
            axis_types=(jax.sharding.AxisType.Auto,),
        )
        sharding = NamedSharding(mesh, P("env"))
        # This process has loaded its own environments only.
        own = slice(
            process_id * NUM_ENVS // num_processes,
            (process_id + 1) * NUM_ENVS // num_processes,
        )
        batch = tuple(
            jax.make_array_from_process_local_data(sharding, leaf[own], leaf.shape)
            for leaf in make_batch()
        )
        params = jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(
                NamedSharding(mesh, P()), leaf, np.shape(leaf)
            ),
            init_params(),
        )
        out_specs = {
            "params": P(),
            # [step, env]
            "losses": P(None, "env"),
            "sign_sum": P(),
            "kept": P(),
            "trained": P(),
            "gramians": P(),
        }
        run = jax.jit(
            jax.shard_map(
                lambda params, batch: run_both(params, batch, "env"),
                mesh=mesh,
                in_specs=(P(), P("env")),
                out_specs=out_specs,
            )
        )
        result = run(params, batch)
        # Every process says what it sees: parameters are whole on each, of the losses
        # a process holds its own.
        losses = np.concatenate(
            [
                shard.data
                for shard in sorted(
                    result["losses"].addressable_shards,
                    key=lambda shard: shard.index[1].start,
                )
            ],
            axis=1,
        )
        result = {**result, "losses": losses}
    result = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), result)
    print(json.dumps({"process": process_id, "devices": jax.device_count(), **result}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
