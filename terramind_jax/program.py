"""Generation as one program of fixed shapes, with weights as arguments: compiled ahead of time, or exported (see `export`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from terramind_jax import coordinates, generate, modalities
from terramind_jax.model import TerraMind
from terramind_jax.tokenizer import Clip, Sampler, Tokenizer

Arrays = Mapping[str, Any]
NETWORK = "transformer"  # whose weights have this before their names; those of a tokenizer have its modality


def build(
    module: TerraMind,
    tokenizers: Mapping[str, Tokenizer],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    standardize: bool = True,
    version: str = "v1",
    offset: Mapping[str, float] | None = None,
    timesteps: int | None = None,
    sampler: Sampler = "dpmpp",
    clip: Clip = "published",
    **options: Any,
) -> Callable[[Arrays, Arrays, jax.Array], dict[str, jax.Array]]:
    """A pure function ``(weights, inputs, seeds)`` that makes what `generate.generate` makes with the same options.

    `weights` are `flat_weights`; `inputs` as `shapes` has them; `seeds` uint32 ``[B]``. Images come out float32 ``[B, S, S, C]``, of class
    maps logits, and coords as the ids that `coordinates.decode` reads, int32 ``[B, 4]``.

    Raises:
      ValueError: names that do not go together, or a caption, whose text no program reads.
    """
    generate.check_names(module, inputs, outputs, tokenizers)
    if "caption" in (*inputs, *outputs):
        raise ValueError("A caption is text, which a compiled program neither reads nor writes; use generate.")
    scale = dict(standardize=standardize, version=version)

    def run(weights: Arrays, inputs: Arrays, seeds: jax.Array) -> dict[str, jax.Array]:
        variables = traverse_util.unflatten_dict(weights, sep="/")
        loaded = {name: (network, variables[name]) for name, network in tokenizers.items()}
        network = module, variables[NETWORK], loaded
        tokens = generate.output_tokens(*network, inputs, outputs, seed=seeds, offset=offset, **scale, **options)
        decoding = dict(seed=seeds, timesteps=timesteps, sampler=sampler, clip=clip, **scale)
        made = {}
        for name, ids in tokens.items():
            stream, own = modalities.output_stream(name), (offset or {}).get(name, 0.0)
            is_image = stream.kind != "sequence"
            made[name] = generate.decode_image(stream, ids, loaded, offset=own, **decoding) if is_image else ids
        return made

    return run


def shapes(module: TerraMind, inputs: Sequence[str], batch_size: Any, image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a program takes: images float32 ``[B, S, S, C]``, class maps int32 ``[B, S, S]``, coords int32 ``[B, 3]`` as ids."""

    def shape(name: str) -> jax.ShapeDtypeStruct:
        stream = generate.input_stream(module, name)
        if stream.kind == "sequence":
            return jax.ShapeDtypeStruct((batch_size, 3), jnp.int32)
        side = (batch_size, image_size, image_size)
        facts = modalities.MODALITIES.get(stream.modality)
        if facts is not None and facts.kind == "classes":
            return jax.ShapeDtypeStruct(side, jnp.int32)
        return jax.ShapeDtypeStruct((*side, stream.channels or len(facts.bands)), jnp.float32)

    return {name: shape(name) for name in inputs}


def flat_weights(variables: Arrays, tokenizers: Mapping[str, Arrays]) -> dict[str, jax.Array]:
    """All weights by name, such as ``transformer/params/mask_token`` and ``DEM/params/...``."""
    return traverse_util.flatten_dict({NETWORK: variables, **tokenizers}, sep="/")


@dataclasses.dataclass(frozen=True, repr=False)
class Compiled:
    """A program that is compiled for one batch size and one image size; a call takes and gives what `Generator.generate` does."""

    program: jax.stages.Compiled
    weights: Arrays
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    check: Callable[[str, np.ndarray], None]  # what `generate` objects to in an input by name, which a program cannot see

    def __call__(self, inputs: Mapping[str, np.ndarray], seed: int | np.ndarray = 0) -> dict[str, np.ndarray]:
        """Inputs by user name; `seed` one integer, or ``[B]``, from 0 to 2**32 - 1."""
        if {*inputs} != {*self.inputs}:
            raise ValueError(f"The inputs are {', '.join(inputs) or 'none'}; this program was compiled for {', '.join(self.inputs)}.")
        arrays = {name: self._array(name, inputs[name], expected) for name, expected in self.inputs.items()}
        batch_size = next(iter(arrays.values())).shape[0]
        seeds = np.asarray(seed)
        if seeds.dtype.kind not in "iu" or seeds.shape not in ((), (batch_size,)) or seeds.min() < 0 or seeds.max() >= 2**32:
            raise ValueError(f"The seed is {seed}; a compiled program takes one integer, or {batch_size}, from 0 to 2**32 - 1.")
        made = self.program(self.weights, arrays, np.broadcast_to(seeds, (batch_size,)).astype(np.uint32))
        return {name: self._result(name, np.asarray(x)) for name, x in made.items()}

    def _array(self, name: str, x: np.ndarray, expected: jax.ShapeDtypeStruct) -> np.ndarray:
        x = coordinates.encode(np.asarray(x)) if name == "coords" else np.asarray(x)
        x = x[..., 0] if x.ndim == len(expected.shape) + 1 and x.shape[-1] == 1 else x  # class maps may have a band
        if x.shape != expected.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; this program was compiled for {list(expected.shape)}.")
        self.check(name, x)
        return x.astype(expected.dtype)

    def _result(self, name: str, x: np.ndarray) -> np.ndarray:
        is_image = modalities.output_stream(name).kind != "sequence"
        return x if is_image else np.stack(coordinates.decode(x), axis=-1)


def compile_for(
    run: Callable[[Arrays, Arrays, jax.Array], dict[str, jax.Array]],
    weights: Arrays,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    check: Callable[[str, np.ndarray], None],
) -> Compiled:
    """The function of `build` as a program for `inputs`, compiled now; `check` is `generate.check_input` of the model."""
    batch_size = next(iter(inputs.values())).shape[0]
    seeds = jax.ShapeDtypeStruct((batch_size,), jnp.uint32)
    return Compiled(jax.jit(run).lower(weights, dict(inputs), seeds).compile(), weights, inputs, check)
