"""Facts about the released models: their names, sizes, and where their weights are published (spec 2.1, 6.1, 10.1)."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal

SIZES: dict[str, dict[str, object]] = {
    "tiny": dict(dim=192, encoder_depth=12, decoder_depth=4, num_heads=3, gated_mlp=False, use_bias=True),
    "small": dict(dim=384, encoder_depth=12, decoder_depth=6, num_heads=6, gated_mlp=False, use_bias=True),
    "base": dict(dim=768, encoder_depth=12, decoder_depth=12, num_heads=12, gated_mlp=True, use_bias=False),
    "large": dict(dim=1024, encoder_depth=24, decoder_depth=24, num_heads=16, gated_mlp=True, use_bias=False),
}

# Unique parameters of the published encoder-decoder (spec 2.1).
PARAMETERS = {"tiny": 52_059_456, "small": 124_259_712, "base": 376_091_904, "large": 942_095_360}

Kind = Literal["backbone", "tim", "generate", "encdec", "tokenizer"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One released model. Models of a size read one file: the feature extractor takes its part of it."""

    name: str
    kind: Kind
    version: str  # v1 or v01: statistics, modalities and classes
    repository: str  # on the Hugging Face hub
    file: str
    size: str = ""  # of a transformer
    modality: str = ""  # of a tokenizer


def _transformers(version: str, size: str, repository: str, kinds: dict[str, Kind]) -> list[Entry]:
    stem = f"terramind_{version}_{size}"
    file = f"TerraMind_{version}_{size}.pt"
    return [Entry(stem + suffix, kind, version, repository, file, size=size) for suffix, kind in kinds.items()]


def _entries() -> dict[str, Entry]:
    kinds: dict[str, Kind] = {"": "backbone", "_tim": "tim", "_generate": "generate", "_encdec": "encdec"}
    entries = [e for size in SIZES for e in _transformers("v1", size, f"ibm-esa-geospatial/TerraMind-1.0-{size}", kinds)]
    for m in ("S2L2A", "S1RTC", "S1GRD", "DEM", "LULC", "NDVI"):
        repository = f"ibm-esa-geospatial/TerraMind-1.0-Tokenizer-{m}"
        entries.append(
            Entry(f"terramind_v1_tokenizer_{m.lower()}", "tokenizer", "v1", repository, f"TerraMind_Tokenizer_{m}.pt", modality=m)
        )
    del kinds["_encdec"]
    entries += _transformers("v01", "base", "FAST-EO/TerraMind-0.1-base", kinds)
    for m in ("S2L2A", "S1GRD", "DEM", "LULC"):
        repository = f"FAST-EO/TerraMind-v0.1-Tokenizer-{m}"
        entries.append(
            Entry(f"terramind_v01_tokenizer_{m.lower()}", "tokenizer", "v01", repository, f"TerraMind_v01_Tokenizer_{m}.pt", modality=m)
        )
    return {e.name: e for e in entries}


MODELS: dict[str, Entry] = _entries()

# Vocabularies of sequences: repository and file on the hub (spec 7).
VOCABULARIES = {
    "coords": ("ibm-esa-geospatial/TerraMind-1.0-Tokenizer-Coords", "config.json"),
    "caption": ("FAST-EO/TerraMind-v0.1-Tokenizer-Text", "config.json"),
}

# SHA-256 of published files, where one is known (spec 10.1). Every other download is checked against the hash that the hub states.
SHA256 = {"TerraMind_v1_tiny.pt": "e56ea9ebcd4451078b9ca4893d5cd8a89bbee376ae16829c3e7fbbbc76de0eba"}


def list_models() -> list[str]:
    """The name of every model that `terramind_jax.load` knows."""
    return list(MODELS)


def get(name: str) -> Entry:
    """The model called `name`; an unknown name is a ValueError that suggests the nearest."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"Unknown model {name!r}; {hint}tm.list_models() lists all {len(MODELS)}.")
    return MODELS[name]


def tokenizer(modality: str, version: str = "v1") -> Entry:
    """The released tokenizer of one modality."""
    return get(f"terramind_{version}_tokenizer_{modality.lower()}")
