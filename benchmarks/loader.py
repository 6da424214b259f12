"""Samples a second and core that the reader takes from local shards, as published: eight modalities of 264 pixels, batches of 8.

    python benchmarks/loader.py                    # a minute; 48 scenes of the embedded world in a temporary folder
    python benchmarks/loader.py --root DIR         # the train split of shards that are there

``index`` reads pixels by what the index knows, ``zipfile`` the same samples through the zip and its metadata, and ``published`` by
TerraMesh's own ``terramesh.py`` where that can be imported (put it in the path; it needs torch, webdataset, zarr 2 and xarray). One
process, one thread, the page cache warm; the best of three passes.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import process

from terramind_jax.data.index import Index, open_index
from terramind_jax.data.shards import read_sample
from terramind_jax.data.synthesize import synthesize

SCENES, BATCH, PASSES = 48, 8, 3


def batches(index: Index, modalities: Sequence[str], read: Callable[[int, str], np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Whole tiles in batches of `BATCH`; a modality that a sample lacks is left out of its batch."""
    for first in range(0, len(index), BATCH):
        rows = range(first, min(first + BATCH, len(index)))
        there = {m: [i for i in rows if index.available[i, index.modalities.index(m)]] for m in modalities}
        yield {m: np.stack([read(i, m) for i in having]) for m, having in there.items() if having}


def published(root: str, modalities: Sequence[str]) -> Iterator[dict]:
    """Batches of TerraMesh's loader."""
    build = importlib.import_module("terramesh").build_terramesh_dataset
    return iter(build(path=root, modalities=list(modalities), split="train", batch_size=BATCH, shuffle=False))


def rate(make: Callable[[], Iterator], samples: int) -> float:
    """Samples a second of processor time."""
    best = float("inf")
    for _ in range(PASSES):
        start = time.process_time()
        for _ in itertools.islice(make(), -(-samples // BATCH)):
            pass
        best = min(best, time.process_time() - start)
    return samples / best


def measure(root: str) -> None:
    index = open_index(root, "train")
    print(f"{process.where()}; {len(index)} samples of {index.stored_bytes() / len(index) / 1e6:.2f} MB")

    def through_zip(i: int, modality: str) -> np.ndarray:
        return np.moveaxis(read_sample(index._payload(index._pixels, i, modality), ("bands",))["bands"][0], 0, -1)

    for modalities in (index.modalities, ("S2L2A",)):
        readers = {"index": index.read, "zipfile": through_zip}
        rates = {name: rate(lambda r=read, m=modalities: batches(index, m, r), len(index)) for name, read in readers.items()}
        try:
            rates["published"] = rate(lambda m=modalities: published(root, m), len(index))
        except ImportError as error:
            print(f"(published loader not measured: {error})")
        print(f"{', '.join(modalities)}: " + ", ".join(f"{name} {value:.0f}/s" for name, value in rates.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", metavar="DIR", help="folder of shards; default: the embedded world")
    root = parser.parse_args().root
    if root:
        return measure(root)
    with tempfile.TemporaryDirectory() as folder:
        synthesize(folder, scenes=SCENES, val_scenes=0)
        measure(folder)


if __name__ == "__main__":
    main()
