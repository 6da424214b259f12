"""GeoTIFFs in, generated GeoTIFFs and pictures out: what the command ``generate`` does; `scenes` has how."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from terramind_jax import generate, geo, modalities, plot, sources, zoo
from terramind_jax.decoding import PerTarget
from terramind_jax.model import TerraMind
from terramind_jax.scenes import feeding, journal, reading, windows
from terramind_jax.scenes.feeding import Network, spread
from terramind_jax.scenes.generating import NO_CLASS, Job, generate_together, output_paths
from terramind_jax.scenes.reading import PATCH, Scene
from terramind_jax.tokenizer import Clip, Sampler, diffusion
from terramind_jax.train import pretrain, tokenizer
from terramind_jax.weights import load

BATCH_SIZE = 8
PICTURE = 768  # pixels along a scene's longer side in its picture


def run(
    *,
    weights: str | os.PathLike,
    inputs: Mapping[str, str | os.PathLike],
    to: Sequence[str],
    out: str | os.PathLike,
    tokenizers: str | os.PathLike | None = None,
    model: str | None = None,
    lulc_codes: str | None = None,
    bands: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    overlap: int | None = None,
    samples: int = 1,
    batch_size: int = BATCH_SIZE,
    quicklook: bool = True,
    steps: PerTarget[int] = 1,
    timesteps: int | None = None,
    sampler: Sampler = "dpmpp",
    clip: Clip = "published",
    only: Collection[str] | None = None,
    network: Network | None = None,
    tags: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Path]:
    """Generates modalities of one scene, or of every scene of a folder.

    Writes ``{out}/{modality}/{scene}.tif`` on the input's grid, Cloud-Optimised GeoTIFF, float32 in the modality's unit (NaN: no data),
    class maps uint8 (255: no data); ``{out}/coords/{scene}.json``, a point a window, and ``{out}/coords_density/{scene}.tif``, the
    probability of every quarter degree of the Earth as `locate.density` has it of the inputs, the mean over the windows; and the picture
    ``{out}/{scene}.png``. Scenes have any size from one window on, the size that the model was trained at. A pixel has no data where no
    input has. Patches of 16 x 16 pixels of which an input has no data are not seen; where it has some, the mean of a band stands for the
    rest. An input may be an output, too, which is painted in such patches where another input has data, see `generate.generate`. All
    rasters of a folder are read before the first scene is begun, so that one that cannot be is told at once. Nothing that exists is
    replaced; a run that was stopped goes on with the same arguments, from ``{out}/unfinished``, and ends with the same files; not on a
    device that computes in another dtype.

    Args:
      weights: work directory of a pretrained model, or a folder that holds one as ``model``; with `model`, what `weights.load` takes.
      inputs: GeoTIFF, or folder of GeoTIFFs that share their file names, by modality. For ``coords`` a raster gives its position.
      to: modalities in the order of generation; each conditions the next. Files bear a modality's own name: what is asked for as S1 or
        tok_sen1grd@224 is S1GRD.
      tokenizers: folder with one tokenizer a modality; by default ``tokenizers`` in or beside `weights`.
      model: name of a released model, such as ``terramind_v1_base``; a work directory knows what it is.
      lulc_codes: what the codes of land-cover rasters mean, see `data.pack.LULC_CODES`; needed if LULC is an input.
      bands: which bands a file has, by input, in its order, where it lacks some of the modality's; Sentinel-2's may be named B01 ... B12.
        The others are filled from their neighbours in wavelength, see `bands.fill_missing`.
      seed: of all that is drawn. A pixel's draws depend on it and on the place in the scene. What is made of them rounds differently with
        the number of windows at once and of devices, see `decoding.generate_tokens`.
      overlap: pixels that neighbouring windows share, a multiple of 16; None: half a window.
      samples: how often each scene is drawn. From two on, ``{modality}_std`` holds the standard deviation a band, of class maps the entropy
        of the mean probabilities in nats; ``{modality}`` is the first draw, but for rounding, as it is without others.
      batch_size: windows at once, of all devices of this machine. Accelerators do small scenes of one height together.
      quicklook: whether to draw the picture.
      steps: in which an image's tokens are drawn, see `decoding.generate_tokens`.
      timesteps, sampler, clip: of diffusion decoders, see `terramind_jax.tokenizer.decode`; the published sampler is ``sampler="ddim"``.
      only: names of the scenes to do of a folder; None: all.
      network: what `load_network` has loaded of these weights already.
      tags: what the files say of some arguments instead, such as names without the folders of this machine.
      **options: those of `decoding.generate_tokens`, such as temperature, top_p and guidance_scale.

    Returns:
      The paths of the GeoTIFFs and JSON files.

    Raises:
      FileExistsError: an output exists already, or another command's unfinished work.
      FileNotFoundError: no model, tokenizer or raster where one is expected.
      NotADirectoryError: `out` is a file.
      ValueError: unknown modalities, rasters of the wrong bands or grid, too small, or without any data.
      OSError: the disk is full (ENOSPC).
    """
    sources.declare(workdir(weights))
    check_names(inputs, to, lulc_codes)
    bands = reading.known_bands(inputs, bands)
    to = list(dict.fromkeys(modalities.output_stream(name).modality for name in to))  # S1 is S1GRD, and so are its files
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples is {samples} and batch_size {batch_size}; both must be at least 1.")
    timesteps = diffusion.steps_of(sampler, timesteps)  # files tell the number
    diffusion.plan(timesteps, sampler)  # so that no error of theirs comes after hours
    options |= dict(steps=steps, timesteps=timesteps, sampler=sampler, clip=diffusion.check_clip(clip))
    found, out = reading.find(inputs), Path(out)
    found = {name: paths for name, paths in found.items() if only is None or name in only}
    written = [path for scene in found for name in to for path in output_paths(out, scene, name, samples)]
    pictures = [out / f"{scene}.png" for scene in found] if quicklook else []
    journal.check_outputs(out, [*written, *pictures])
    scenes = [reading.open_scene(name, paths, lulc_codes, bands) for name, paths in found.items()]
    network = network or load_network(weights, model, inputs, to, tokenizers)
    generate.check_names(network.module, inputs, to, network.tokenizers, visible=inputs)  # where they have data
    side = network.module.config.image_size
    overlap = side // 2 // PATCH * PATCH if overlap is None else overlap
    for scene in scenes:
        reading.check_size(scene, side)
    cuts = [windows.cut(scene.grid, side // PATCH, overlap) for scene in scenes]
    command = dict(
        **provenance(network, model, weights, inputs, found),
        **dict(to=list(to), lulc_codes=lulc_codes, bands=bands, seed=seed, overlap=overlap, samples=samples, batch_size=batch_size),
        **options,
    ) | dict(tags or {})
    with journal.start(out, command) as done:
        job = Job(spread(network), list(to), seed, samples, batch_size, options, out, done)
        for work in feeding.unfinished(scenes, cuts, done, feeding.at_once(job.network, batch_size, samples)):
            for scene in work.scenes:
                reading.tell_place(scene)
            generate_together(job, work)
            for scene in work.scenes if quicklook else ():
                _draw(out, scene, to)
            done.finish(*work.names)
            for scene in work.scenes:
                print(f"{scene.name}: {', '.join(to)} -> {out}", flush=True)
    return written


# ---- models ----


def load_network(
    weights: str | os.PathLike, model: str | None, inputs: Collection[str], to: Sequence[str], tokenizers: str | os.PathLike | None = None
) -> Network:
    """What generates `to` from `inputs`; weights, model and tokenizers as of `run`."""
    print(f"Loading {model or weights}{', random weights: what they make says nothing' * (weights == 'random')}", flush=True)
    return _released(model, weights, inputs, to, tokenizers) if model else _trained(weights, inputs, to, tokenizers)


def _trained(weights: str | os.PathLike, inputs: Collection[str], to: Sequence[str], tokenizers: str | os.PathLike | None) -> Network:
    check_workdir(weights)
    module, variables, _ = pretrain.load(workdir(weights))
    folder = Path(tokenizers) if tokenizers else tokenizer_folder(weights)
    return Network(module, variables, load_tokenizers(module, list(inputs), to, folder))


def _released(
    name: str, weights: str | os.PathLike, inputs: Collection[str], to: Sequence[str], tokenizers: str | os.PathLike | None
) -> Network:
    entry = zoo.get(name)
    if entry.kind not in ("backbone", "generate"):
        raise ValueError(f"{name} does not generate; choose one such as terramind_v1_base.")
    name = f"{name.removesuffix('_generate')}_generate"
    options = {} if tokenizers is None else {"tokenizers": tokenizers}
    model = load(name, weights, modalities=list(inputs), output_modalities=list(to), **options)
    return Network(model.module, model.variables, model.tokenizers, model.version)


def load_tokenizers(module: TerraMind, inputs: Sequence[str], to: Sequence[str], folder: Path) -> dict[str, tuple]:
    """The tokenizers that generating `to` from `inputs` needs, from ``{folder}/{modality}``, checked against the model."""
    known = {stream.key: stream for stream in module.config.streams}
    needed = [known.get(stream.key, stream) for stream in (*map(modalities.input_stream, inputs), *map(modalities.output_stream, to))]
    loaded = {}
    for stream in needed:
        path = folder / stream.modality
        if stream.kind != "tokens" or stream.modality in loaded or stream.key not in known:
            continue  # a stream that the model lacks is what `generate` objects to
        if not path.is_dir():
            raise FileNotFoundError(f"There is no tokenizer {path}; train it, or say with --tokenizers in which folder it is.")
        loaded[stream.modality] = tokenizer.load(path)
        loaded[stream.modality][0].config.check_stream(stream, f"The tokenizer {path}")
    return loaded


def digest(*variables: Any) -> str:
    """SHA-256 of all weights, by name."""
    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(variables):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(x).view(np.uint8).data)
    return found.hexdigest()


def provenance(
    network: Network, model: str | None, weights: str | os.PathLike, inputs: Mapping[str, str | os.PathLike], scenes: Iterable[str]
) -> dict[str, Any]:
    """What the journal and the files of a command say of its model, inputs and scenes."""
    return dict(
        version=metadata.version("terramind_jax"),
        model=model or str(weights),
        **({"weights": str(weights)} if model else {}),
        weights_sha256=digest(network.variables, {name: variables for name, (_, variables) in network.tokenizers.items()}),
        dtype=network.dtype,  # may follow the device: two would mix in one scene
        inputs={name: str(Path(path).absolute()) for name, path in inputs.items()},
        scenes=list(scenes),
    )


def check_names(inputs: Mapping[str, object], to: Sequence[str], lulc_codes: str | None) -> None:
    """Raises a ValueError for modalities that are no rasters or that no model generates, and for undeclared codes of land cover."""
    reading.check_names(inputs, lulc_codes)
    if not to:
        raise ValueError("No output is named; generation needs at least one.")
    for name in to:
        if modalities.check_generated(name).modality == "caption":
            raise ValueError("A caption is text, which this command neither reads nor writes; load the model in Python for it.")


def check_workdir(weights: str | os.PathLike) -> None:
    """Raises a FileNotFoundError if there is no work directory."""
    if not Path(weights).exists():
        hint = "; for hub or random weights say which model with --model" if weights in ("hub", "random") else ""
        raise FileNotFoundError(f"There is no work directory {weights}{hint}.")


def workdir(weights: str | os.PathLike) -> Path:
    return Path(weights) / "model" if (Path(weights) / "model" / "config.json").is_file() else Path(weights)


def tokenizer_folder(weights: str | os.PathLike) -> Path:
    inside, beside = Path(weights) / "tokenizers", Path(weights).resolve().parent / "tokenizers"
    return inside if inside.is_dir() else beside


# ---- a look at what was made ----


def look(out: Path, scene: Scene, inputs: Sequence[str], to: Sequence[str]) -> plot.Scene:
    """A scene and what `run` made of its `inputs` in `out`, every view of each image, thinned to `PICTURE` pixels; its others are truth."""
    given = {name: reading.glance(scene, name, PICTURE) for name in scene.images}
    made = {name: _thinned(out / name / f"{scene.name}.tif") for name in to if modalities.output_stream(name).kind != "sequence"}
    truth = {name: given.pop(name) for name in scene.images if name not in inputs}
    return plot.Scene(scene.name, *({view: x for name, x in found.items() for view in plot.views(name)} for found in (given, made, truth)))


def _draw(out: Path, scene: Scene, to: Sequence[str]) -> None:
    shown = look(out, scene, scene.images, to)
    if shown.generated:
        plot.contact_sheet(out / f"{scene.name}.png", [shown])


def _thinned(path: Path) -> np.ndarray:
    image = geo.read_thinned(path, PICTURE)
    return np.where(image == NO_CLASS, 0, image) if image.dtype == np.uint8 else image
