"""Backbones of KerasHub, and Keras's own layers, on Keras's JAX backend."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import keras_hub
import numpy as np

from tests.models.families._parts import case, stir
from tests.zoo.blocks import ids, inputs


def _keras(rng, model, batch):
    keras.utils.set_random_seed(0)
    trainable = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]

    def predict(params, x):
        return model.stateless_call(params, fixed, x, training=False)[0]

    return case(rng, predict, stir(rng, trainable), batch)


def _tokens(rng):
    shape = (6, 2, 5)
    return {
        "token_ids": ids(rng, 13, 2, 5, low=1),
        "padding_mask": jax.device_put(np.ones(shape, np.int32)),
    }


def bert(rng):
    model = keras_hub.models.BertBackbone(13, 1, 2, 8, 16, dropout=0.0)
    segments = ids(rng, 2, 2, 5)
    return _keras(rng, model, {**_tokens(rng), "segment_ids": segments})


def llama(rng):
    model = keras_hub.models.LlamaBackbone(13, 1, 2, 8, 16, 1)
    return _keras(rng, model, _tokens(rng))


def mixtral(rng):
    model = keras_hub.models.MixtralBackbone(13, 1, 2, 8, 16, 1, num_experts=3, top_k=2)
    return _keras(rng, model, _tokens(rng))


def vision_transformer(rng):
    model = keras_hub.models.ViTBackbone((8, 8, 3), (4, 4), 1, 2, 8, 16)
    return _keras(rng, model, inputs(rng, 2, 8, 8, 3))


def lstm_and_gru(rng):
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True)),
            keras.layers.GRU(4),
            keras.layers.Dense(2),
        ]
    )
    return _keras(rng, model, inputs(rng, 2, 5, 3))


def separable_conv_net(rng):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.SeparableConv2D(6, 3, activation="swish"),
            keras.layers.GroupNormalization(2),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2DTranspose(4, 3, strides=2),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    return _keras(rng, model, inputs(rng, 2, 8, 8, 3))
