"""One picture of all that a model makes of one tile: a row for each input, alone, a column for each output, and the truth at the top.

    make quickstart
    python benchmarks/any_to_any.py quickstart [--data=TILES] [--tile=NAME] [--out=any_to_any.png]

Takes the folder of a quickstart, or a work directory with its tokenizers beside it. The tile is of the run's own held-out shards, or of
GeoTIFFs TILES/MODALITY/NAME.tif, of which the upper left window is taken: real tiles show what a model of the embedded world makes of them.
Tokens are drawn at temperature 0 and decoded by 10 steps of DDIM. Elevations are drawn with the range of the true tile, each about its own
level, which its scale tells.
"""

from __future__ import annotations

import argparse
import collections
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from terramind_jax import generate, generate_scenes, modalities, plot
from terramind_jax.data.index import open_index
from terramind_jax.evaluation import generation
from terramind_jax.scenes import reading
from terramind_jax.scenes.feeding import Network
from terramind_jax.train import pretrain

Images = Mapping[str, np.ndarray]  # [H, W, C] in the unit, class maps [H, W], by modality


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, metavar="TILES", help="default: the held-out shards of RUN")
    parser.add_argument("--tile", metavar="NAME", help="default: the first with the most modalities")
    parser.add_argument("--lulc_codes", default="terramesh", help="of the LULC rasters of TILES; default: terramesh")
    parser.add_argument("--out", type=Path, default=Path("any_to_any.png"), metavar="FILE")
    arguments = parser.parse_args(argv)
    module, variables, config = pretrain.load(generate_scenes.workdir(arguments.run))
    inputs = [s.modality for s in module.config.encoder if modalities.get(s.modality).is_image]
    outputs = [s.modality for s in module.config.decoder if s.kind == "tokens"]
    known, side = [m for m in modalities.MODALITIES if m in {*inputs, *outputs}], module.config.image_size
    if arguments.data:
        tile = of_folder(arguments.data, arguments.tile, known, side, arguments.lulc_codes)
    else:
        tile = of_shards(config.data.root, arguments.tile, known, side)
    inputs, outputs = ([m for m in known if m in names] for names in ({*inputs} & tile.keys(), outputs))
    tokenizers = generate_scenes.load_tokenizers(module, inputs, outputs, generate_scenes.tokenizer_folder(arguments.run))
    network, made = Network(module, variables, tokenizers), {}
    for source in inputs:
        if others := [m for m in outputs if m != source]:
            print(f"from {source}", flush=True)
            made[source] = from_one(network, source, tile[source], others)
    shown = cells(tile, made, outputs)
    plot.images(shown, columns=1 + len(outputs), within=elevation_limits(shown, tile), path=arguments.out)
    print(arguments.out)


# ---- the tile ----


def of_shards(root: str | os.PathLike, key: str | None, names: Sequence[str], side: int) -> Images:
    """The centre crop of a held-out sample of a folder, or of a store's address."""
    index = open_index(root, "val")
    try:
        i = int(index.available.sum(1).argmax()) if key is None else index.keys.find(key)
    except KeyError:
        raise SystemExit(f"The shards {root} have no held-out sample {key}.") from None
    return {m: generation.center(index, i, m, side) for m in names if generation.has(index, i, m)}


def of_folder(data: Path, name: str | None, names: Sequence[str], side: int, lulc_codes: str) -> Images:
    """The upper left window of a tile's rasters, as shards would hold it."""
    found = {m: {path.stem: path for path in sorted((data / m).glob("*.tif"))} for m in names}
    counts = collections.Counter(stem for of in found.values() for stem in of)
    if not counts or name is not None and name not in counts:
        raise SystemExit(f"There is no {data}/MODALITY/{name or 'NAME'}.tif of {', '.join(names)}.")
    name = name or counts.most_common(1)[0][0]
    scene = reading.open_scene(name, {m: of[name] for m, of in found.items() if name in of}, lulc_codes)
    reading.check_size(scene, side)
    windows = {m: reading.read(scene, m, 0, side)[0][:, :side] for m in scene.paths}
    return {m: x[..., 0] if generation.is_class_map(m) else x.astype(np.float32) for m, x in windows.items()}


# ---- what is made of it ----


def from_one(network: Network, source: str, image: np.ndarray, outputs: Sequence[str]) -> Images:
    """Each output from one input alone."""
    what = network.module, network.variables, network.tokenizers, {source: image[None]}, outputs
    how = dict(seed=0, temperature=0.0, chained=False, timesteps=10, sampler="ddim")
    return {m: x[0] for m, x in generate.generate(*what, **how).items()}


def cells(tile: Images, made: Mapping[str, Images], outputs: Sequence[str]) -> dict[str, np.ndarray | None]:
    """Rows one after another: nothing and the truth of the outputs; then each input and what was made of it."""
    shown: dict[str, np.ndarray | None] = {"corner": None} | {f"{m} (true)": tile.get(m) for m in outputs}
    for source, images in made.items():
        shown[f"{source} (input)"] = tile[source]
        shown |= {f"{m} from {source}": images.get(m) for m in outputs}
    return shown


def elevation_limits(shown: Mapping[str, np.ndarray | None], tile: Images) -> dict[str, plot.Limits]:
    """Of each DEM: as far apart as the true tile's, about its own middle, so that a wrong level flattens neither it nor the others."""
    drawn = {name: plot.limits(name, x) for name, x in shown.items() if x is not None and name.startswith("DEM ")}
    if "DEM" not in tile:
        return drawn
    low, high = plot.limits("DEM", tile["DEM"])
    return {name: ((a + b - high + low) / 2, (a + b + high - low) / 2) for name, (a, b) in drawn.items()}


if __name__ == "__main__":
    main()
