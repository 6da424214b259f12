"""GeoTIFFs in, embeddings out: what the command ``embed`` does; `scenes.embedding` has how."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from terramind_jax import generate_scenes, modalities, sources, zoo
from terramind_jax.model import Backbone, BackboneConfig
from terramind_jax.scenes import embedding, feeding, journal, reading, windows
from terramind_jax.scenes.embedding import Job, Pooling, embed_together, output_path
from terramind_jax.scenes.feeding import Network, spread
from terramind_jax.scenes.reading import PATCH
from terramind_jax.train import pretrain
from terramind_jax.weights import load


def run(
    *,
    weights: str | os.PathLike,
    inputs: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    tokenizers: str | os.PathLike | None = None,
    model: str | None = None,
    layer: int = -1,
    pooling: Pooling = "none",
    format: str = "geotiff",
    lulc_codes: str | None = None,
    bands: Mapping[str, Sequence[str]] | None = None,
    overlap: int | None = None,
    batch_size: int = generate_scenes.BATCH_SIZE,
) -> list[Path]:
    """Embeds one scene, or every scene of a folder: what a layer of the encoder says, the mean over the input modalities.

    Writes ``{out}/{scene}.tif``, a Cloud-Optimised GeoTIFF with a pixel a patch (16 of the input's) and a float32 band a dimension, NaN
    where no input has data; or ``{out}/{scene}.parquet``, GeoParquet with the columns scene, row, column (the first pixel), embedding
    and geometry. Where some input has no data, the encoder sees the mean of its bands. Nothing that exists is replaced; a run that was
    stopped goes on with the same arguments, as in `generate_scenes.run`.

    Args:
      weights, inputs, tokenizers, model, lulc_codes, bands, batch_size: as of `generate_scenes.run`. At least one input is an image.
      layer: which of the encoder's layers, 0 the first, -1 the last, which alone is normalised.
      pooling: ``none`` gives a vector a patch, in the weighted mean of the windows that see it; ``mean`` and ``max`` one a window, over
        its patches with data, and only as a table.
      format: ``geotiff`` or ``geoparquet``; a table of patches is made in memory.
      overlap: pixels that neighbouring windows share, a multiple of 16; None: half a window, of pooled ones none. The last windows are
        shifted back to the edge.

    Raises:
      ImportError: GeoParquet without GeoPandas.
      FileExistsError, FileNotFoundError, ValueError, OSError: as of `generate_scenes.run`; a layer, pooling or format that there is not.
    """
    sources.declare(generate_scenes.workdir(weights))
    reading.check_names(inputs, lulc_codes)
    bands = reading.known_bands(inputs, bands)
    _check(inputs, pooling, format, batch_size)
    found, out = reading.find(inputs), Path(out)
    written = [output_path(out, scene, format) for scene in found]
    journal.check_outputs(out, written)
    scenes = [reading.open_scene(name, paths, lulc_codes, bands) for name, paths in found.items()]
    network = load_network(weights, model, inputs, tokenizers)
    depth, side = network.module.config.encoder_depth, network.module.config.image_size
    if not -depth <= layer < depth:
        raise ValueError(f"The layer is {layer}; this model's are 0-{depth - 1}, or -{depth} to -1 from the last.")
    overlap = (side // 2 // PATCH * PATCH if pooling == "none" else 0) if overlap is None else overlap
    for scene in scenes:
        reading.check_size(scene, side)
    cuts = [windows.cut(scene.grid, side // PATCH, overlap) for scene in scenes]
    command = dict(
        **generate_scenes.provenance(network, model, weights, inputs, found),
        **dict(layer=layer % depth, pooling=pooling, format=format, lulc_codes=lulc_codes, bands=bands),
        **dict(overlap=overlap, batch_size=batch_size),
    )
    with journal.start(out, command) as done:
        job = Job(spread(network), layer % depth, pooling, format, batch_size, out, done)
        for work in feeding.unfinished(scenes, cuts, done, feeding.at_once(job.network, batch_size)):
            for scene in work.scenes:
                reading.tell_place(scene)
            embed_together(job, work)
            done.finish(*work.names)
            for scene in work.scenes:
                print(f"{scene.name} -> {output_path(out, scene.name, format)}", flush=True)
    return written


def _check(inputs: Mapping[str, object], pooling: str, format: str, batch_size: int) -> None:
    if pooling not in embedding.POOLINGS:
        raise ValueError(f"Unknown pooling {pooling!r}; known are {', '.join(embedding.POOLINGS)}.")
    if format not in embedding.FORMATS:
        raise ValueError(f"Unknown format {format!r}; known are {', '.join(embedding.FORMATS)}.")
    if format == "geotiff" and pooling != "none":
        raise ValueError(f"A raster holds a vector a patch; the {pooling} of windows goes to a table: choose the format geoparquet.")
    if all(modalities.input_stream(name).kind == "sequence" for name in inputs):
        raise ValueError(f"{', '.join(inputs)} is no image; an embedding needs at least one.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if format == "geoparquet":
        embedding.libraries()


def load_network(
    weights: str | os.PathLike, model: str | None, inputs: Collection[str], tokenizers: str | os.PathLike | None = None
) -> Network:
    """The encoder for `inputs`; weights, model and tokenizers as of `run`."""
    print(f"Loading {model or weights}", flush=True)
    return _released(model, weights, inputs, tokenizers) if model else _trained(weights, inputs, tokenizers)


def _trained(weights: str | os.PathLike, inputs: Collection[str], tokenizers: str | os.PathLike | None) -> Network:
    """The encoder of a pretrained model, whose variables have the same names."""
    generate_scenes.check_workdir(weights)
    whole, variables, _ = pretrain.load(generate_scenes.workdir(weights))
    same = {f.name: getattr(whole.config, f.name) for f in dataclasses.fields(BackboneConfig) if hasattr(whole.config, f.name)}
    known = {stream.key: stream.modality for stream in whole.config.encoder}
    for name in inputs:
        if modalities.input_stream(name).key not in known:
            raise ValueError(f"This model takes no {name}; it takes {', '.join(dict.fromkeys(known.values()))}.")
    module = Backbone(BackboneConfig(**same | {"streams": whole.config.encoder}))
    folder = Path(tokenizers) if tokenizers else generate_scenes.tokenizer_folder(weights)
    return Network(module, variables, generate_scenes.load_tokenizers(whole, list(inputs), [], folder))


def _released(name: str, weights: str | os.PathLike, inputs: Collection[str], tokenizers: str | os.PathLike | None) -> Network:
    if zoo.get(name).kind != "backbone":
        raise ValueError(f"{name} is no feature extractor; choose one such as terramind_v1_base.")
    options = {} if tokenizers is None else {"tokenizers": tokenizers}
    model = load(name, weights, modalities=list(inputs), **options)
    return Network(model.module, model.variables, model.tokenizers, model.version)
