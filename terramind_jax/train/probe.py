"""What a pretraining has learned, on whole held-out scenes: how well it generates, and whether its features tell land covers apart.

From all pixels of one modality every target is generated in one step at temperature 0, each alone; the encoder's mean output is given
to a k-nearest-neighbour classifier of the scenes' most common land cover. Nothing is trained, and no tokenizer is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import metrics, modalities, sharding
from terramind_jax.data import views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index
from terramind_jax.modalities import LULC_CLASSES, Stream
from terramind_jax.model import TerraMind

PER_DEVICE = 4  # scenes that a device looks at at a time
NONE = -1  # token, label and share of what a scene lacks


@dataclasses.dataclass(frozen=True)
class Probe:
    """Which scenes are looked at, and what is asked of them."""

    index: Index
    scenes: np.ndarray  # places in the index
    source: Stream
    targets: tuple[Stream, ...]
    image_size: int

    def __call__(self, look: Callable[[Mapping[str, jax.Array]], tuple], mesh: jax.sharding.Mesh) -> dict[str, float]:
        """The metrics of what `look`, `look_at` of a state, sees.

        ``val/generated/MODALITY``: share of its tokens that are generated right; ``val/knn``: share of scenes whose nearest neighbours
        have the same land cover, beside ``val/knn_majority``, that of always the most common one.
        """
        seen = [jax.device_get(look(batch)) for batch in batches(self, mesh)]
        features, labels, right, first = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        features, labels, right = features[first], labels[first], right[first]
        known = right != NONE
        shares = {
            f"val/generated/{stream.modality}": float(right[known[:, t], t].mean())
            for t, stream in enumerate(self.targets)
            if known[:, t].any()
        }
        at = labels != NONE
        if len(set(labels[at])) < 2:
            return shares  # one class, or none, tells nothing
        majority = np.bincount(labels[at]).max() / at.sum()
        return {**shares, "val/knn": metrics.knn_accuracy(features[at], labels[at]), "val/knn_majority": float(majority)}


def choose(
    index: Index, encoder: Sequence[Stream], decoder: Sequence[Stream], names: Sequence[str], image_size: int, limit: int
) -> Probe | None:
    """The first `limit` scenes with the first of the modalities `names` that the model reads as pixels; None if there are none."""
    pixels = {s.modality: s for s in encoder if s.kind == "pixels"}
    for name in (n for n in names if n in pixels):
        scenes = np.flatnonzero(index.available[:, index.modalities.index(name)])[:limit]
        targets = tuple(s for s in decoder if s.kind == "tokens" and s.modality != name)
        if targets and len(scenes):
            return Probe(index, scenes, pixels[name], targets, image_size)
    return None


def look_at(module: TerraMind, source: str, targets: Sequence[str], variables: Any, batch: Mapping[str, jax.Array]) -> tuple:
    """Mean features ``[B, D]``, labels ``[B]``, shares of right tokens of `targets` ``[B, T]``, and what is no repetition ``[B]``."""

    def look(bound: TerraMind) -> tuple[jax.Array, list[jax.Array]]:
        content, emb = bound.embed(source, batch["pixels"])
        features = bound.features(content, emb)
        context = bound.decoder_proj_context(features) + emb
        return features.mean(1), [share(bound, key, context) for key in targets]

    def share(bound: TerraMind, key: str, context: jax.Array) -> jax.Array:
        truth = batch[key]
        positions = jnp.broadcast_to(jnp.arange(truth.shape[1]), truth.shape[:2])
        made = bound.logits(key, bound.decode(bound.queries(key, positions), context, None)).argmax(-1)
        flat = (truth.shape[0], -1)  # the codes of several codebooks count one by one
        return jnp.where(truth.reshape(flat)[:, 0] == NONE, NONE, (made == truth).reshape(flat).mean(1))

    features, shares = module.apply(variables, method=look)
    return features.astype(jnp.float32), batch["label"], jnp.stack(shares, 1), batch["first"]


# ---- scenes ----


def batches(probe: Probe, mesh: jax.sharding.Mesh) -> Iterator[dict[str, jax.Array]]:
    """The scenes on the mesh, of which this process reads its share; the last ones are repeated until all devices have as many."""
    rows = PER_DEVICE * mesh.shape["data"] * mesh.shape["fsdp"]
    host, hosts = sharding.host_share(mesh)
    padded = np.resize(probe.scenes, -(-len(probe.scenes) // rows) * rows)
    for start in range(0, len(padded), rows):
        mine = np.arange(start, start + rows).reshape(hosts, -1)[host]
        scenes = [{**read(probe, int(padded[n])), "first": n < len(probe.scenes)} for n in mine]
        yield sharding.to_global({name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}, mesh)


def read(probe: Probe, i: int) -> dict[str, np.ndarray]:
    """One scene's standardised pixels ``[S, S, C]``, tokens by stream ``[N]`` or ``[N, K]``, and label.

    Nothing is known of one that cannot be read.
    """
    side, positions = probe.image_size, np.arange((probe.image_size // modalities.PATCH_SIZE) ** 2)
    try:
        pixels = views.read_variant(probe.index, i, probe.source.modality, 0, side)
        sample, has = views.Sample(probe.index, i, 0, side), dict(zip(probe.index.modalities, probe.index.has_tokens[i], strict=True))
        tokens = {s.key: sample.ids(s, positions) for s in probe.targets if has[s.modality]}
        label = _land_cover(probe.index, i, side)
    except DataError:
        pixels, tokens, label = np.zeros((side, side, probe.source.channels)), {}, NONE
    nothing = {s.key: np.full((len(positions), *s.codes), NONE) for s in probe.targets}
    known = {key: np.asarray(tokens.get(key, none), np.int32) for key, none in nothing.items()}
    return {"pixels": modalities.standardize(probe.source.modality, pixels), "label": np.int32(label), **known}


def _land_cover(index: Index, i: int, side: int) -> int:
    """The most common class of a scene."""
    if "LULC" not in index.modalities or not index.available[i, index.modalities.index("LULC")]:
        return NONE
    return int(np.bincount(views.read_variant(index, i, "LULC", 0, side).ravel(), minlength=len(LULC_CLASSES)).argmax())
