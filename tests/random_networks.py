"""Small networks with large random weights, whose outputs depend on all that they read."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import model


def random_variables(init, module, scale):
    """Variables of the right shapes and large values: a fresh network says nearly the same whatever it reads."""
    rng = np.random.default_rng(0)
    shapes = flax.core.meta.unbox(jax.eval_shape(functools.partial(init, module), jax.random.key(0)))

    def fill(path, x):
        # Without biases, and looking at the context more than at itself.
        factor = 0 if "bias" in path[-1].key else 4 if any(p.key == "cross_attn" for p in path) else 1
        return jnp.asarray(rng.normal(size=x.shape, scale=scale * factor), x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def build(encoder, decoder):
    sizes = dict(dim=16, encoder_depth=1, decoder_depth=1, num_heads=2, gated_mlp=False, use_bias=True, image_size=48)
    module = model.TerraMind(model.TransformerConfig(**sizes, encoder=encoder, decoder=decoder))
    return module, random_variables(model.init, module, scale=0.6)
