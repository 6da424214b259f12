"""What a downstream data set is: samples with inputs in physical units and a target, checked as they are read."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax import modalities
from terramind_jax.tasks.datasets.files import Bands

# What a target is: int32 [H, W] class of a pixel; float32 [H, W] value of a pixel; int class of the image; float32 [K] of 0 and 1, classes
# of the image; float value of the image.
TASKS = ("segmentation", "regression", "classification", "multilabel", "scalar_regression")
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What holds for every sample.

    Sentinel-2 is given as reflectance x 10000 and radar in dB, as TerraMind's own statistics have it, however the files store it.
    `mean` and `std`, a value a band, are the data set's own in that unit, where they are published.
    """

    title: str
    task: str
    bands: Mapping[str, tuple[str, ...]]  # of each modality's arrays, in their order
    class_names: tuple[str, ...] = ()
    ignore_index: int | None = None  # of pixels that count neither in a loss nor in a metric
    mean: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    std: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    has_times: bool = False  # inputs are time series
    files: Mapping[str, Bands] = dataclasses.field(default_factory=dict)  # how they are read, of modalities that have one file a sample

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def only(self, modalities: Sequence[str]) -> Facts:
        """With those inputs alone."""
        unknown = [m for m in modalities if m not in self.bands]
        if unknown or not modalities:
            what = f"{unknown[0]} is none" if unknown else "at least one is needed"
            raise ValueError(f"The inputs of {self.title} are {', '.join(self.bands)}; {what}.")
        return dataclasses.replace(self, **{key: _those(getattr(self, key), modalities) for key in ("bands", "mean", "std", "files")})


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample before it is read: where its inputs and its target are, in whatever form the data set's functions read."""

    name: str
    inputs: Any
    target: Any
    dates: Mapping[str, np.ndarray] | None = None  # of time series: int32 [T] days since the data set's reference date


def _as_read(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return inputs


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split of a data set; ``dataset[i]`` is ``{"inputs", "target", "name"}``, and ``"dates"`` where there are time series.

    Inputs are ``{modality: [H, W, C]}`` float32, time series ``[T, H, W, C]``; see `TASKS` for targets. It can be sent to other processes.
    Reading raises ValueError for a mask of another size than its image and labels beyond the classes.
    """

    facts: Facts
    split: str
    samples: tuple[Sample, ...]
    read_inputs: Callable[[Sample], dict[str, np.ndarray]]
    read_target: Callable[[Sample], Any]
    route: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = _as_read  # what is read to inputs, each pixel alone

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"The {self.split} split of {self.facts.title} is empty; it needs at least one sample.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = self.unrouted(i)
        return {**sample, "inputs": self.route(sample["inputs"])}

    def unrouted(self, i: int) -> dict[str, Any]:
        """Sample `i` with the inputs that `route` takes, of which a crop costs less to route."""
        sample = self.samples[i]
        inputs = self.read_inputs(sample)
        target = self.target(i)
        _check_sizes(sample.name, inputs, target)
        for modality, image in inputs.items():
            check_class_map(sample.name, modality, image)
        dates = {} if sample.dates is None else {"dates": dict(sample.dates)}
        return {"inputs": inputs, "target": target, "name": sample.name, **dates}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def image_size(self) -> tuple[int, int]:
        """Height and width of the first sample's images, which are read."""
        height, width = next(iter(self.unrouted(0)["inputs"].values())).shape[-3:-1]
        return height, width

    def length(self) -> int:
        """Images of the first sample's time series, which are read; 0 of single images."""
        first = next(iter(self.unrouted(0)["inputs"].values()))
        return len(first) if first.ndim == 4 else 0

    def target(self, i: int) -> Any:
        """The target of sample `i` alone, its classes checked; the images are not read."""
        target = self.read_target(self.samples[i])
        check_classes(self.facts, self.samples[i].name, target)
        return target

    def select(self, indices: Sequence[int]) -> Dataset:
        """Those samples, in that order."""
        return dataclasses.replace(self, samples=tuple(self.samples[int(i)] for i in indices))

    def only(self, modalities: Sequence[str]) -> Dataset:
        """With those inputs alone; the others are not read."""
        facts = self.facts.only(modalities)
        if len(self.facts.bands) == 1:
            return self
        samples = (dataclasses.replace(s, inputs=_those(s.inputs, modalities), dates=_those(s.dates, modalities)) for s in self.samples)
        return dataclasses.replace(self, facts=facts, samples=tuple(samples))

    num_classes = property(lambda self: self.facts.num_classes)
    class_names = property(lambda self: self.facts.class_names)
    ignore_index = property(lambda self: self.facts.ignore_index)
    names = property(lambda self: tuple(sample.name for sample in self.samples))


def _those(values: Mapping[str, Any] | None, modalities: Sequence[str]) -> dict[str, Any] | None:
    return None if values is None else {m: values[m] for m in modalities if m in values}


# ---- checks ----


def _check_sizes(name: str, inputs: Mapping[str, np.ndarray], target: Any) -> None:
    sizes = {modality: image.shape[-3:-1] for modality, image in inputs.items()}
    first, size = next(iter(sizes.items()))
    for modality, other in sizes.items():
        if other != size:
            raise ValueError(f"The {modality} of {name} is {_size(other)} pixels and its {first} {_size(size)}; expected one size.")
    if np.ndim(target) == 2 and target.shape != size:
        raise ValueError(f"The mask of {name} is {_size(target.shape)} pixels and its {first} {_size(size)}; expected one size.")


def check_class_map(what: str, modality: str, x: np.ndarray) -> None:
    """Raises a ValueError if an image of `modality`, which `what` has, should hold its classes and does not; others pass."""
    known = modalities.MODALITIES.get(modality)
    if known is None or known.kind != "classes":
        return
    if not np.isin(x, range(known.channels)).all():
        wrong = x[~np.isin(x, range(known.channels))][0]
        raise ValueError(f"{what} has {wrong:g} in its {modality}; classes are 0-{known.channels - 1}: {', '.join(known.classes)}.")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def check_classes(facts: Facts, name: str, target: Any) -> None:
    """Raises a ValueError for labels beyond the class count, or a vector of labels of another length."""
    if facts.task == "multilabel" and np.shape(target) != (facts.num_classes,):
        raise ValueError(f"{name} has labels of shape {np.shape(target)}; {facts.title} has {facts.num_classes} classes.")
    if facts.task not in ("segmentation", "classification"):
        return
    wrong = np.unique(target)
    wrong = wrong[((wrong < 0) | (wrong >= facts.num_classes)) & (wrong != facts.ignore_index)]
    if len(wrong):
        known = f"0-{facts.num_classes - 1}" + ("" if facts.ignore_index is None else f" and {facts.ignore_index} for none")
        raise ValueError(f"{name} has the label {wrong[-1]}, but the {facts.num_classes} classes of {facts.title} are {known}.")


def class_counts(dataset: Dataset) -> np.ndarray:
    """How many pixels, or images, of each class there are, ``[num_classes]`` int64; reads every target.

    Warns of classes that never occur: nothing can be learned of them, and metrics leave them out.
    """
    counts = sum(_counts(dataset, i) for i in range(len(dataset)))
    absent = [name for k, name in enumerate(dataset.class_names) if not counts[k] and k != dataset.ignore_index]
    if absent:
        warnings.warn(f"No sample of the {dataset.split} split of {dataset.facts.title} holds: {', '.join(absent)}.", stacklevel=2)
    return counts


def strata(dataset: Dataset, bins: int) -> np.ndarray:
    """The stratum of every sample, ``[N]`` integers from 0, as PANGAEA draws limited labels; reads every target.

    Samples of one stratum have the same classes, each with a share in the same of the `bins` ]0, 1/bins], ... ]1 - 1/bins, 1]. Pixels
    without a label do not count. Raises ValueError for a task without classes, or with several an image.
    """
    if dataset.facts.task not in ("segmentation", "classification"):
        raise ValueError(f"{dataset.facts.title} has no strata, as a {dataset.facts.task}; only segmentation and classification have them.")
    counts = np.stack([_counts(dataset, i) for i in range(len(dataset))])
    shares = -(-bins * counts // np.maximum(1, counts.sum(1, keepdims=True)))  # 0: absent
    return np.unique(shares, axis=0, return_inverse=True)[1].reshape(-1)


def _counts(dataset: Dataset, i: int) -> np.ndarray:
    """Pixels of each class in sample `i`, or whether its image has the class, ``[num_classes]`` int64."""
    target = np.asarray(dataset.target(i))
    if dataset.facts.task == "multilabel":
        return target.astype(np.int64)
    return np.bincount(target[target != dataset.ignore_index].astype(np.int64).ravel(), minlength=dataset.num_classes)


def statistics(dataset: Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``{modality: (mean, standard deviation)}`` a band, ``[C]`` float32, over all pixels of a split; reads every image."""
    sums: dict[str, np.ndarray] = {}
    for sample in dataset.samples:
        for modality, image in dataset.route(dataset.read_inputs(sample)).items():
            flat = image.reshape(-1, image.shape[-1]).astype(np.float64)
            sums[modality] = sums.get(modality, 0) + np.stack([np.full(flat.shape[1], len(flat)), flat.sum(0), np.square(flat).sum(0)])
    found = {}
    for modality, (count, total, squares) in sums.items():
        mean = total / count
        found[modality] = mean.astype(np.float32), np.sqrt(np.maximum(squares / count - mean**2, 0)).astype(np.float32)
    return found
