"""The reference beside ours: TerraTorch's own generator of a released model, with the same weights.

PyTorch and TerraTorch are imported only here, and only when they are asked for.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from terramind_jax import build, modalities, models, weights
from terramind_jax.scenes.feeding import Network

OPTIONS = {ours: theirs for theirs, ours in models.SAMPLING.items()}  # what TerraTorch calls those that it has
PUBLISHED = {"sampler": "ddim", "clip": "published"}  # of its diffusion decoders, which have no others


@dataclasses.dataclass(frozen=True)
class Reference:
    """TerraTorch's generators, a model for each output, as none shall condition another. They compute on the CPU, in float32."""

    generators: Mapping[str, Any]  # modules of PyTorch
    inputs: Sequence[str]
    seed: int
    timesteps: int

    @property
    def name(self) -> str:
        return f"TerraTorch {metadata.version('terratorch')}"

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Outputs ``[S, S, C]`` in their units, of LULC logits, from one sample's images ``[S, S, C]`` and class maps ``[S, S]``."""
        import torch

        made = {}
        for name in outputs:
            random.seed(self.seed)  # of the tokens; the diffusion's noise comes from PyTorch
            torch.manual_seed(self.seed)
            given = {key: torch.from_numpy(_channels_first(inputs[key])[None]) for key in self.inputs}
            with torch.inference_mode():
                image = self.generators[name](given, standardize=True, timesteps=self.timesteps)[name]
            made[name] = np.moveaxis(image[0].numpy(), 0, -1)
        return made


def _channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -1, 0)) if x.ndim == 3 else x.astype(np.int64)


def check(name: str | None, inputs: Sequence[str], to: Sequence[str], options: Mapping[str, Any]) -> None:
    """Whether TerraTorch has all that `load` needs, before anything is loaded.

    Raises:
      ImportError: TerraTorch is not installed, or does not load.
      ValueError: no released model, one that TerraTorch lacks, inputs, outputs or options that it does not have.
    """
    if name is None:
        raise ValueError("TerraTorch has the released models alone; say with --model which of them this is.")
    for option, only in PUBLISHED.items():
        if options.get(option, only) != only:
            raise ValueError(f"TerraTorch has the {option} {only!r} alone, not {options[option]!r}; compare the reference with that.")
    if unknown := options.keys() - OPTIONS.keys() - PUBLISHED.keys() - {"timesteps"}:
        raise ValueError(f"TerraTorch's generation has no {min(unknown)}; leave it out where the reference is compared.")
    if options.get("steps", 1) != 1:
        raise ValueError("TerraTorch fails with several steps of drawing tokens; compare the reference with --steps=1.")
    if "coords" in inputs:
        raise ValueError("The vocabulary by which TerraTorch reads coords is not in the weights; compare the reference without coords.")
    if own := [m for m in (*inputs, *to) if m not in modalities.RELEASED]:
        raise ValueError(f"TerraTorch knows no {own[0]}, which is a modality of your own.")
    if (name := generator_of(name)) not in registry():
        raise ValueError(f"TerraTorch {metadata.version('terratorch')} has no {name}.")


def load(name: str, network: Network, inputs: Sequence[str], to: Sequence[str], seed: int, timesteps: int, **options: Any) -> Reference:
    """The generators of the released model `name` with the weights of `network`, which makes `to` from `inputs`; see `check`.

    `seed`, `timesteps` and `options` are as of `generate.generate`. A ValueError if the weights are of a model of other sizes.
    """
    import torch

    name, known = generator_of(name), registry()
    model = build.model(name, modalities=list(inputs), output_modalities=list(to))
    model = dataclasses.replace(model, module=network.module, variables=network.variables, tokenizers=network.tokenizers)
    state = {key: torch.from_numpy(np.array(x)) for key, x in weights.to_torch(model).items()}
    settings = {OPTIONS[key]: value for key, value in options.items() if key not in PUBLISHED}
    generators = {}
    for output in to:
        generator = known.build(name, modalities=list(inputs), output_modalities=[output], pretrained=False, **settings).eval()
        needed = generator.state_dict().keys()
        try:
            generator.load_state_dict({key: x for key, x in state.items() if key in needed}, assign=True)  # all share the arrays
        except RuntimeError as error:
            raise ValueError(f"TerraTorch's {name} is of other sizes than these weights.") from error
        generators[output] = generator
    return Reference(generators, inputs, seed, timesteps)


def generator_of(name: str) -> str:
    """The generator among the models of a released model's name."""
    return f"{name.removesuffix('_generate')}_generate"


def registry() -> Any:
    """TerraTorch's whole models by name."""
    try:
        import torch
        from terratorch.registry import TERRATORCH_FULL_MODEL_REGISTRY
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that was built for another PyTorch
        raise ImportError(f"The reference needs TerraTorch (pip install 'terramind_jax[parity]'); importing it failed: {error}") from error
    torch.set_float32_matmul_precision("highest")  # importing TerraTorch lowers it
    return TERRATORCH_FULL_MODEL_REGISTRY
