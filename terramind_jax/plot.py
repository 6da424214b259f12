"""Pictures: scenes with their inputs, truth and generated modalities, and loss curves. Matplotlib without a display.

A modality is drawn one way everywhere: Sentinel-2 as a stretched true-colour image, radar as VV in dB, elevation as a shaded relief,
land cover in its classes' colours, NDVI from brown to green, and a user's own modality by its first band, or by its classes. A name may
ask for another view of a modality: "S2L2A IRRG", "S1GRD false colour"; see `views`. Within a scene truth and generated share their
colour limits, which come from the truth; those of elevation span both, as a wrong level would be one flat colour otherwise.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LightSource, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from terramind_jax import files, modalities

INK, FAINT = "#222222", "#777777"
PIXEL_METRES = 10.0

LULC_COLOURS = ("#ffffff", "#3a7fc4", "#2f7d3b", "#7bc7a4", "#e8b54d", "#c2342c", "#a59b8f", "#bfe3f5", "#cfc6d8", "#d8d59a")
NDVI_COLOURS = LinearSegmentedColormap.from_list("ndvi", ["#5b4a3f", "#b59b7a", "#efe8cf", "#a6cf70", "#3f9142", "#0d4f24"])
DEM_COLOURS = LinearSegmentedColormap.from_list("dem", ["#3d6f5d", "#86a86b", "#d9cf9a", "#b58a5a", "#8a6a5a", "#f4f1ee"])
CLASS_COLOURS = colormaps["tab20"].colors  # of class maps but land cover, again from the first where they are more
COLOURS = {"NDVI": NDVI_COLOURS, "DEM": DEM_COLOURS, "S1GRD": colormaps["gray"], "S1RTC": colormaps["gray"]}
MIN_RELIEF = 20.0  # metres: flat scenes are not stretched until only noise is left
NDVI_LIMITS = (-0.2, 1.0)
IRRG, FALSE_COLOUR = "IRRG", "false colour"  # views: near infrared, red, green; VV, VH, VV / VH, each stretched
RADAR = ("VV {:.0f}", "{:.0f} dB")  # lowest and highest value beside the colour bar


@dataclasses.dataclass
class Scene:
    """What is drawn of one place. Arrays ``[H, W, C]`` in the modality's unit by user name; LULC also ``[H, W]`` classes or logits."""

    name: str
    inputs: Mapping[str, np.ndarray]
    generated: Mapping[str, np.ndarray]
    truth: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # a line under a generated modality, such as its error

    def limits(self, name: str) -> Limits | None:
        """Of the truth where there is one (for elevation together with what was generated), else of what was generated or given."""
        found = [limits(name, arrays[name]) for arrays in (self.truth, self.generated, self.inputs) if name in arrays]
        return _common(_modality(name), found) if found else None


Limits = tuple[np.ndarray, np.ndarray]  # lowest and highest value displayed, a scalar or one a channel


def _common(modality: str, found: Sequence[Limits | None]) -> Limits | None:
    """Of several images of a modality: those of the first, of elevation what spans all."""
    if modality != "DEM":
        return found[0]
    lows, highs = zip(*found, strict=True)
    return min(lows), max(highs)


# ---- one image ----


def views(name: str) -> tuple[str, ...]:
    """The names under which a scene's picture shows a modality: Sentinel-2 in true colour and IRRG, radar in false colour."""
    modality = _modality(name)
    if modality in ("S2L2A", "S2L1C"):
        return name, f"{name} {IRRG}"
    return (f"{name} {FALSE_COLOUR}",) if modality in ("S1GRD", "S1RTC") else (name,)


def _modality(name: str) -> str:
    return modalities.input_stream(name.partition(" ")[0]).modality


def bands(name: str, image: np.ndarray) -> np.ndarray:
    """What is displayed: ``[H, W, 3]`` colours, or one band ``[H, W]`` (of radar VV), or classes ``[H, W]``."""
    modality, image = _modality(name), np.asarray(image)
    if modalities.get(modality).kind == "classes":
        return image if image.ndim == 2 else image[..., 0] if image.shape[-1] == 1 else image.argmax(-1)
    image = image.astype(np.float32)
    if modality in ("S2L2A", "S2L1C"):
        names = modalities.get(modality).bands
        shown = ("NIR_BROAD", "RED", "GREEN") if name.endswith(f" {IRRG}") else ("RED", "GREEN", "BLUE")
        return image[..., [names.index(band) for band in shown]]
    if name.endswith(f" {FALSE_COLOUR}"):
        return np.stack([image[..., 0], image[..., 1], image[..., 0] - image[..., 1]], axis=-1)  # decibels: a ratio is a difference
    return image if modality == "S2RGB" else image[..., 0]


def limits(name: str, image: np.ndarray) -> Limits | None:
    """Colour limits of an image; None for classes. Elevation keeps at least 20 m, NDVI is always drawn from -0.2 to 1."""
    modality, shown = _modality(name), bands(name, image)
    if modalities.get(modality).kind == "classes":
        return None
    if modality == "NDVI":
        return tuple(np.float32(NDVI_LIMITS))
    if modality == "DEM":
        low, high = np.nanpercentile(shown, [1, 99])
        spread = max(high - low, MIN_RELIEF)
        return (low + high - spread) / 2, (low + high + spread) / 2
    if modality == "S2RGB":
        return np.zeros(3), np.full(3, 255.0)
    if name.endswith(f" {FALSE_COLOUR}"):
        low, high = np.nanpercentile(shown, [2, 98], axis=(0, 1))
        return low, np.maximum(high, low + 1)
    if shown.ndim == 3:  # one stretch for the three bands keeps their hue
        low, high = np.nanpercentile(shown, [1, 98.5])
        return np.full(3, low), np.full(3, max(high, low + 1))
    low, high = np.nanpercentile(shown, [2, 98])
    return low, max(high, low + (1 if modality in modalities.RELEASED else modalities.statistics(modality)[1][0] / 10))


def render(name: str, image: np.ndarray, within: Limits | None = None) -> np.ndarray:
    """An image ``[H, W, C]`` of modality `name` as colours ``[H, W, 3]`` in 0-1, white for NaN; `within`: limits of another image."""
    modality, shown = _modality(name), bands(name, image)
    if modalities.get(modality).kind == "classes":
        return np.array([class_colour(modality, c) for c in range(len(modalities.get(modality).classes))])[shown.astype(int)]
    low, high = within if within is not None else limits(name, image)
    nothing = np.isnan(shown).reshape(*shown.shape[:2], -1).any(-1)
    shown = np.where(np.isnan(shown), low, shown)
    colours = _coloured(modality, shown, low, high)
    colours[nothing] = 1
    return colours


def _coloured(modality: str, shown: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    scaled = np.clip((shown - low) / (high - low), 0, 1)
    if scaled.ndim == 3:
        return scaled if modality == "S2RGB" else scaled ** (1 / 1.25)
    colours = _colours(modality)(scaled)[..., :3]
    if modality != "DEM":
        return colours
    light = LightSource(azdeg=315, altdeg=45)
    exaggeration = max(60 / (high - low), 1.0)  # flat land gets some relief, too
    shade = light.hillshade(np.clip(shown, low, high), vert_exag=exaggeration, dx=PIXEL_METRES, dy=PIXEL_METRES)
    return light.blend_soft_light(colours, shade[..., None])


def class_colour(modality: str, c: int) -> tuple[float, float, float]:
    return to_rgb(LULC_COLOURS[c]) if modality == "LULC" else CLASS_COLOURS[c % len(CLASS_COLOURS)]


def _colours(modality: str):
    """The colour map of a modality that is drawn as one band."""
    return COLOURS.get(modality, colormaps["gray" if modalities.get(modality).kind == "sar" else "viridis"])


# ---- several scenes ----

TILE, GAP, FOOT = 1.75, 0.07, 0.46  # inches: an image, between images, under a scene
LEFT, RIGHT, HEAD = 0.2, 0.2, 0.30
ASIDE = 0.22  # between inputs and outputs
LEGEND = 1.05  # one class in the legend


def contact_sheet(path: str | os.PathLike | None, scenes: Sequence[Scene], *, title: str = "", caption: str = "", dpi: int = 150) -> Figure:
    """Draws each scene's inputs, its truth and below it what was generated. The file type follows from `path`; None: no file is written.

    All scenes must have the same inputs and outputs. A scene without truth takes one row. Notebooks show the figure that is returned.
    """
    if not scenes:
        raise ValueError("There is no scene to draw.")
    inputs, outputs = list(scenes[0].inputs), list(scenes[0].generated)
    for scene in scenes:
        if (list(scene.inputs), list(scene.generated)) != (inputs, outputs):
            raise ValueError(f"Scene {scene.name!r} differs in its inputs or outputs from {scenes[0].name!r}; draw them in two pictures.")
    columns = [*inputs, *outputs]
    width = LEFT + len(columns) * (TILE + GAP) + ASIDE + RIGHT - GAP
    present = [pair for name in dict.fromkeys(columns) for pair in _classes(scenes, name)]
    in_a_row = max(1, int((width - LEFT) / LEGEND))
    legend = 0.14 + 0.2 * math.ceil(len(present) / in_a_row) if present else 0.0
    top, bottom = HEAD + (0.36 if title else 0.0), legend + (0.3 if caption else 0.05)
    sheet = Sheet(width, top + sum(_height(scene) for scene in scenes) + bottom)
    if title:
        sheet.text(LEFT, 0.24, title, size=12.5, weight="bold", ha="left")
    for column, name in enumerate(columns):
        label = f"{name} (input)" if column < len(inputs) else name
        sheet.text(_x(column, inputs) + TILE / 2, top - 0.13, label, size=9.5 if len(label) < 22 else 7.5, weight="bold")
    for scene in scenes:
        _draw_scene(sheet, top, scene)
        top += _height(scene)
    if present:
        _legend(sheet, top + legend / 2 - 0.07, present, in_a_row)
    if caption:
        sheet.text(LEFT, top + legend + 0.13, caption, size=7.5, color=FAINT, ha="left")
    return sheet.save(path, dpi)


def images(
    shown: Mapping[str, np.ndarray | None],
    *,
    columns: int = 5,
    shared: bool = True,
    within: Mapping[str, Limits] | None = None,
    path: str | os.PathLike | None = None,
    dpi: int = 150,
) -> Figure:
    """Draws images ``[H, W, C]`` side by side, in rows of so many `columns`; `path` as of `contact_sheet`.

    Args:
      shown: by what stands above them, which begins with the modality or a view of it: "DEM", "S2L2A IRRG", "LULC of seed 3".
      shared: whether the images of one modality share their colour limits, which come from the first, of elevation from all: for images of
        one place.
      within: colour limits of those images that shall have others.

    None leaves a place empty, whatever its name.
    """
    drawn = {name: image for name, image in shown.items() if image is not None}
    if not drawn or columns < 1:
        raise ValueError(f"There are {len(drawn)} images for {columns} columns; expected one of each at least.")
    rows, columns = math.ceil(len(shown) / columns), min(columns, len(shown))
    width = LEFT + columns * (TILE + GAP) + RIGHT - GAP
    present = sorted({pair for name in drawn for pair in _classes([Scene("", drawn, {})], name)})
    in_a_row = max(1, int((width - LEFT) / LEGEND))
    legend = 0.14 + 0.2 * math.ceil(len(present) / in_a_row) if present else 0.0
    row_height = HEAD + TILE + 0.16
    views = {name: (_modality(name), name.endswith(f" {IRRG}"), name.endswith(f" {FALSE_COLOUR}")) for name in drawn}
    sheet = Sheet(width, rows * row_height + legend + 0.05)
    for i, name in enumerate(shown):
        if name not in drawn:
            continue
        x, y = LEFT + i % columns * (TILE + GAP), i // columns * row_height + HEAD
        alike = [other for other in drawn if views[other] == views[name]] if shared else [name]
        own = (within or {}).get(name) or _common(_modality(name), [limits(other, drawn[other]) for other in alike])
        sheet.text(x + TILE / 2, y - 0.13, name, size=9.5 if len(name) < 22 else 7.5, weight="bold")
        sheet.image(x, y, render(name, drawn[name], own))
        _scale(sheet, x, y + TILE, name, own)
    if present:
        _legend(sheet, rows * row_height + legend / 2 - 0.02, present, in_a_row)
    return sheet.save(path, dpi)


class Sheet:
    """A figure on which things are placed in inches from the upper left corner."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float):
        return self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height))

    def text(self, x: float, y: float, text: str, *, ha: str = "center", va: str = "center", color: str = INK, **style) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, ha=ha, va=va, color=color, **style)

    def image(self, x: float, y: float, pixels: np.ndarray) -> None:
        axes = self.axes(x, y, TILE, TILE)
        axes.imshow(pixels, aspect="equal")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#bbbbbb", linewidth=0.6)

    def save(self, path: str | os.PathLike | None, dpi: int) -> Figure:
        """The file, of the kind that its suffix tells, appears whole or not at all; None: there is none. Returns the figure."""
        if path is not None:
            path, content = files.folder(path), io.BytesIO()
            self.figure.savefig(content, format=path.suffix[1:], dpi=dpi)
            files.write_bytes(path, content.getvalue())
        return self.figure


def _x(column: int, inputs: Sequence[str]) -> float:
    """Left edge of a column; inputs stand apart."""
    return LEFT + column * (TILE + GAP) + (ASIDE if column >= len(inputs) else 0)


def _height(scene: Scene) -> float:
    return (2 if scene.truth else 1) * (TILE + GAP) + FOOT


def _draw_scene(sheet: Sheet, y: float, scene: Scene) -> None:
    rows = [("truth", scene.truth)] if scene.truth else []
    rows.append(("generated", scene.generated))
    for column, (name, image) in enumerate(scene.inputs.items()):
        sheet.image(_x(column, scene.inputs), y, render(name, image))
    beside = y + TILE + (GAP + 0.12 if scene.truth else 0.11)
    sheet.text(_x(0, scene.inputs), beside, scene.name, size=7.5, ha="left", color=FAINT)
    for row, (label, arrays) in enumerate(rows):
        at = y + row * (TILE + GAP)
        sheet.text(_x(len(scene.inputs), scene.inputs) - 0.09, at + TILE / 2, label, size=7.5, rotation=90, color=FAINT)
        for column, name in enumerate(scene.generated, start=len(scene.inputs)):
            if name in arrays:
                sheet.image(_x(column, scene.inputs), at, render(name, arrays[name], scene.limits(name)))
    foot = y + len(rows) * (TILE + GAP)
    for column, name in enumerate(scene.generated, start=len(scene.inputs)):
        _scale(sheet, _x(column, scene.inputs), foot, name, scene.limits(name))
        if name in scene.notes:
            sheet.text(_x(column, scene.inputs) + TILE / 2, foot + 0.22, scene.notes[name], size=7)


def _scale(sheet: Sheet, x: float, y: float, name: str, within: Limits | None) -> None:
    """The colour bar of a modality that is drawn as one band."""
    modality = _modality(name)
    if within is None or np.ndim(within[0]):
        return
    axes = sheet.axes(x + 0.45, y + 0.03, TILE - 0.9, 0.07)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=_colours(modality), aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    known = {"NDVI": ("{:.1f}", "{:.1f}"), "DEM": ("{:.0f}", "{:.0f} m"), "S1GRD": RADAR, "S1RTC": RADAR}
    low, high = known.get(modality, ("{:.3g}", f"{{:.3g}} {modalities.get(modality).unit}"))
    sheet.text(x + 0.41, y + 0.065, low.format(float(within[0])), size=6, ha="right", color=FAINT)
    sheet.text(x + TILE - 0.41, y + 0.065, high.format(float(within[1])), size=6, ha="left", color=FAINT)


def _classes(scenes: Sequence[Scene], name: str) -> list[tuple[str, int]]:
    """(modality, class) of those that occur in these scenes; none of what is no class map."""
    modality = modalities.get(_modality(name))
    if modality.kind != "classes":
        return []
    maps = [bands(name, a[name]) for scene in scenes for a in (scene.inputs, scene.truth, scene.generated) if name in a]
    return [(modality.name, int(c)) for c in np.unique(np.concatenate([m.ravel() for m in maps]))]


def _legend(sheet: Sheet, y: float, present: Sequence[tuple[str, int]], in_a_row: int) -> None:
    """Names of classes, with its middle at `y`."""
    named = [(class_colour(m, c), modalities.get(m).classes[c]) for m, c in present]
    patches = [Patch(facecolor=colour, edgecolor="#999999", linewidth=0.4, label=label) for colour, label in named]
    sheet.figure.legend(
        handles=patches,
        loc="center",
        bbox_to_anchor=(0.5, 1 - y / sheet.height),
        ncols=min(in_a_row, len(patches)),
        frameon=False,
        fontsize=7.5,
        handlelength=1.1,
        columnspacing=1.1,
        handletextpad=0.4,
    )


# ---- curves ----

CURVES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5566", "#555555")


def loss_curves(path: str | os.PathLike | None, runs: Mapping[str, str | os.PathLike], *, dpi: int = 150) -> Figure:
    """One panel a run from its ``metrics.jsonl``: training loss, and validation loss in all and per modality.

    `runs` maps titles to files, or to work directories that hold one; `path` as of `contact_sheet`.
    """
    if not runs:
        raise ValueError("There is no run to draw.")
    columns = min(len(runs), 3)
    rows = math.ceil(len(runs) / columns)
    sheet = Sheet(3.4 * columns + 0.2, 2.7 * rows + 0.1)
    axes = sheet.figure.subplots(rows, columns, squeeze=False)
    for panel, (title, metrics) in zip(axes.flat, runs.items(), strict=False):
        _draw_run(panel, title, _read_metrics(metrics))
    for panel in axes.flat[len(runs) :]:
        panel.set_visible(False)
    sheet.figure.tight_layout(pad=0.8)
    return sheet.save(path, dpi)


def _read_metrics(path: str | os.PathLike) -> list[dict]:
    path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; expected the metrics of a training run.")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _series(lines: Sequence[dict], key: str) -> np.ndarray:
    """``[n, 2]`` of step and value; lines without a number are left out."""
    return np.array([(line["step"], line[key]) for line in lines if line.get(key) is not None], float).reshape(-1, 2)


def _draw_run(axes, title: str, lines: Sequence[dict]) -> None:
    keys = dict.fromkeys(key for line in lines for key in line)
    train = _series(lines, "loss")
    axes.plot(*train.T, color="#b9c7d9", linewidth=0.8)
    axes.plot(*_smooth(train).T, color="#335c8c", linewidth=1.4, label="training")
    for colour, key in zip(CURVES[1:], (k for k in keys if k.startswith("val/loss/")), strict=False):
        axes.plot(*_series(lines, key).T, color=colour, linewidth=1, marker=".", markersize=3, label=key.removeprefix("val/loss/"))
    if "val/loss" in keys:
        axes.plot(*_series(lines, "val/loss").T, color=INK, linewidth=1.2, linestyle="--", marker="o", markersize=3, label="validation")
    axes.set_title(title, fontsize=9.5, fontweight="bold", loc="left", color=INK)
    axes.set_xlabel("step", fontsize=8, color=FAINT)
    axes.set_ylabel("loss", fontsize=8, color=FAINT)
    axes.tick_params(labelsize=7, colors=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    if train.size and train[:, 1].min() > 0 and train[:, 1].max() > 20 * train[:, 1].min():
        axes.set_yscale("log")
    axes.legend(fontsize=6.5, frameon=False, ncols=2 if len(axes.lines) > 6 else 1)


def _smooth(series: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the points."""
    half = len(series) // 40
    if half < 1:
        return series
    total = np.cumsum(np.append(0, series[:, 1]))
    at = np.arange(len(series))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(series))
    return np.stack([series[:, 0], (total[high] - total[low]) / (high - low)], axis=1)
