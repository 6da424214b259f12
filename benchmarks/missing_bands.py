"""How far bands that an image lacks are from the truth when a generator fills them, see `terramind_jax.bands`, and what that generates.

    python benchmarks/missing_bands.py TILES [--modality=S2L2A] [--missing=COASTAL_AEROSOL,WATER_VAPOR] [--weights=DIR] [--results=FILE]

Takes the bands away from every GeoTIFF of the folder TILES, which hold all of them, fills them in both ways, and prints the root mean
square error over all pixels, in the standard deviations of the pretraining. The default bands are those that Sentinel-2 sees at 60 m, B01
and B09. With weights, the folder of a quickstart, all that they make of an image is made of the whole tiles (upper left windows) and of
the filled ones, with one seed: the second table is how far the latter are from the former, and as a measure, how far another seed is.

The results in results/ are of the four S2L2A tiles of TerraMesh among the examples of github.com/IBM/terramind.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from terramind_jax import bands, files, generate, generate_scenes, geo, modalities
from terramind_jax.train import pretrain

WAYS = get_args(bands.FillBands)
HOW = "`python benchmarks/missing_bands.py TILES --weights=DIR --results=FILE`; its first lines say what is measured."
OTHER_SEED = "none missing, another seed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, metavar="TILES")
    parser.add_argument("--modality", default="S2L2A")
    parser.add_argument("--missing", default="COASTAL_AEROSOL,WATER_VAPOR", help="all at once")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="of a quickstart, to generate with")
    parser.add_argument("--results", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    paths = sorted(arguments.tiles.glob("*.tif"))
    if not paths:
        raise SystemExit(f"There is no GeoTIFF in {arguments.tiles}.")
    images = [modalities.standardize(arguments.modality, np.asarray(geo.read(path, arguments.modality), np.float32)) for path in paths]
    missing = arguments.missing.split(",")
    found = {how: errors(arguments.modality, images, missing, how) for how in WAYS}
    rows = [f"| {band} | {' | '.join(f'{found[how][band]:.2f}' for how in WAYS)} |" for band in missing]
    head = f"| missing band of {arguments.modality} | {' | '.join(WAYS)} |\n|{'---|' * (1 + len(WAYS))}"
    text = "\n".join([f"RMSE in standard deviations, {len(paths)} tiles.", "", head, *rows])
    if arguments.weights:
        text += f"\n\n{generation(arguments.weights, arguments.modality, images, missing)}"
    print(text)
    if arguments.results:
        files.write_text(arguments.results, f"# Missing bands\n\n{HOW}\n\n{text}\n")


def errors(modality: str, images: Sequence[np.ndarray], missing: Sequence[str], how: bands.FillBands) -> dict[str, float]:
    """RMSE of each missing band over all pixels of standardised images ``[H, W, C]``."""
    known, squares = modalities.get(modality).bands, []
    for image in images:
        some, given = without(modality, image, missing)
        squares.append(np.square(bands.fill_missing(modality, some, given, how, standardised=True) - image).reshape(-1, len(known)))
    rmse = np.sqrt(np.concatenate(squares).mean(0))
    return {band: float(rmse[known.index(band)]) for band in missing}


def without(modality: str, images: np.ndarray, missing: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Images without some bands, and which bands those have."""
    known = modalities.get(modality).bands
    given = [band for band in known if band not in missing]
    return images[..., [known.index(band) for band in given]], given


# ---- what is generated ----


def generation(weights: Path, modality: str, images: Sequence[np.ndarray], missing: Sequence[str]) -> str:
    """The second table."""
    found = distances(weights, modality, images, missing)
    columns = [*WAYS, OTHER_SEED]
    rows = [f"| {name} | {' | '.join(figure(name, of[column]) for column in columns)} |" for name, of in found.items()]
    about = f"What a quickstart's weights make of {modality} without {', '.join(missing)}, against what they make of all bands"
    head = f"| generated | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}"
    return "\n".join([f"{about}: RMSE in standard deviations, of LULC the share of pixels of another class.", "", head, *rows])


def distances(weights: Path, modality: str, images: Sequence[np.ndarray], missing: Sequence[str]) -> dict[str, dict[str, float]]:
    """By output, how far it is from that of whole images, for each way to fill them and for another seed; images are standardised."""
    module, variables, _ = pretrain.load(generate_scenes.workdir(weights))
    outputs = [s.modality for s in module.config.decoder if s.kind == "tokens" and s.modality != modality]
    tokenizers = generate_scenes.load_tokenizers(module, [modality], outputs, generate_scenes.tokenizer_folder(weights))
    side = module.config.image_size
    whole = np.stack([image[:side, :side] for image in images])
    some, given = without(modality, whole, missing)

    def make(x: np.ndarray, seed: int = 0, **filling) -> dict[str, np.ndarray]:
        how = dict(seed=seed, standardize=False, chained=False, timesteps=10, sampler="ddim", **filling)
        return generate.generate(module, variables, tokenizers, {modality: x}, outputs, **how)

    expected = make(whole)
    made = {how: make(some, bands={modality: given}, fill_bands=how) for how in WAYS} | {OTHER_SEED: make(whole, seed=1)}
    return {name: {how: distance(name, x[name], expected[name]) for how, x in made.items()} for name in outputs}


def distance(name: str, x: np.ndarray, y: np.ndarray) -> float:
    """RMSE, of class maps the share of pixels that differ."""
    if modalities.get(name).kind == "classes":
        return float(np.mean(x.argmax(-1) != y.argmax(-1)))
    return float(np.sqrt(np.mean(np.square(x - y))))


def figure(name: str, value: float) -> str:
    return f"{value:.0%}" if modalities.get(name).kind == "classes" else f"{value:.2f}"


if __name__ == "__main__":
    main()
