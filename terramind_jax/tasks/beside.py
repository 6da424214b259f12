"""The frozen networks beside a backbone, which make ids for it to read: tokenizers of LULC and NDVI, and a generator that thinks.

As in TerraTorch, whose models tokenise such inputs inside; no gradient reaches a tokenizer there either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from terramind_jax import tim, tokenizer
from terramind_jax.models import FeatureExtractor, ThinkingInModalities
from terramind_jax.tasks import thinking
from terramind_jax.tasks.thinking import Thinker
from terramind_jax.tokenizer import Tokenizer, TokenizerConfig

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Beside:
    """Variables are ``{"tokenizers": {input: ...}, "generator": ...}``, of each what there is."""

    tokenizers: tuple[tuple[str, Tokenizer], ...] = ()  # by user name of an input
    thinker: Thinker | None = None

    def __bool__(self) -> bool:
        return bool(self.tokenizers) or self.thinker is not None

    @property
    def keeps_embeddings(self) -> bool:
        """Whether a network here has the backbone's embeddings, so that they are not trained."""
        return self.thinker is not None and self.thinker.chained

    def with_tokenizers(self, own: Mapping[str, TokenizerConfig]) -> Beside:
        """With tokenizers of these sizes, by input, in the place of the released ones, of which they have the dtype."""
        known = {name: module.config for name, module in self.tokenizers}
        sized = {name: dataclasses.replace(own.get(name, c), dtype=c.dtype, unroll=c.unroll) for name, c in known.items()}
        return dataclasses.replace(self, tokenizers=tuple((name, Tokenizer(c)) for name, c in sized.items()))

    def init(self, key: jax.Array, encoder: Variables) -> dict[str, Any]:
        """Fresh variables, boxed; `encoder` are the backbone's ``{"params", "buffers"}``, whose embeddings a chained thinker has, too."""
        found: dict[str, Any] = {}
        if self.tokenizers:
            keys = jax.random.split(jax.random.fold_in(key, 1), len(self.tokenizers))
            found["tokenizers"] = {name: dict(tokenizer.init(module, k)) for (name, module), k in zip(self.tokenizers, keys, strict=True)}
        if self.thinker is not None:
            own = dict(self.thinker.module.init(key, method="everything"))
            found["generator"] = _shared(own, encoder) if self.thinker.chained else own
        return found

    def ids(self, held: Variables, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Standardised ``[B, (T,) H, W, C]`` by user name -> ids ``[B, (T,) h, w]`` of what is tokenised, by its name, then those that
        `Thinker` generates, by stream."""
        found = {name: _encode(module, held["tokenizers"][name], inputs[name]) for name, module in self.tokenizers}
        return found if self.thinker is None else found | self.thinker(held["generator"], {**inputs, **found})


NOTHING = Beside()


def of(extractor: FeatureExtractor, seed: int) -> Beside:
    """Those of a model."""
    tokens = {name: extractor.tokenizers[stream.modality][0] for name, stream in extractor.streams.items() if stream.kind == "tokens"}
    return Beside(tuple(tokens.items()), thinking.of(extractor, seed) if isinstance(extractor, ThinkingInModalities) else None)


@partial(jax.jit, static_argnames="module")
def _encode(module: Tokenizer, variables: Variables, x: jax.Array) -> jax.Array:
    ids = module.apply(variables, x.reshape(-1, *x.shape[-3:]), method="encode")
    return ids.reshape(*x.shape[:-3], *ids.shape[1:])


def _shared(found: Variables, encoder: Variables) -> dict[str, Any]:
    own = {group: {name: x for name, x in tree.items() if (group, name) not in tim.SHARED} for group, tree in found.items()}
    return tim.share(own, encoder)
