"""Graph networks of jraph, with Haiku's layers."""

import haiku as hk
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from tests.models.families._parts import haiku
from tests.zoo.blocks import NUM_ENVS, inputs

NODES, EDGES = 6, 10


def _graphs(rng):
    """A graph for each environment, of its own edges."""

    def ends():
        return jax.device_put(rng.integers(0, NODES, (NUM_ENVS, EDGES), np.int32))

    return jraph.GraphsTuple(
        nodes=inputs(rng, NODES, 3),
        edges=inputs(rng, EDGES, 2),
        senders=ends(),
        receivers=ends(),
        globals=inputs(rng, 1, 2),
        n_node=jax.device_put(np.full((NUM_ENVS, 1), NODES, np.int32)),
        n_edge=jax.device_put(np.full((NUM_ENVS, 1), EDGES, np.int32)),
    )


def _mlp(width):
    return lambda *args: hk.nets.MLP((8, width))(jnp.concatenate(args, -1))


def graph_network(rng):
    def predict(graph):
        for _ in range(2):
            graph = jraph.GraphNetwork(
                jraph.concatenated_args(_mlp(4)),
                jraph.concatenated_args(_mlp(4)),
                jraph.concatenated_args(_mlp(4)),
                attention_logit_fn=lambda *args: hk.Linear(1)(
                    jnp.concatenate(jax.tree.leaves(args), -1)
                ),
                attention_reduce_fn=lambda edges, weights: edges * weights,
            )(graph)
        return graph.nodes, graph.globals

    return haiku(rng, predict, _graphs(rng))


def interaction_network(rng):
    def predict(graph):
        net = jraph.InteractionNetwork(
            jraph.concatenated_args(_mlp(4)), jraph.concatenated_args(_mlp(3))
        )
        return net(net(graph)._replace(edges=graph.edges)).nodes

    return haiku(rng, predict, _graphs(rng))


def graph_convolution(rng):
    def predict(graph):
        for width in (8, 4):
            graph = jraph.GraphConvolution(
                lambda nodes, width=width: hk.Linear(width)(jnp.tanh(nodes)),
                add_self_edges=True,
            )(graph)
        return graph.nodes

    return haiku(rng, predict, _graphs(rng))


def graph_attention(rng):
    def predict(graph):
        def logits(senders, receivers, edges):
            both = jnp.concatenate([senders, receivers], -1)
            return jax.nn.leaky_relu(hk.Linear(1)(both))

        net = jraph.GAT(
            lambda nodes: hk.Linear(6)(nodes),
            logits,
            lambda nodes: hk.Linear(3)(jax.nn.elu(nodes)),
        )
        return net(graph._replace(edges=None)).nodes

    return haiku(rng, predict, _graphs(rng))


def deep_sets(rng):
    def predict(graph):
        return jraph.DeepSets(
            jraph.concatenated_args(_mlp(4)), jraph.concatenated_args(_mlp(3))
        )(graph).globals

    return haiku(rng, predict, _graphs(rng))
