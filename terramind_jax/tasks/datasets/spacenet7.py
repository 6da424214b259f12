"""SpaceNet 7 (Van Etten et al. 2021) as PANGAEA has it: buildings on monthly mosaics of Planet, in 16 tiles of 256 pixels.

    metadata_train.json                   {AREA: [{"year": 2018, "month": 1, "mask": true if there are clouds, "label": if labelled}, ...]}
    train/AREA/images_masked/global_monthly_2018_01_mosaic_AREA.tif               uint8 red, green, blue and alpha, about 1024 pixels
    train/AREA/labels_raster/global_monthly_2018_01_mosaic_AREA_Buildings.tif     above 0: building

Its publishers have the labels as GeoJSON; this is PANGAEA's copy, where they are rasters. Months with clouds or without labels are left
out. A mosaic that is a pixel short of 1024 is brought to it by the nearest pixel. Values are no reflectance, so that only the statistics
here fit them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import numpy as np

from terramind_jax import geo
from terramind_jax.tasks.datasets import files
from terramind_jax.tasks.datasets.dataset import Dataset, Facts, Sample

SOURCE = "https://drive.google.com/uc?id=1BADSEjxYKFZZlM-tEkRUfHvHi5XdaVV9 (spacenet7.tar.gz)"
SIDE, TILE = 1024, 256
BANDS = ("RED", "GREEN", "BLUE")

# Areas without L15- and _13, split as in PANGAEA, which has it from doi.org/10.3390/rs15215135.
AREAS = {
    "train": (
        "0331E-1257N_1327_3160 0358E-1220N_1433_3310 0457E-1135N_1831_3648 0487E-1246N_1950_3207 0577E-1243N_2309_3217 "
        "0586E-1127N_2345_3680 0595E-1278N_2383_3079 0632E-0892N_2528_4620 0683E-1006N_2732_4164 0924E-1108N_3699_3757 "
        "1015E-1062N_4061_3941 1138E-1216N_4553_3325 1203E-1203N_4815_3378 1204E-1202N_4816_3380 1209E-1113N_4838_3737 "
        "1210E-1025N_4840_4088 1276E-1107N_5105_3761 1298E-1322N_5193_2903 1389E-1284N_5557_3054 1438E-1134N_5753_3655 "
        "1439E-1134N_5759_3655 1481E-1119N_5927_3715 1538E-1163N_6154_3539 1615E-1206N_6460_3366 1669E-1153N_6678_3579 "
        "1669E-1160N_6679_3549 1672E-1207N_6691_3363 1703E-1219N_6813_3313 1709E-1112N_6838_3742 1716E-1211N_6864_3345"
    ),
    "val": (
        "0357E-1223N_1429_3296 0361E-1300N_1446_2989 0368E-1245N_1474_3210 0566E-1185N_2265_3451 0614E-0946N_2459_4406 "
        "0760E-0887N_3041_4643 1014E-1375N_4056_2688 1049E-1370N_4196_2710 1185E-0935N_4742_4450 1289E-1169N_5156_3514 "
        "1296E-1198N_5184_3399 1615E-1205N_6460_3370 1617E-1207N_6468_3360 1669E-1160N_6678_3548 1748E-1247N_6993_3202"
    ),
    "test": (
        "0387E-1276N_1549_3087 0434E-1218N_1736_3318 0506E-1204N_2027_3374 0544E-1228N_2176_3279 0977E-1187N_3911_3441 "
        "1025E-1366N_4102_2726 1172E-1306N_4688_2967 1200E-0847N_4802_4803 1204E-1204N_4819_3372 1335E-1166N_5342_3524 "
        "1479E-1101N_5916_3785 1690E-1211N_6763_3346 1691E-1211N_6764_3347 1848E-0793N_7394_5018"
    ),
}

# Mean and standard deviation: PANGAEA, configs/dataset/spacenet7.yaml.
FACTS = Facts(
    title="SpaceNet-7",
    task="segmentation",
    bands={"S2L2A": BANDS},
    class_names=("Background", "Building"),
    ignore_index=-1,
    mean={"S2L2A": (121.826, 106.52838, 78.372116)},
    std={"S2L2A": (56.717068, 44.517075, 40.451515)},
)


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The tiles of the areas that ``train``, ``val`` or ``test``."""
    if split not in AREAS:
        raise ValueError(f"SpaceNet-7 has no split {split!r}; it has {', '.join(AREAS)}.")
    root, areas = files.base(root, "spacenet7"), [f"L15-{area}_13" for area in AREAS[split].split()]
    where = os.path.join(root, "metadata_train.json")
    files.require(FACTS.title, root, ["metadata_train.json", *(f"train/{area}" for area in areas)], SOURCE)
    with open(where, encoding="utf-8") as f:
        months = json.load(f)
    wanted = ((area, month) for area in areas for month in months[area] if month["label"] and not month["mask"])
    samples = tuple(sample for area, month in wanted for sample in _samples(root, area, month))
    files.check_present(((s.name, path) for s in samples for path in (s.inputs[0], s.target[0])), where)
    return Dataset(FACTS, split, samples, read_inputs, read_target)


def read_inputs(sample: Sample) -> dict[str, np.ndarray]:
    """The tile of a mosaic, 0 where it has no data."""
    path, *corner = sample.inputs
    return {"S2L2A": np.nan_to_num(_tile(path, *corner, (*BANDS, "alpha"), "S2L2A", BANDS), nan=0.0)}


def read_target(sample: Sample) -> np.ndarray:
    """1 where there is a building."""
    path, *corner = sample.target
    return (_tile(path, *corner, ("label",), "a mask")[..., 0] > 0).astype(np.int32)


def _samples(root: str, area: str, month: Mapping) -> list[Sample]:
    name = f"global_monthly_{month['year']}_{month['month']:02d}_mosaic_{area}"
    image = os.path.join(root, "train", area, "images_masked", f"{name}.tif")
    mask = os.path.join(root, "train", area, "labels_raster", f"{name}_Buildings.tif")
    corners = [(top, left) for top in range(0, SIDE, TILE) for left in range(0, SIDE, TILE)]
    return [Sample(f"{name}_{top}_{left}", (image, top, left), (mask, top, left)) for top, left in corners]


def _tile(path: str, top: int, left: int, *what) -> np.ndarray:
    """A tile ``[TILE, TILE, C]`` of a raster, seen as `SIDE` pixels a side; no other rows are read. `what` is for `geo.read_valid`."""
    place = geo.place(path)
    rows = ((np.arange(top, top + TILE) + 0.5) * place.height / SIDE).astype(int)
    columns = ((np.arange(left, left + TILE) + 0.5) * place.width / SIDE).astype(int)
    return geo.read_valid(path, *what, rows=(int(rows[0]), int(rows[-1]) + 1))[(rows - rows[0])[:, None], columns]
