"""Flax models of Transformers 4, the last that had them."""

import transformers

from tests.models.families._parts import case, stir
from tests.zoo.blocks import ids, inputs


def _flax(rng, model, batch, call):
    def predict(params, x):
        return call(lambda *args, **kwargs: model(*args, **kwargs, params=params), x)

    return case(rng, predict, stir(rng, model.params), batch)


def bert(rng):
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = transformers.FlaxBertForMaskedLM(config, input_shape=(1, 5))
    return _flax(rng, model, ids(rng, 13, 2, 5), lambda f, x: f(x).logits)


def gpt2(rng):
    config = transformers.GPT2Config(
        vocab_size=13,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.FlaxGPT2LMHeadModel(config, input_shape=(1, 5))
    return _flax(rng, model, ids(rng, 13, 2, 5), lambda f, x: f(x).logits)


def clip(rng):
    text = dict(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=12,
    )
    vision = dict(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=6
    )
    model = transformers.FlaxCLIPModel(config)
    batch = (ids(rng, 13, 3, 5), inputs(rng, 3, 3, 8, 8))
    return _flax(rng, model, batch, lambda f, x: f(*x).logits_per_image)
