"""How far a generated modality is from the truth. NumPy, float64, on the host; used by training, generation and tasks.

Arrays are channels last: images ``[H, W, C]`` or ``[B, H, W, C]`` in the modality's unit, class maps ``[..., H, W]``. PSNR and SSIM need
a `data_range`, the span of values that counts as full scale; there is no default, because a number without it says nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
KNN_QUERIES = 1024  # at a time: their distances to all else are in memory
SSIM_K1, SSIM_K2 = 0.01, 0.03
DATA_RANGE = {"S2L2A": 10_000.0, "S1GRD": 40.0, "S1RTC": 40.0, "DEM": 4000.0, "NDVI": 2.0}  # full scale as used here, in the unit


@dataclasses.dataclass
class Errors:
    """Sums from which MAE, RMSE, PSNR, SSIM and bias of everything added so far follow: RMSE is over all pixels, not a mean over images.

    The sum of two, such as those of two bands, is that of all they were given.
    """

    data_range: float
    pixels: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    signed: float = 0.0
    images: int = 0
    ssim_sum: float = 0.0

    def __post_init__(self) -> None:
        if not self.data_range > 0:
            raise ValueError(f"data_range is {self.data_range}; expected a positive span in the modality's unit.")

    def add(self, prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray | None = None) -> Errors:
        """Adds one image ``[H, W, C]`` or several ``[B, H, W, C]``; `valid` ``[(B,) H, W]`` marks the pixels that count. Returns self."""
        prediction, truth = _pair(prediction, truth)
        valid = _valid(valid, truth.shape[:-1])
        difference = prediction[valid] - truth[valid]
        self.pixels += difference.size
        self.absolute += float(np.abs(difference).sum())
        self.squared += float(np.square(difference).sum())
        self.signed += float(difference.sum())
        images = (x.reshape(-1, *truth.shape[-3:]) for x in (prediction, truth))
        for p, t, v in zip(*images, valid.reshape(-1, *valid.shape[-2:]), strict=True):
            similarity = ssim(p, t, data_range=self.data_range, valid=v)
            if not math.isnan(similarity):
                self.images += 1
                self.ssim_sum += similarity
        return self

    def __add__(self, other: Errors) -> Errors:
        if other.data_range != self.data_range:
            raise ValueError(f"Errors of the full scales {self.data_range} and {other.data_range} cannot be added.")
        sums = (f.name for f in dataclasses.fields(self) if f.name != "data_range")
        return Errors(self.data_range, **{name: getattr(self, name) + getattr(other, name) for name in sums})

    @property
    def mae(self) -> float:
        return self.absolute / self.pixels if self.pixels else math.nan

    @property
    def rmse(self) -> float:
        return math.sqrt(self.squared / self.pixels) if self.pixels else math.nan

    @property
    def bias(self) -> float:
        """Mean of prediction minus truth."""
        return self.signed / self.pixels if self.pixels else math.nan

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB, of the RMSE over all pixels; infinite where nothing differs."""
        return psnr(self.rmse, self.data_range)

    @property
    def ssim(self) -> float:
        """Mean over images."""
        return self.ssim_sum / self.images if self.images else math.nan


def mae(prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Mean absolute error over the pixels that `valid` ``[..., H, W]`` marks, NaN if none."""
    prediction, truth = _pair(prediction, truth)
    difference = np.abs(prediction - truth)[_valid(valid, truth.shape[:-1])]
    return float(difference.mean()) if difference.size else math.nan


def rmse(prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Root mean squared error over the pixels that `valid` ``[..., H, W]`` marks, NaN if none."""
    prediction, truth = _pair(prediction, truth)
    difference = np.square(prediction - truth)[_valid(valid, truth.shape[:-1])]
    return math.sqrt(difference.mean()) if difference.size else math.nan


def psnr(rmse: float, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB of a root mean squared error."""
    return math.inf if rmse == 0 else 20 * math.log10(data_range / rmse)


def ssim(prediction: np.ndarray, truth: np.ndarray, *, data_range: float, valid: np.ndarray | None = None) -> float:
    """Structural similarity of two images ``[H, W, C]``, a mean over channels and windows.

    Wang et al. 2004: Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, population moments, windows inside the image
    only. With `valid` ``[H, W]`` only windows without an invalid pixel count; NaN if there is none.
    """
    prediction, truth = _pair(prediction, truth)
    if truth.ndim != 3 or min(truth.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"SSIM compares images [H, W, C] of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels; got {truth.shape}.")
    if valid is not None:
        valid = np.asarray(valid, bool)
        prediction, truth = (np.where(valid[..., None], x, 0) for x in (prediction, truth))
    mean_p, mean_t = _blur(prediction), _blur(truth)
    var_p, var_t = _blur(prediction**2) - mean_p**2, _blur(truth**2) - mean_t**2
    covariance = _blur(prediction * truth) - mean_p * mean_t
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    similarity = (2 * mean_p * mean_t + c1) * (2 * covariance + c2) / ((mean_p**2 + mean_t**2 + c1) * (var_p + var_t + c2))
    if valid is None:
        return float(similarity.mean())
    whole = _windows(valid.astype(np.float64)[..., None], np.ones(SSIM_WINDOW))[..., 0] > SSIM_WINDOW**2 - 0.5
    return float(similarity[whole].mean()) if whole.any() else math.nan


def gaussian() -> np.ndarray:
    """Weights ``[11]`` of a window of SSIM along one axis."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    return weights / weights.sum()


def _blur(x: np.ndarray) -> np.ndarray:
    return _windows(x, gaussian())


def _windows(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Separable weighted sums over the windows that lie inside: ``[H, W, C]`` -> ``[H - 10, W - 10, C]``."""
    for axis in (0, 1):
        size = x.shape[axis] - len(weights) + 1
        x = sum(w * np.take(x, range(i, i + size), axis=axis) for i, w in enumerate(weights))
    return x


def spectral_angle(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Angle in degrees between the spectra of each pixel, ``[..., C]`` -> ``[...]``: blind to brightness. NaN where one is all zero."""
    prediction, truth = _pair(prediction, truth)
    lengths = np.linalg.norm(prediction, axis=-1) * np.linalg.norm(truth, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.degrees(np.arccos(np.clip((prediction * truth).sum(-1) / lengths, -1, 1)))


# ---- classes ----


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int, ignore: int | None = None) -> np.ndarray:
    """Counts ``[num_classes, num_classes]`` int64: row = true class, column = predicted class. Add the matrices of several images.

    Pixels whose truth is `ignore` do not count. A class outside ``0 ... num_classes - 1`` is a ValueError.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"Prediction has shape {prediction.shape} but the truth {truth.shape}.")
    counted = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    prediction, truth = prediction[counted].astype(np.int64), truth[counted].astype(np.int64)
    for name, classes in (("prediction", prediction), ("truth", truth)):
        if classes.size and (classes.min() < 0 or classes.max() >= num_classes):
            raise ValueError(f"The {name} holds classes from {classes.min()} to {classes.max()}; expected 0-{num_classes - 1}.")
    return np.bincount(truth * num_classes + prediction, minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """IoU a class ``[K]``; NaN for classes that do not occur in the truth."""
    return np.where(confusion.sum(1) > 0, scores_by_class(confusion)["IoU"], np.nan)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the classes that occur in the truth; NaN for an empty matrix.

    A class that is only predicted counts through the pixels it takes from the others.
    """
    present = confusion.sum(1) > 0
    return float(intersection_over_union(confusion)[present].mean()) if present.any() else math.nan


def accuracy(confusion: np.ndarray) -> float:
    """Share of pixels with the right class; NaN for an empty matrix."""
    return float(np.trace(confusion) / confusion.sum()) if confusion.sum() else math.nan


def class_scores(confusion: np.ndarray, ignore: int | None = None, *, absent: bool = False) -> dict[str, float]:
    """``mIoU``, ``F1`` and ``accuracy``, means over the classes of truth or prediction, as torchmetrics has them, and ``pixel_accuracy``.

    A class that is only predicted is one of them, with 0; in `mean_iou` it is not. With `absent` so is one that neither has, as in PANGAEA.
    `ignore` is a class that is none of them. Where it is predicted, as PASTIS-R's void may be, torchmetrics still counts it in F1 and
    accuracy, with 0, though not in mIoU: there both are lower than here.
    """
    counted = (confusion.sum(1) + confusion.sum(0) > 0) | absent
    if ignore is not None and 0 <= ignore < len(confusion):
        counted[ignore] = False
    each = {"mIoU" if name == "IoU" else name: of for name, of in scores_by_class(confusion).items()}
    found = {name: float(of[counted].mean()) if counted.any() else math.nan for name, of in each.items()}
    return {**found, "pixel_accuracy": accuracy(confusion)}


def scores_by_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """``IoU``, ``F1`` and ``accuracy`` of every class, ``[K]``; 0 of one that neither truth nor prediction has."""
    counts = confusion.astype(np.float64)
    hit, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    iou, f1 = hit / np.maximum(true + predicted - hit, 1), 2 * hit / np.maximum(true + predicted, 1)
    return {"IoU": iou, "F1": f1, "accuracy": hit / np.maximum(true, 1)}


def knn_accuracy(features: np.ndarray, labels: np.ndarray, k: int = 20, temperature: float = 0.07) -> float:
    """Share of rows of `features` ``[N, D]`` whose label ``[N]`` the `k` others nearest to them vote for, leaving each out in turn.

    Votes as in `knn_labels`. A ValueError for fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"There are {len(features)} samples; nearest neighbours need two.")
    cosine = cosines(features, features)
    np.fill_diagonal(cosine, -np.inf)
    return float((_voted(cosine, labels, min(k, len(features) - 1), temperature) == labels).mean())


def knn_labels(queries: np.ndarray, features: np.ndarray, labels: np.ndarray, k: int = 20, temperature: float = 0.07) -> np.ndarray:
    """The label ``[Q]`` that the `k` rows of `features` ``[N, D]`` nearest to each query ``[Q, D]`` vote for.

    Votes are weighted with ``exp(cosine / temperature)``; `k` and `temperature` are DINO's (arXiv 2104.14294).
    """
    parts = np.array_split(queries, -(-len(queries) // KNN_QUERIES))
    return np.concatenate([_voted(cosines(part, features), labels, min(k, len(features)), temperature) for part in parts])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``[A, D]``, ``[B, D]`` -> cosine of every pair ``[A, B]``."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T


def _voted(cosine: np.ndarray, labels: np.ndarray, k: int, temperature: float) -> np.ndarray:
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    weights = np.exp(np.take_along_axis(cosine, nearest, axis=1) / temperature)
    votes = weights[:, :, None] * (labels[nearest][:, :, None] == np.unique(labels))
    return np.unique(labels)[votes.sum(1).argmax(1)]


def jump(image: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Mean absolute difference of neighbouring pixels of ``[H, W, C]`` across the lines above `rows` and left of `columns`, all >= 1.

    Of class maps, ``[H, W]`` integers, the share of neighbours that differ. NaN without lines. A scene that windows were joined to has no
    seams if this is the same across their borders and across other lines that lie on the grid of patches alike (`seam_score`).
    """
    differ = np.not_equal if image.ndim == 2 else lambda a, b: np.abs(np.subtract(a, b, dtype=np.float64))
    rows, columns = np.asarray(rows, int), np.asarray(columns, int)
    across = [differ(image[rows], image[rows - 1]).ravel(), differ(image[:, columns], image[:, columns - 1]).ravel()]
    found = np.concatenate(across)
    return float(np.nanmean(found)) if found.size else math.nan


def seam_score(image: np.ndarray, borders: tuple[Sequence[int], Sequence[int]], others: tuple[Sequence[int], Sequence[int]]) -> float:
    """The `jump` across `borders` of windows, (rows, columns), over that across `others`: 1 is no seam, more a visible one."""
    return jump(image, *borders) / jump(image, *others)


def _pair(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = np.asarray(prediction, np.float64), np.asarray(truth, np.float64)
    if prediction.shape != truth.shape:
        raise ValueError(f"Prediction has shape {prediction.shape} but the truth {truth.shape}.")
    return prediction, truth


def _valid(valid: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if valid is None:
        return np.ones(shape, bool)
    if np.shape(valid) != shape:
        raise ValueError(f"The mask of valid pixels has shape {np.shape(valid)}, expected {shape}.")
    return np.asarray(valid, bool)
