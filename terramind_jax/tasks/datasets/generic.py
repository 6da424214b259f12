"""A data set of a user's own: a folder a modality, masks or a table of labels, and a file a split, all told in a few fields.

The fields are those that TerraTorch's GenericMultiModalDataModule takes, one set for all splits:

    dataset("floods", "train",
            images={"S2L1C": {"folder": "S2Hand", "pattern": "*_S2Hand.tif"}, "S1GRD": {"folder": "S1Hand", "pattern": "*_S1Hand.tif"}},
            labels={"folder": "LabelHand", "pattern": "*_LabelHand.tif"},
            splits={"train": "train.txt", "val": "valid.txt", "test": "test.txt"}, class_names=("land", "water"))
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from terramind_jax import modalities
from terramind_jax.tasks.datasets import files
from terramind_jax.tasks.datasets.dataset import SPLITS, TASKS, Dataset, Facts, Sample

_IMAGE_FIELDS = ("folder", "pattern", "bands", "use", "scale", "mean", "std", "missing", "replace", "times", "by_band")
_LABEL_FIELDS = ("folder", "pattern", "table", "zero_is_none", "codes", "scale")
IGNORE = -1


def dataset(
    root: str | os.PathLike,
    split: str = "train",
    *,
    images: Mapping[str, Mapping[str, Any]] = {},
    labels: Mapping[str, Any] = {},
    splits: Mapping[str, str] | None = None,
    task: str = "segmentation",
    class_names: Sequence[str] = (),
    num_classes: int | None = None,
    ignore_index: int | Literal["auto"] | None = "auto",
    title: str = "the data set",
    source: str = "",
) -> Dataset:
    """A split of the data in `root`, to which folders and files are relative; see the module.

    Args:
      images: fields by modality. ``folder`` and ``pattern`` tell the files: the sample's name in the place of ``*``. ``folder`` may be
        ``{split: folder}``. ``bands`` are those of the files, the modality's own by default, and ``use`` those wanted, in their order.
        Values are multiplied by ``scale``; ``replace`` (0), in the file's unit, stands where there is no data: NaN, the file's own
        nodata, or one of ``missing``. ``mean`` and ``std`` are the data's own, a value a used band. A file of ``times`` images becomes
        ``[T, H, W, C]``; ``by_band`` if it has all times of one band together. ``.npy`` files are ``[C, H, W]`` or ``[T, C, H, W]``.
      labels: ``folder`` and ``pattern`` of the masks, or ``table``, a ``.csv``, which may be told by split, with a heading whose first
        column are the samples' names and whose others are the label: a class by number or name, a value, or 0 and 1 for every class. With
        ``zero_is_none`` stored classes count from 1; with ``codes``, such as ``(0, 255)``, each is stored as the code in its place. Values
        of a regression are multiplied by ``scale``.
      splits: by split the file with its samples, ``.txt`` or ``.csv``; without, every file of the first modality's folder is a sample.
      class_names, num_classes: either will do.
      ignore_index: of pixels without a label, in masks and in metrics; by default -1 among classes; among values there is none, but NaN and
        the file's own nodata do not count.
      source: where to get the data, for what is said if folders or split files are not there.

    Raises:
      ValueError: unknown fields, bands or task, a split without samples; FileNotFoundError: a folder, split file or sample is not there.
    """
    root = os.fspath(root)
    own = dict(images=images, labels=labels, task=task, class_names=class_names, num_classes=num_classes)
    known = facts(**own, ignore_index=ignore_index, title=title)
    if source:
        files.require(title, root, _parts(images, labels, splits, split), source, _parts(images, labels, splits))
    found, where = _names(root, split, images, splits)
    paths = {name: {m: files.path_of(_of_split(root, f["folder"], split), f["pattern"], name) for m, f in images.items()} for name in found}
    if "table" in labels:
        table = _of_split(root, labels["table"], split)
        targets = _table(table, task, known.class_names)
        _check_rows(targets, found, where, os.path.relpath(table, root))
        read_target = given
    else:
        targets = {name: files.path_of(_of_split(root, labels["folder"], split), labels["pattern"], name) for name in found}
        files.check_present(targets.items(), where)
        options = dict(zero_is_none=labels.get("zero_is_none", False), codes=tuple(labels.get("codes", ())), scale=labels.get("scale", 1.0))
        read_target = functools.partial(read_map, task=task, ignore_index=known.ignore_index, **options)
    files.check_present(((name, path) for name, of in paths.items() for path in of.values()), where)
    samples = tuple(Sample(name, paths[name], targets[name]) for name in found)
    return Dataset(known, split, samples, functools.partial(read_images, known.files), read_target)


def facts(
    *,
    images: Mapping[str, Mapping[str, Any]] = {},
    labels: Mapping[str, Any] = {},
    splits: Mapping[str, str] | None = None,
    task: str = "segmentation",
    class_names: Sequence[str] = (),
    num_classes: int | None = None,
    ignore_index: int | Literal["auto"] | None = "auto",
    title: str = "the data set",
    source: str = "",
) -> Facts:
    """What the fields of `dataset` say, without any file."""
    _check_fields(images, labels, task)
    names = _class_names(class_names, num_classes, task)
    _check_codes(labels, names, task)
    statistics = {key: {m: tuple(f[key]) for m, f in images.items() if f.get(key)} for key in ("mean", "std")}
    how = {m: _bands(m, fields) for m, fields in images.items()}
    if ignore_index == "auto":
        ignore_index = None if "regression" in task else IGNORE
    has_times = any(of.times > 1 for of in how.values())
    return Facts(title, task, {m: of.use for m, of in how.items()}, names, ignore_index, has_times=has_times, files=how, **statistics)


# ---- reading ----


def read_images(how: Mapping[str, files.Bands], sample: Sample) -> dict[str, np.ndarray]:
    """The inputs of a sample that has one file a modality."""
    return {modality: files.read_image(path, how[modality]) for modality, path in sample.inputs.items()}


def read_map(
    sample: Sample,
    *,
    task: str,
    ignore_index: int | None,
    zero_is_none: bool = False,
    codes: Sequence[float] = (),
    scale: float = 1.0,
) -> np.ndarray:
    """The target of a sample that has a mask; a value that is not known is NaN if it has no `ignore_index`."""
    nothing = math.nan if ignore_index is None and task == "regression" else ignore_index
    mask = files.read_mask(sample.target, nothing, zero_is_none=zero_is_none, codes=codes)
    if task == "segmentation":
        return mask.astype(np.int32)
    return mask if scale == 1 else np.where(mask == nothing, mask, mask * np.float32(scale))


def given(sample: Sample) -> Any:
    """The target of a sample that has none in a file."""
    return sample.target


# ---- fields ----


def _check_fields(images: Mapping[str, Mapping], labels: Mapping, task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}; known are {', '.join(TASKS)}.")
    if not images:
        raise ValueError("A data set needs images of at least one modality.")
    for what, fields, known in [("labels", labels, _LABEL_FIELDS), *((m, f, _IMAGE_FIELDS) for m, f in images.items())]:
        unknown = [key for key in fields if key not in known]
        if unknown:
            raise ValueError(f"{what} has no field {unknown[0]!r}; known are {', '.join(known)}.")
        if "table" not in fields and not (fields.get("folder") is not None and "*" in fields.get("pattern", "")):
            raise ValueError(f"{what} needs a folder and a pattern with a *, such as *_S2.tif.")
    if ("table" in labels) == (task in ("segmentation", "regression")):
        raise ValueError(f"{task} needs labels of {'a table' if 'table' not in labels else 'masks, a folder and a pattern'}.")


def _check_codes(labels: Mapping, class_names: Sequence[str], task: str) -> None:
    codes = labels.get("codes", ())
    if codes and task != "segmentation":
        raise ValueError(f"labels.codes are given for a {task}; only the masks of a segmentation have them.")
    if codes and labels.get("zero_is_none"):
        raise ValueError("labels.codes and labels.zero_is_none are both given; give one of them.")
    if codes and (len(codes) != len(class_names) or len(set(codes)) < len(codes)):
        raise ValueError(f"labels.codes are {', '.join(map(str, codes))}; expected one for each of {len(class_names)} classes.")


def _parts(images: Mapping[str, Mapping], labels: Mapping, splits: Mapping[str, str] | None, split: str | None = None) -> list[str]:
    """The folders, table and split file of a split, relative to the root; without one, of all splits."""
    told = [*(fields["folder"] for fields in images.values()), labels.get("table") or labels["folder"], *([splits] if splits else [])]
    found = [[part] if isinstance(part, str) else part.values() if split is None else [_given(part, split)] for part in told]
    return list(dict.fromkeys(part for parts in found for part in parts))


def _class_names(names: Sequence[str], count: int | None, task: str) -> tuple[str, ...]:
    if names and count not in (None, len(names)):
        raise ValueError(f"num_classes is {count}, but {len(names)} classes are named.")
    if not names and not count and "regression" not in task:
        raise ValueError(f"{task} needs class_names or num_classes.")
    return tuple(names) or tuple(map(str, range(count or 0)))


def _bands(modality: str, fields: Mapping[str, Any]) -> files.Bands:
    options = {key: fields[key] for key in ("scale", "replace", "times", "by_band") if key in fields}
    if "missing" in fields:
        options["missing"] = tuple(fields["missing"])
    how = files.bands(modality, fields.get("bands") or modalities.get(modality).bands, fields.get("use"), **options)
    for key in ("mean", "std"):
        if fields.get(key) and len(fields[key]) != len(how.use):
            raise ValueError(f"{modality} has {len(fields[key])} values of {key} for {len(how.use)} bands ({', '.join(how.use)}).")
    return how


def _of_split(root: str, path: str | Mapping[str, str], split: str) -> str:
    """A folder or table, which may be told by split."""
    return os.path.join(root, path if isinstance(path, str) else _given(path, split))


def _given(paths: Mapping[str, str], split: str) -> str:
    if split not in paths:
        raise ValueError(f"No folder or table is given for the split {split}; those of {', '.join(paths)} are.")
    return paths[split]


def _names(root: str, split: str, images: Mapping[str, Mapping], splits: Mapping[str, str] | None) -> tuple[list[str], str]:
    """The samples of a split, and what names them."""
    patterns = [fields["pattern"] for fields in images.values()]
    folder = next(iter(images.values()))["folder"]
    known = splits if splits is not None else SPLITS if isinstance(folder, str) else folder
    if split not in known:
        raise ValueError(f"There is no split {split!r}; known are {', '.join(known)}.")
    if splits is None:
        folder = _of_split(root, folder, split)
        return files.names_in(folder, patterns[0]), folder
    path = os.path.join(root, splits[split])
    names = files.split_names(path)
    if not names:
        raise ValueError(f"{path} names no sample, so the {split} split is empty; it needs at least one.")
    return [next(filter(None, (files.name_of(name, p) for p in patterns)), name) for name in names], path


def _table(path: str, task: str, class_names: Sequence[str]) -> dict[str, Any]:
    """Targets by sample."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no table of labels {path}.")
    return {row[0]: _label(row[1:], path, row[0], task, class_names) for row in files.read_rows(path)[1:]}


def _label(cells: Sequence[str], path: str, name: str, task: str, class_names: Sequence[str]) -> Any:
    try:
        if task == "multilabel":
            return np.array(cells, np.float32)
        (cell,) = cells
        if task == "classification":
            return class_names.index(cell) if cell in class_names else int(cell)
        return float(cell)
    except ValueError:
        raise ValueError(f"{path} gives {name} the label {','.join(cells)!r}, which is none of a {task}.") from None


def _check_rows(targets: Mapping[str, Any], names: Sequence[str], where: str, table: str) -> None:
    absent = [name for name in names if name not in targets]
    if absent:
        raise FileNotFoundError(f"{where} names {len(absent)} samples without a label in {table}, such as {absent[0]}.")
