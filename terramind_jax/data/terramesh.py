"""``data prepare``: the TFDS data set ``terramesh``, one ArrayRecord record a location, made from shards. Needs no TensorFlow.

A record joins by key what the shards hold of a location: pixels, tokens, coordinates and metadata. Apache Beam makes the files where
it is asked for, on this machine or a cluster; else this process does. Records lie in the order of the index, so that training sees the
samples of the shards in the same order; `records` reads them back.

Of each file it is known beforehand which records it holds, so one is made without any other and kept in ``{out}.parts`` until all are
there: a preparation that was killed goes on with those that are missing. TFDS's own writers first lay down every record elsewhere, to
tell from their sizes how many files there will be, or have Beam sort them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters
from tqdm import tqdm

from terramind_jax import declarations, files, modalities
from terramind_jax.data import clouds, records, scan, storage, table, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.shards import new_folder

INFO = "prepared.json"  # what a folder was prepared from
CLAIM = "parts.json"  # what the files of a folder that are not all there yet are made from, and where each ends
BEAM = "Apache Beam is not installed; install it with: pip install 'terramind-jax[beam]'"

_F = tfds.features
_PART, _PROBED = 512 << 20, 8  # bytes of records in one file at most, as told by the largest of so many
_BLANK = (2, 2)  # height and width of what a location lacks: TFDS loses the shape of an image of fewer bytes than axes


@dataclasses.dataclass(frozen=True)
class Source:
    """Shards, by names that mean the same on every machine of a cluster."""

    root: str
    tokens: str
    modalities: tuple[str, ...]

    def open(self, split: str) -> Index:
        return _open(self, split)


@functools.lru_cache(maxsize=8)  # a worker makes many records
def _open(source: Source, split: str) -> Index:
    return open_index(source.root, split, source.modalities, tokens_root=source.tokens)


# ---- one record -------------------------------------------------------------------------------------------------------------


def features(tokens: Mapping[str, tuple[tuple[int, ...], np.dtype]], pixels: Sequence[str]) -> tfds.features.FeaturesDict:
    """What a record holds, for modalities with pixels, and shape and type of the `tokens` of one crop.

    What a location lacks is False in ``available`` and a few zeros in ``pixels``, or no crop at all in ``tokens``.
    """

    def image(name: str) -> tfds.features.Tensor:
        return _F.Tensor(shape=(None, None, len(modalities.get(name).bands)), dtype=views.stored_dtype(name), encoding="bytes")

    return _F.FeaturesDict(
        {
            "key": _F.Text(),
            "subset": _F.Text(),
            "coordinates": _F.Tensor(shape=(2,), dtype=np.float64, encoding="bytes"),  # longitude, latitude; NaN if not known
            "crs": _F.Text(),
            "transform": _F.Tensor(shape=(6,), dtype=np.float64, encoding="bytes"),  # from pixels to `crs`; NaN if not known
            "size": _F.Tensor(shape=(2,), dtype=np.int64),  # height and width in such pixels
            clouds.NAME: _F.Tensor(shape=(None, None), dtype=np.uint8, encoding="zlib"),  # no rows if there is none
            "available": _F.FeaturesDict({m: _F.Scalar(np.bool_) for m in pixels}),
            "time": _F.FeaturesDict({m: _F.Scalar(np.int64) for m in pixels}),  # ns since 1970; 0 if not known
            "attributes": _F.FeaturesDict({m: _F.Text() for m in pixels}),  # JSON
            "pixels": _F.FeaturesDict({m: image(m) for m in pixels}),
            "tokens": _F.FeaturesDict({m: _F.Tensor(shape=(None, *s), dtype=d, encoding="bytes") for m, (s, d) in tokens.items()}),
        }
    )


def record(source: Source, split: str, form: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Location `i` of a split; `form` gives names, shapes and types as `features` does. What cannot be read is left out."""
    index = source.open(split)
    made: dict[str, Any] = {"available": {}, "time": {}, "attributes": {}, "pixels": {}, "tokens": {}}
    has_pixels, has_tokens = (dict(zip(index.modalities, row[i], strict=True)) for row in (index.available, index.has_tokens))
    for name in form["pixels"]:
        image, attributes, time = (has_pixels[name] and _attempt(index.describe, i, name)) or (None, {}, 0)
        blank = np.zeros((*_BLANK, len(modalities.get(name).bands)))
        made["available"][name] = image is not None
        made["pixels"][name] = np.ascontiguousarray(views.cast(blank if image is None else image, views.stored_dtype(name)))
        made["attributes"][name] = json.dumps(attributes)
        made["time"][name] = time
    for name, (shape, dtype) in form["tokens"].items():
        grid = _attempt(index.tokens, i, name) if has_tokens[name] else None
        made["tokens"][name] = _grid(np.zeros((0, *shape)) if grid is None else grid, shape, dtype, f"{index.keys[i]!r}: tokens of {name}")
    place, mask = _attempt(index.place, i), _attempt(index.cloud_mask, i)
    return made | {
        "key": index.keys[i],
        "subset": index.subsets[index.subset[i]],
        "coordinates": np.array(_attempt(index.coordinates, i) or (np.nan, np.nan)),
        "crs": "" if place is None else place.crs,
        "transform": np.full(6, np.nan) if place is None else np.array(place.transform, float),
        "size": np.array((0, 0) if place is None else (place.height, place.width)),
        clouds.NAME: np.zeros((0, 0), np.uint8) if mask is None else mask,
    }


def _attempt(read: Callable[..., Any], *what: Any) -> Any:
    """None for what cannot be read; it is told, and the sample stays known as a bad one."""
    try:
        return read(*what)
    except (DataError, OSError) as error:
        views.warn_once(f"Left out: {error}")
        return None


def _grid(grid: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, what: str) -> np.ndarray:
    if grid.shape[1:] != shape:
        raise ValueError(f"Sample {what} have shape {grid.shape[1:]}, those of others {shape}; tokenize all for one image size.")
    return np.ascontiguousarray(views.cast(grid, dtype))


# ---- one file ---------------------------------------------------------------------------------------------------------------


def write_part(source: Source, split: str, form: Mapping[str, Any], start: int, stop: int, path: str) -> None:
    """Locations `start` to `stop` as one ArrayRecord file, which appears whole; one that is there is left alone."""
    if os.path.exists(path):
        return
    serialize = _serializer(form)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    written = ((i, serialize(record(source, split, form, i))) for i in range(start, stop))
    file_adapters.ArrayRecordFileAdapter.write_examples(temporary, written)
    os.replace(temporary, path)


def _serializer(form: Mapping[str, Any]) -> Callable[[dict[str, Any]], bytes]:
    """Equal records become equal bytes, which protobuf only promises where it is asked to: else each process orders fields as it likes."""
    described = features(form["tokens"], form["pixels"])
    serializer = example_serializer.ExampleSerializer(described.get_serialized_info())
    return lambda made: serializer.get_tf_example(described.encode_example(made)).SerializeToString(deterministic=True)


def _ends(source: Source, split: str, form: Mapping[str, Any], count: int) -> list[int]:
    """Where the files of a split begin and end among its `count` locations."""
    serialize, probed = _serializer(form), np.unique(np.linspace(0, count - 1, _PROBED).astype(int))
    largest = max(len(serialize(record(source, split, form, int(i)))) for i in probed)
    files_of_split = -(-count // max(_PART // largest, 1))
    return np.linspace(0, count, files_of_split + 1).astype(int).tolist()


# ---- the data set -----------------------------------------------------------------------------------------------------------


class Terramesh(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):  # `tfds.load` reads it without this class
    """Writes ``{data_dir}/terramesh/1.0.0``. Read it with ``tfds.data_source("terramesh", split="train", data_dir=data_dir)``."""

    name = records.DATASET
    VERSION = tfds.core.Version(records.VERSION)
    code_path = None  # nothing is downloaded: TFDS would look beside the code for checksums, which takes a package it does not require

    def __init__(self, *, data_dir: str, source: Source, ends: Mapping[str, Sequence[int]], form: Mapping[str, Any], parts: str):
        """`ends` gives by split where its files begin and end; those that `parts` holds are taken from there."""
        self._source, self._ends, self._form, self._parts = source, ends, form, parts
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        description = "TerraMesh prepared for training: pixels, tokens, coordinates and metadata of each location."
        return tfds.core.DatasetInfo(
            builder=self, description=description, features=features(self._form["tokens"], self._form["pixels"]), disable_shuffling=True
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: tfds.download.DownloadConfig) -> None:
        jobs, targets = [], {}
        for split, ends in self._ends.items():
            template = self._get_filename_template(split_name=split)
            targets[split] = template.sharded_filepaths(len(ends) - 1)
            parts = [os.path.join(self._parts, path.name) for path in targets[split]]
            jobs += [(self._source, split, self._form, *rest) for rest in zip(ends, ends[1:], parts, strict=False)]
        _write_parts(jobs, download_config.beam_options)
        for path in itertools.chain(*targets.values()):
            _link(os.path.join(self._parts, path.name), os.fspath(path))
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=np.diff(self._ends[split]).tolist(),
                num_bytes=sum(path.stat().length for path in paths),
                filename_template=self._get_filename_template(split_name=split),
            )
            for split, paths in targets.items()
        ]
        self.info.set_splits(tfds.core.splits.SplitDict(splits))


def _link(source: str, target: str) -> None:
    """A second name of a file, so that nothing is lost if what follows fails; where none can be given the file is moved."""
    try:
        os.link(source, target)
    except OSError:
        shutil.move(source, target)


def _write_parts(jobs: Sequence[tuple[Any, ...]], options: Any) -> None:
    """`write_part` with each of these arguments, by Apache Beam with such `options`, else here."""
    if options is None:
        for job in tqdm(jobs, desc="prepare", unit="file"):
            write_part(*job)
        return
    import apache_beam

    with apache_beam.Pipeline(options=options) as pipeline:
        _ = pipeline | apache_beam.Create(jobs) | apache_beam.Reshuffle() | apache_beam.MapTuple(write_part)


def prepare(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokens: str | os.PathLike | None = None,
    beam_options: Sequence[str] | None = None,
) -> None:
    """Writes all splits under `root` as the TFDS data set ``{out}/terramesh``, with the tokens under `tokens` (default: `root`).

    `beam_options` are options of a Beam pipeline, such as ``--runner=DirectRunner``; None makes the records in this process. Beam's
    machines have to see `root`, `tokens` and `out` under the same names. `out` appears whole or not at all; until then its files wait in
    ``{out}.parts``, with which the same call goes on after it was killed. If `out` was prepared from the same shards already nothing is
    done, and anything else there, or in ``{out}.parts``, is a FileExistsError. Samples that cannot be read are as bad there as in the
    shards. Raises ValueError for tokens whose keys are not those of the pixels, ImportError where Beam is missing.
    """
    root, out = os.fspath(root), os.fspath(out)
    if files.is_remote(out):
        raise ValueError(f"{out} is in an object store, where ArrayRecord cannot be written; give --out a folder, and copy it then.")
    options = None if beam_options is None else _pipeline_options(beam_options)
    source, indexes = _find(root, os.fspath(tokens or root))
    made_from = {split: index.version for split, index in indexes.items()}
    if _is_finished(out, made_from):
        print(f"{out} is prepared from these shards already; nothing to do.")
        return
    form = _form(indexes)
    parts = os.path.abspath(f"{os.path.normpath(out)}.parts")
    described = made_from | {"form": repr(form)}
    ends = _claimed(parts, described)
    if ends is None:
        ends = {split: _ends(source, split, form, len(index)) for split, index in indexes.items()}
        _claim(parts, described, ends)
    with new_folder(out) as partial:
        for split, index in indexes.items():
            _write_index(os.path.join(partial, split), index, form)
            _copy_tokenizers(source.tokens, partial, split, form["tokens"])
        if own := declarations.of(source.modalities):
            files.write_text(files.folder(partial) / declarations.NAME, json.dumps(own, indent=1))
        files.write_text(files.folder(partial) / INFO, json.dumps(made_from, indent=1))
        builder = Terramesh(data_dir=partial, source=source, ends=ends, form=form, parts=parts)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a temporary folder
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=options))
    with contextlib.suppress(OSError):  # what is left of them does no harm
        _empty(parts)
        os.rmdir(parts)
    print(f"{os.path.join(out, records.DATASET)} holds {', '.join(f'{len(i)} locations of {split}' for split, i in indexes.items())}.")


def _claimed(parts: str, made_from: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """The `ends` of the files in a folder that are made from this; None if there are none, or others. A FileExistsError if it is not ours.

    They are not found anew: a sample that cannot be read for a while would change them, and all that is done would be lost.
    """
    path = files.folder(parts) / CLAIM
    if path.exists():
        claim = json.loads(path.read_text())
        return claim["ends"] if claim["made_from"] == made_from else None
    if os.path.lexists(parts) and (not os.path.isdir(parts) or os.listdir(parts)):
        raise FileExistsError(f"{parts} holds something else than files of a preparation, which would wait there; move or delete it.")
    return None


def _claim(parts: str, made_from: Mapping[str, Any], ends: Mapping[str, Sequence[int]]) -> None:
    """Makes a folder one of files that are made from this. An error if one that is there cannot be deleted: it would be taken for these."""
    if os.path.isdir(parts):
        _empty(parts)
    files.write_text(files.folder(parts) / CLAIM, json.dumps({"made_from": made_from, "ends": ends}, indent=1))


def _empty(parts: str) -> None:
    """The claim goes last, so that whatever is left stays known as ours."""
    for name in sorted(os.listdir(parts), key=CLAIM.__eq__):
        os.unlink(os.path.join(parts, name))


def _pipeline_options(options: Sequence[str]) -> Any:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError(BEAM) from error
    return PipelineOptions(list(options))


def _find(root: str, tokens: str) -> tuple[Source, dict[str, Index]]:
    """The shards of every split, over the modalities that any of them has."""
    splits = _splits(root)
    found = {m for split in splits for m in open_index(root, split, tokens_root=tokens).modalities}
    source = Source(root, tokens, tuple(m for m in modalities.MODALITIES if m in found))
    _open.cache_clear()  # shards may have changed since
    indexes = {split: source.open(split) for split in splits}
    for index in indexes.values():
        index.check_tokens()
    return source, indexes


def _splits(root: str) -> list[str]:
    store = storage.store(root)
    names: Iterable[str] = ("train", "val")
    if not files.is_remote(root):
        names = sorted(e.name for e in os.scandir(root) if e.is_dir()) if os.path.isdir(root) else ()
    found = [n for n in names if any(scan.listing(store, root, n).values())]
    if not found:
        raise FileNotFoundError(f"No shards in {root}; expected tars like {root}/train/S2L2A/NAME_shard_000001.tar.")
    return found


def _is_finished(out: str, made_from: Mapping[str, str]) -> bool:
    if not os.path.exists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    path = os.path.join(out, INFO)
    if not os.path.isfile(path):
        raise FileExistsError(f"{out} is not empty and holds no prepared data; give --out a new folder, or delete it first.")
    with open(path, encoding="utf-8") as f:
        if json.load(f) != made_from:
            raise FileExistsError(f"{out} was prepared from other shards, or these have changed; give --out a new folder, or delete it.")
    return True


def _form(indexes: Mapping[str, Index]) -> dict[str, Any]:
    """Which modalities have pixels, and what one crop's tokens of those that have some look like."""
    pixels: dict[str, None] = {}
    tokens: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for index in indexes.values():
        for column, name in enumerate(index.modalities):
            if index.available[:, column].any():
                pixels[name] = None
            for i in np.flatnonzero(index.has_tokens[:, column]) if name not in tokens else ():
                grid = _attempt(index.tokens, int(i), name)
                if grid is not None:
                    tokens[name] = grid.shape[1:], grid.dtype
                    break
    return {"pixels": tuple(pixels), "tokens": tokens}


def _write_index(folder: str, index: Index, form: Mapping[str, Any]) -> None:
    """What is known of the records without reading them. The keys tell that it is of these."""
    os.makedirs(folder)
    keys = index.keys.raw(slice(None))
    meta = {"id": index.version, "modalities": list(index.modalities), "subsets": list(index.subsets)}
    tokens = index.has_tokens & np.array([m in form["tokens"] for m in index.modalities])
    arrays = {"keys": keys, "available": index.available, "has_tokens": tokens, "subset": index.subset}
    table.write(os.path.join(folder, records.NAME), meta, arrays)


def _copy_tokenizers(tokens: str, out: str, split: str, names: Iterable[str]) -> None:
    """Which tokenizers made the tokens, where training looks for it."""
    for name in names:
        path = files.folder(tokens) / split / f"{name}_tokens" / "tokenizer.json"
        if path.exists():
            files.write_text(files.folder(out) / split / f"{name}_tokens" / path.name, path.read_text())
        else:
            logging.warning("%s does not tell which tokenizer made its tokens, for it has no %s.", path.parent, path.name)
