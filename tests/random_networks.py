"""Small networks with large random weights, whose outputs depend on all that they read."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import checkpoint, config, generate_scenes, modalities, model, tokenizer
from terramind_jax.train import pretrain
from terramind_jax.train import tokenizer as train_tokenizer


def random_variables(init, module, scale):
    """Variables of the right shapes and large values: a fresh network says nearly the same whatever it reads."""
    rng = np.random.default_rng(0)
    shapes = flax.core.meta.unbox(jax.eval_shape(functools.partial(init, module), jax.random.key(0)))

    def fill(path, x):
        # Without biases, and looking at the context more than at itself.
        factor = 0 if "bias" in path[-1].key else 4 if any(p.key == "cross_attn" for p in path) else 1
        return jnp.asarray(rng.normal(size=x.shape, scale=scale * factor), x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def build(encoder, decoder, image_size=48):
    sizes = dict(dim=16, encoder_depth=1, decoder_depth=1, num_heads=2, gated_mlp=False, use_bias=True, image_size=image_size)
    module = model.TerraMind(model.TransformerConfig(**sizes, encoder=encoder, decoder=decoder))
    return module, random_variables(model.init, module, scale=0.6)


def build_tokenizers(*names, image_size=48):
    """``{modality: (module, variables)}`` with ViT decoders."""
    found = {}
    for name in names:
        facts = modalities.get(name)
        module = tokenizer.Tokenizer(tokenizer.TokenizerConfig(name, facts.channels, facts.levels, 16, 1, 2, image_size=image_size))
        found[name] = module, random_variables(tokenizer.init, module, scale=0.6)
    return found


def as_workdir(monkeypatch, folder, network, tokenizers):
    """`folder` as training leaves it, with the loading of `generate_scenes` replaced; of the eight devices one is used."""
    for name in tokenizers:
        (folder / "tokenizers" / name).mkdir(parents=True)
    monkeypatch.setattr(generate_scenes.pretrain, "load", lambda workdir: (*network, None))
    monkeypatch.setattr(generate_scenes.tokenizer, "load", lambda workdir: tokenizers[workdir.name])
    monkeypatch.setattr(generate_scenes, "spread", lambda network: network)
    return folder


def write_workdir(folder, inputs, targets, image_size=48):
    """A small model and its tokenizers in `folder` as the quickstart leaves them, for commands in processes of their own."""
    sizes = dict(encoder_depth=1, decoder_depth=1, num_heads=1, image_size=image_size)
    settings = config.pretraining()
    settings.model.update(dim=64, **sizes)
    settings.data.update(inputs=inputs, targets=targets)
    module = model.TerraMind(pretrain.transformer_config(settings))
    _write(folder / "model", settings, random_variables(model.init, module, scale=0.6))
    for name in targets:
        settings = config.tokenizer_training()
        settings.model.update(modality=name, levels=modalities.get(name).levels, dim=32, depth=1, num_heads=2, image_size=image_size)
        module = tokenizer.Tokenizer(train_tokenizer.tokenizer_config(settings))
        _write(folder / "tokenizers" / name, settings, random_variables(tokenizer.init, module, scale=0.6))
    return folder


def _write(workdir, settings, variables):
    config.bind_workdir(settings, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, keep=1)
    checkpoints.save(1, variables, {})
    checkpoints.close()
