"""How far a generated modality is from the truth: of images band by band, of class maps class by class, and at the borders of windows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from terramind_jax import metrics, modalities
from terramind_jax.train import reconstruction

Lines = tuple[Sequence[int], Sequence[int]]  # first rows and first columns after a line that is looked across


@dataclasses.dataclass
class Scores:
    """Sums over everything added: errors by band of an image, else a confusion matrix. `scores_of` makes an empty one."""

    modality: str
    bands: dict[str, metrics.Errors] = dataclasses.field(default_factory=dict)
    confusion: np.ndarray | None = None
    angles: float = 0.0  # of spectra, degrees
    spectra: int = 0
    jumps: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # across borders of windows, and across other lines

    def add(self, made: np.ndarray, truth: np.ndarray, valid: np.ndarray | None = None, lines: tuple[Lines, Lines] | None = None) -> Scores:
        """Adds one image ``[H, W, C]`` in the modality's unit, or class map ``[H, W]``. Returns self.

        Args:
          valid: ``[H, W]``, which pixels count; None: all.
          lines: borders of the windows that `made` was joined from, and lines to compare them with, see `metrics.seam_score`.
        """
        valid = np.ones(truth.shape[:2], bool) if valid is None else valid
        if self.confusion is not None:
            self.confusion += metrics.confusion_matrix(made[valid], truth[valid], len(self.confusion))
        for i, errors in enumerate(self.bands.values()):
            errors.add(made[..., i : i + 1], truth[..., i : i + 1], valid)
        if is_spectral(self.modality):
            angles = metrics.spectral_angle(made[valid], truth[valid])
            self.angles, self.spectra = self.angles + float(np.nansum(angles)), self.spectra + int(np.isfinite(angles).sum())
        if lines is not None:
            self.jumps.append(tuple(metrics.jump(made, *of) for of in lines))
        return self

    @property
    def errors(self) -> metrics.Errors | None:
        """Of all bands; None of class maps."""
        first, *others = self.bands.values() or [None]
        return sum(others, start=first) if first else None

    @property
    def part(self) -> str:
        """What it has parts by."""
        return "band" if self.confusion is None else "class"

    @property
    def is_empty(self) -> bool:
        return not (self.errors.pixels if self.confusion is None else self.confusion.sum())

    @property
    def spectral_angle(self) -> float:
        """Mean over pixels in degrees; NaN where a modality has no spectrum."""
        return self.angles / self.spectra if self.spectra else math.nan

    @property
    def seam(self) -> float:
        """1: borders of windows are no rougher than other lines; NaN without borders."""
        known = [pair for pair in self.jumps if not any(map(math.isnan, pair))]
        borders, others = np.mean(known, axis=0) if known else (math.nan, math.nan)
        return float(borders / others)


def scores_of(modality: str) -> Scores:
    """Nothing added yet."""
    m = modalities.get(modality)
    if m.kind == "classes":
        return Scores(modality, confusion=np.zeros((len(m.classes),) * 2, np.int64))
    full_scale = float(reconstruction.data_range(modality).max())
    return Scores(modality, {band: metrics.Errors(full_scale) for band in m.bands})


def is_spectral(modality: str) -> bool:
    """Whether the bands of a pixel make a spectrum: radar in dB and single bands do not."""
    m = modalities.get(modality)
    return m.kind == "continuous" and len(m.bands) > 1


def summary(scores: Scores) -> dict[str, float]:
    """The numbers of all bands, or of all classes, by name."""
    own = {"spectral angle": scores.spectral_angle, "seam": scores.seam}
    if scores.confusion is None:
        return {**of_errors(scores.errors), **own}
    return {"mIoU": metrics.mean_iou(scores.confusion), "accuracy": metrics.accuracy(scores.confusion), **own}


def parts(scores: Scores) -> dict[str, dict[str, float]]:
    """The numbers of each band where there are several, or the IoU of each class that occurs."""
    if scores.confusion is None:
        return {band: of_errors(errors) for band, errors in scores.bands.items()} if len(scores.bands) > 1 else {}
    each = zip(modalities.get(scores.modality).classes, metrics.intersection_over_union(scores.confusion), strict=True)
    return {name: {"IoU": float(iou)} for name, iou in each if not math.isnan(iou)}


def of_errors(errors: metrics.Errors) -> dict[str, float]:
    return {"MAE": errors.mae, "RMSE": errors.rmse, "PSNR": errors.psnr, "SSIM": errors.ssim, "bias": errors.bias}
