"""Sen1Floods11 (Bonafilia et al. 2020): water on 446 hand-labelled chips of 512 pixels, from Sentinel-2 L1C and Sentinel-1 GRD.

    v1.1/splits/flood_handlabeled/flood_{train,valid,test,bolivia}_data.csv         rows NAME_S1Hand.tif,NAME_LabelHand.tif
    v1.1/data/flood_events/HandLabeled/S1Hand/NAME_S1Hand.tif                       float32, VV and VH in dB, NaN: no data
                                      S2Hand/NAME_S2Hand.tif                       int16, 13 bands, reflectance x 10000, 0: no data
                                      LabelHand/NAME_LabelHand.tif                 int16, -1: no label, 0: land, 1: water

The TerraMind repository's configurations expect the same files in another order, which is read as well: ``data/S1GRDHand``,
``data/S2L1CHand``, ``data/LabelHand``, and ``splits/flood_{train,valid,test}_data.txt`` with NAMEs.
"""

from __future__ import annotations

import functools
import os

from terramind_jax import modalities
from terramind_jax.tasks.datasets import files, generic
from terramind_jax.tasks.datasets.dataset import Dataset, Facts, Sample

SOURCE = "gs://sen1floods11 (gsutil -m rsync -r gs://sen1floods11 DIR; https://github.com/cloudtostreet/Sen1Floods11)"
SPLITS = {"train": "train", "val": "valid", "test": "test", "bolivia": "bolivia"}
IMAGES = {"S2L1C": "S2Hand", "S1GRD": "S1Hand"}  # what the files are called
PUBLISHED = "data/flood_events/HandLabeled"

BANDS = {"S2L1C": modalities.S2L1C_BANDS, "S1GRD": ("VV", "VH")}

# Mean and standard deviation: PANGAEA, configs/dataset/sen1floods11.yaml.
FACTS = Facts(
    title="Sen1Floods11",
    task="segmentation",
    bands=BANDS,
    class_names=("land", "water"),
    ignore_index=-1,
    mean={
        "S2L1C": (
            *(1626.91600224, 1396.03470631, 1364.06118417, 1218.22847919, 1466.07290663, 2386.90297537, 2845.61256277),
            *(2622.95796892, 3077.48221481, 486.87436782, 63.77861008, 2030.64763024, 1179.16607221),
        ),
        "S1GRD": (-10.184408, -16.895273),
    },
    std={
        "S2L1C": (
            *(700.17133846, 739.09452682, 735.2482388, 864.936695, 776.8803358, 921.36834309, 1084.37346097),
            *(1022.63418007, 1196.44255318, 336.61105431, 143.99923282, 980.87061347, 764.60836557),
        ),
        "S1GRD": (4.255339, 5.290568),
    },
    files={m: files.bands(m, names) for m, names in BANDS.items()},
)


def check(root: str | os.PathLike) -> None:
    """Raises a FileNotFoundError that tells what is not there and where to get it."""
    folders, splits = _layout(files.base(root, "v1.1"))
    parts = [*folders.values(), *(splits.format(name) for name in ("train", "valid", "test"))]
    files.require(FACTS.title, files.base(root, "v1.1"), parts, SOURCE)


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The chips of ``train``, ``val``, ``test``, or ``bolivia``, an event that the others lack."""
    check(root)
    if split not in SPLITS:
        raise ValueError(f"Sen1Floods11 has no split {split!r}; it has {', '.join(SPLITS)}.")
    root = files.base(root, "v1.1")
    folders, splits = _layout(root)
    path = os.path.join(root, splits.format(SPLITS[split]))
    rows = files.read_rows(path) if path.endswith(".csv") else [[name] for name in files.split_names(path)]
    names = [row[0].removesuffix("_S1Hand.tif").removesuffix("_S2Hand.tif") for row in rows]
    samples = tuple(_sample(root, folders, name) for name in names)
    files.check_present(((s.name, p) for s in samples for p in (*s.inputs.values(), s.target)), path)
    read_target = functools.partial(generic.read_map, task=FACTS.task, ignore_index=FACTS.ignore_index)
    return Dataset(FACTS, split, samples, functools.partial(generic.read_images, FACTS.files), read_target)


def _layout(root: str) -> tuple[dict[str, str], str]:
    """Folders by modality and of the labels, and the split files."""
    if os.path.isdir(os.path.join(root, "data", "LabelHand")):
        return {"S2L1C": "data/S2L1CHand", "S1GRD": "data/S1GRDHand", "label": "data/LabelHand"}, "splits/flood_{}_data.txt"
    folders = {m: f"{PUBLISHED}/{folder}" for m, folder in IMAGES.items()} | {"label": f"{PUBLISHED}/LabelHand"}
    return folders, "splits/flood_handlabeled/flood_{}_data.csv"


def _sample(root: str, folders: dict[str, str], name: str) -> Sample:
    inputs = {m: os.path.join(root, folders[m], f"{name}_{suffix}.tif") for m, suffix in IMAGES.items()}
    return Sample(name, inputs, os.path.join(root, folders["label"], f"{name}_LabelHand.tif"))
