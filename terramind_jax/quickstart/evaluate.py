"""What the quickstart's model generates from held-out scenes, beside what it must beat: a table, a picture, GeoTIFFs, loss curves."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from terramind_jax import baselines, geo, metrics, modalities, plot
from terramind_jax.data import crops
from terramind_jax.data.index import Index, open_index
from terramind_jax.evaluation.generation import alone, center, classes, has, is_class_map
from terramind_jax.evaluation.scores import Scores, scores_of
from terramind_jax.scenes.feeding import Network
from terramind_jax.train import pretrain, tokenizer

PICTURED = 4  # scenes in the picture
FIT_SCENES = 96  # training scenes that the baselines are fitted on


def run(folder: Path, source: str, *, is_embedded: bool, minutes: float | None) -> None:
    """Generates the targets from `source` of the held-out scenes, at temperature 0, and writes ``report.md``, pictures and GeoTIFFs."""
    train, held_out = open_index(folder / "shards", "train"), open_index(folder / "shards", "val")
    module, variables, config = pretrain.load(folder / "model")
    targets = [s.modality for s in module.config.decoder if s.kind == "tokens" and s.modality != source]
    tokenizers = {m: tokenizer.load(folder / "tokenizers" / m) for m in targets}
    network = Network(module, variables, tokenizers)
    fitted = {m: fit(train, source, m) for m in targets}
    scores = {m: {method: scores_of(m) for method in ("generated", *METHODS[is_class_map(m)], "noise floor")} for m in targets}
    scenes: list[plot.Scene] = []
    for i in range(len(held_out)):
        there = [m for m in targets if has(held_out, i, m)]
        if not has(held_out, i, source) or not there:
            continue
        image = center(held_out, i, source)
        made = {m: alone(network, {source: image[None]}, m, temperature=0.0)[0] for m in there}
        truth = {m: center(held_out, i, m) for m in there}
        for m in there:
            record(scores[m], m, made[m], truth[m], image, fitted[m], noise_free(held_out, i, m))
        write_geotiffs(folder / "geotiff", held_out, i, {source: image, **{f"{m}_generated": x for m, x in made.items()}})
        if len(scenes) < PICTURED and (not scenes or list(scenes[0].generated) == there):
            scenes.append(plot.Scene(held_out.keys[i], {source: image}, {m: made[m] for m in there}, truth))
    plot.contact_sheet(folder / "generated.png", scenes, title=f"Generated from {source} of held-out tiles, temperature 0")
    curves = {p.parent.name: p for p in sorted(folder.glob("tokenizers/*/metrics.jsonl"))}
    plot.loss_curves(folder / "losses.png", {"transformer": folder / "model" / "metrics.jsonl", **curves})
    parameters = sum(x.size for x in jax.tree.leaves(variables["params"]))
    model = f"{parameters / 1e6:.1f} million parameters, {config.train.steps} steps of {config.train.batch_size} views"
    text = report(scores, source, folder, model, len(train), len(held_out), is_embedded, minutes)
    (folder / "report.md").write_text(text)
    print("\n" + text)


# ---- held-out arrays ----


def noise_free(index: Index, i: int, modality: str) -> np.ndarray | None:
    """The centre crop without sensor noise and speckle, where the shards hold it."""
    truth = index.read_all(i, modality, ("truth",)).get("truth")
    if truth is None:
        return None
    image = crops.crop(np.moveaxis(truth[0] if truth.ndim == 4 else truth, 0, -1), 0)
    return image[..., 0] if is_class_map(modality) else image.astype(np.float32)


# ---- baselines ----

METHODS = {False: ("training mean", "linear regression"), True: ("majority class", "logistic regression")}


def fit(train: Index, source: str, modality: str) -> dict[str, object]:
    """What predicts `modality` without context: a constant, and a regression that sees one pixel of `source`."""
    scenes = [i for i in range(len(train)) if has(train, i, source) and has(train, i, modality)][:FIT_SCENES]
    bands = len(modalities.get(source).bands)
    if is_class_map(modality):
        rng = np.random.default_rng(0)
        pixels = [baselines.sample_pixels(rng, (center(train, i, source), center(train, i, modality)), 500) for i in scenes]
        x, y = (np.concatenate(parts) for parts in zip(*pixels, strict=True))
        count = len(modalities.get(modality).classes)
        counts = np.bincount(y, minlength=count)
        regression = baselines.logistic_regression(x, y, count)
        return {"majority class": baselines.majority_class(counts), "logistic regression": lambda image: classes(regression(image))}
    moments = baselines.LinearRegression(bands, len(modalities.get(modality).bands))
    for i in scenes:
        moments.add(center(train, i, source)[::4, ::4], center(train, i, modality)[::4, ::4])
    return {"training mean": moments.mean(), "linear regression": moments.fit()}


def record(scores: dict[str, Scores], modality: str, made, truth, image, fitted: dict[str, object], clean: np.ndarray | None) -> None:
    """Adds one scene to every method's scores."""
    scores["generated"].add(made, truth)
    for method in METHODS[is_class_map(modality)]:
        predict = fitted[method]
        constant = not callable(predict)
        scores[method].add(np.broadcast_to(np.asarray(predict, truth.dtype), truth.shape) if constant else predict(image), truth)
    if clean is not None:
        scores["noise floor"].add(clean, truth)


# ---- what is written ----


def write_geotiffs(folder: Path, index: Index, i: int, arrays: dict[str, np.ndarray]) -> None:
    """One GeoTIFF an array, on the centre crop's place on Earth."""
    place = index.place(i)
    if place is None:
        return
    top, left = (place.height - 224) // 2, (place.width - 224) // 2
    window = place.window(top, left, 224, 224)
    for name, array in arrays.items():
        path = folder / name / f"{index.keys[i]}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        geo.write(path, array if array.ndim == 3 else array[..., None], like=window, modality=name.removesuffix("_generated"))


def report(scores, source: str, folder: Path, model: str, trained: int, held_out: int, is_embedded: bool, minutes: float | None) -> str:
    """The table and what it says, in Markdown.

    `model` describes the size and the training; `minutes` is what everything took, None after a run that went on from an earlier one.
    """
    origin = "the embedded world (synthetic)" if is_embedded else "yours"
    lines = [
        "# Quickstart report",
        "",
        f"A small TerraMind ({model}) and its tokenizers were trained from scratch on {_count(trained)} of {origin}.",
        *([] if minutes is None else [f"Everything together, data and tokenizers included, took {minutes:.1f} minutes."]),
        f"From {source} of {_count(held_out)} held out it generated, each modality on its own, at temperature 0 and in one step:",
        "",
        "| modality | method | MAE | RMSE | PSNR dB | SSIM | mIoU |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_table_row(m, method, s) for m, by_method in scores.items() for method, s in by_method.items() if not s.is_empty]
    ranges = ", ".join(f"{m} {metrics.DATA_RANGE[m]:g} {modalities.get(m).unit}" for m in scores if m in metrics.DATA_RANGE)
    lines += ["", f"MAE and RMSE are in the modality's unit. PSNR and SSIM take as full scale: {ranges}.", ""]
    lines += [sentence for m, by_method in scores.items() if (sentence := _verdict(m, by_method))]
    if not is_embedded:
        lines += ["", "A handful of tiles shows that the path works on your data; it teaches the model nothing that would carry over."]
    lines += ["", f"Pictures: `{folder / 'generated.png'}`, `{folder / 'losses.png'}`. Georeferenced rasters: `{folder / 'geotiff'}`."]
    return "\n".join(lines) + "\n"


def _count(tiles: int) -> str:
    return f"{tiles} tile{'s' * (tiles != 1)}"


def _table_row(modality: str, method: str, s: Scores) -> str:
    if s.errors is None:
        return f"| {modality} | {method} | - | - | - | - | {metrics.mean_iou(s.confusion):.3f} |"
    e = s.errors
    digits = 3 if e.data_range < 10 else 2
    return f"| {modality} | {method} | {e.mae:.{digits}f} | {e.rmse:.{digits}f} | {e.psnr:.2f} | {e.ssim:.3f} | - |"


def _verdict(modality: str, by_method: dict[str, Scores]) -> str:
    """One sentence: which baselines the generated modality beats, and why a regression may win."""
    if by_method["generated"].is_empty:
        return ""
    constant, regression = METHODS[is_class_map(modality)]

    def value(method: str) -> float:
        s = by_method[method]
        return -metrics.mean_iou(s.confusion) if s.errors is None else s.errors.rmse

    made = value("generated")
    unit = "mIoU" if is_class_map(modality) else "RMSE"
    text = f"- {modality}: generated {'beats' if made < value(constant) else 'does NOT beat'} the {constant} in {unit}"
    if made == value(constant):
        text = f"- {modality}: generated equals the {constant} in {unit}"
    if made < value(regression):
        return f"{text} and beats the per-pixel {regression}."
    if made == value(regression):
        return f"{text} and equals the per-pixel {regression}."
    return f"{text}; the per-pixel {regression} is better: {WHY_REGRESSION.get(modality, _OWN)}."


_SPECTRAL = "much of it follows from the spectrum of the same pixel, which a regression reads at full resolution and a small codebook blurs"
_OWN = "it reads single pixels at full resolution, which 196 tokens cannot"
_RADAR = "what radar and optics share sits in single pixels, at full resolution, and a patch has one of a dozen codes"
WHY_REGRESSION = {
    "NDVI": "NDVI is a function of two bands of the same pixel, which a regression reads at full resolution and 196 tokens cannot",
    "LULC": "most classes are told apart by the spectrum of one pixel, and a regression draws their borders at full resolution",
    "DEM": "with this little training the elevation's level is learned only roughly",
    "S1GRD": _RADAR,
    "S1RTC": _RADAR,
    "S2L2A": _SPECTRAL,
}
