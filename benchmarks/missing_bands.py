"""How far bands that an image lacks are from the truth when a generator fills them, see `terramind_jax.bands`.

    python benchmarks/missing_bands.py TILES [--modality=S2L2A] [--missing=COASTAL_AEROSOL,WATER_VAPOR] [--results=FILE]

Takes the bands away from every GeoTIFF of the folder TILES, which hold all of them, fills them in both ways, and prints the root mean
square error over all pixels, in the standard deviations of the pretraining. The default bands are those that Sentinel-2 sees at 60 m, B01
and B09. The results in results/ are of the four S2L2A tiles of TerraMesh among the examples of github.com/IBM/terramind.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from terramind_jax import bands, files, geo, modalities

WAYS = get_args(bands.FillBands)
HOW = "`python benchmarks/missing_bands.py TILES --results=benchmarks/results/missing_bands.md`; its first lines say what is measured."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, metavar="TILES")
    parser.add_argument("--modality", default="S2L2A")
    parser.add_argument("--missing", default="COASTAL_AEROSOL,WATER_VAPOR", help="all at once")
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
    print(text)
    if arguments.results:
        files.write_text(arguments.results, f"# Missing bands\n\n{HOW}\n\n{text}\n")


def errors(modality: str, images: Sequence[np.ndarray], missing: Sequence[str], how: bands.FillBands) -> dict[str, float]:
    """RMSE of each missing band over all pixels of standardised images ``[H, W, C]``."""
    known = modalities.get(modality).bands
    given = [band for band in known if band not in missing]
    squares = []
    for image in images:
        some = image[..., [known.index(band) for band in given]]
        squares.append(np.square(bands.fill_missing(modality, some, given, how, standardised=True) - image).reshape(-1, len(known)))
    rmse = np.sqrt(np.concatenate(squares).mean(0))
    return {band: float(rmse[known.index(band)]) for band in missing}


if __name__ == "__main__":
    main()
