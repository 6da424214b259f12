"""The TFDS data set ``terramesh``, one ArrayRecord record a location; `prepare` makes it of shards, `tokenize` of tokens. No TensorFlow.

A record joins by key what is known of a location: pixels, tokens, coordinates and metadata; `records` reads it back. Of each file it is
known beforehand which records it holds, so one is made without any other and kept in ``{out}.parts`` until all are there: whoever was
killed goes on with those that are missing. TFDS's own writers first lay down every record elsewhere, to tell from their sizes how many
files there will be, or have Beam sort them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters

from terramind_jax import declarations, files, modalities
from terramind_jax.data import clouds, records, table, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index
from terramind_jax.data.shards import new_folder

INFO = "prepared.json"  # what a folder was prepared from
CLAIM = "parts.json"  # what the files of a folder that are not all there yet are made from, and where each ends

_F = tfds.features
TOKENIZERS = "tokenizers"  # the field of a claim that says which ones made its tokens

_PART = 512 << 20  # bytes of records in one file at most
_BLANK = (2, 2)  # height and width of what a location lacks: TFDS loses the shape of an image of fewer bytes than axes


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


def record(index: Index, form: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Location `i` of a split; `form` gives names, shapes and types as `features` does. What cannot be read is left out."""
    made: dict[str, Any] = {"available": {}, "time": {}, "attributes": {}, "pixels": {}, "tokens": {}}
    has_pixels, has_tokens = (dict(zip(index.modalities, row[i], strict=True)) for row in (index.available, index.has_tokens))
    for name in form["pixels"]:
        image, attributes, time = (has_pixels[name] and attempt(index.describe, i, name)) or (None, {}, 0)
        blank = np.zeros((*_BLANK, len(modalities.get(name).bands)))
        made["available"][name] = image is not None
        made["pixels"][name] = np.ascontiguousarray(views.cast(blank if image is None else image, views.stored_dtype(name)))
        made["attributes"][name] = json.dumps(attributes)
        made["time"][name] = time
    for name, (shape, dtype) in form["tokens"].items():
        grid = attempt(index.tokens, i, name) if has_tokens[name] else None
        made["tokens"][name] = _grid(np.zeros((0, *shape)) if grid is None else grid, shape, dtype, f"{index.keys[i]!r}: tokens of {name}")
    place, mask = attempt(index.place, i), attempt(index.cloud_mask, i)
    return made | {
        "key": index.keys[i],
        "subset": index.subsets[index.subset[i]],
        "coordinates": np.array(attempt(index.coordinates, i) or (np.nan, np.nan)),
        "crs": "" if place is None else place.crs,
        "transform": np.full(6, np.nan) if place is None else np.array(place.transform, float),
        "size": np.array((0, 0) if place is None else (place.height, place.width)),
        clouds.NAME: np.zeros((0, 0), np.uint8) if mask is None else mask,
    }


def attempt(read: Callable[..., Any], *what: Any) -> Any:
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


def file_name(split: str, number: int, files_of_split: int) -> str:
    """As TFDS names the files of a split."""
    return f"{records.DATASET}-{split}.array_record-{number:05d}-of-{files_of_split:05d}"


def write_file(index: Index, form: Mapping[str, Any], start: int, stop: int, path: str) -> None:
    """Locations `start` to `stop` as one ArrayRecord file, which appears whole."""
    serialize = serializer(form)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    written = ((i, serialize(record(index, form, i))) for i in range(start, stop))
    file_adapters.ArrayRecordFileAdapter.write_examples(temporary, written)
    os.replace(temporary, path)


def serializer(form: Mapping[str, Any]) -> Callable[[dict[str, Any]], bytes]:
    """Equal records become equal bytes, which protobuf only promises where it is asked to: else each process orders fields as it likes."""
    described = features(form["tokens"], form["pixels"])
    examples = example_serializer.ExampleSerializer(described.get_serialized_info())
    return lambda made: examples.get_tf_example(described.encode_example(made)).SerializeToString(deterministic=True)


def even_ends(count: int, largest: int, most: int | None = None) -> list[int]:
    """Where each file begins and ends among `count` records of `largest` bytes: even files of `most` bytes, at most; None: 512 MiB."""
    return np.linspace(0, count, -(-count // max((most or _PART) // largest, 1)) + 1).astype(int).tolist()


# ---- the data set -----------------------------------------------------------------------------------------------------------


class Terramesh(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):  # `tfds.load` reads it without this class
    """Writes ``{data_dir}/terramesh/1.0.0``. Read it with ``tfds.data_source("terramesh", split="train", data_dir=data_dir)``."""

    name = records.DATASET
    VERSION = tfds.core.Version(records.VERSION)
    code_path = None  # nothing is downloaded: TFDS would look beside the code for checksums, which takes a package it does not require

    def __init__(self, *, data_dir: str, ends: Mapping[str, Sequence[int]], form: Mapping[str, Any], parts: str):
        """Of files that wait in the folder `parts`; `ends` gives by split where each begins and ends."""
        self._ends, self._form, self._parts = ends, form, parts
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        description = "TerraMesh prepared for training: of each location coordinates, metadata, and pixels, tokens or both."
        return tfds.core.DatasetInfo(
            builder=self, description=description, features=features(self._form["tokens"], self._form["pixels"]), disable_shuffling=True
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: tfds.download.DownloadConfig) -> None:
        targets = {
            split: self._get_filename_template(split_name=split).sharded_filepaths(len(ends) - 1) for split, ends in self._ends.items()
        }
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
    """A second name of a file, or a copy where it can have none, so that nothing is lost if what follows fails."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def assemble(
    out: str,
    indexes: Mapping[str, Index],
    form: Mapping[str, Any],
    ends: Mapping[str, Sequence[int]],
    made_from: Mapping[str, Any],
    tokenizers: Mapping[str, Mapping[str, str]],
) -> None:
    """The data set `out` of the files that wait in ``{out}.parts``, which go then. `tokenizers` are texts, by split and modality."""
    parts = parts_of(out)
    with new_folder(out) as partial:
        for split, index in indexes.items():
            _write_index(os.path.join(partial, split), index, form, made_from)
            for name, text in tokenizers[split].items():
                files.write_text(files.folder(partial) / split / f"{name}_tokens" / "tokenizer.json", text)
        if own := declarations.of({m: None for index in indexes.values() for m in index.modalities}):
            files.write_text(files.folder(partial) / declarations.NAME, json.dumps(own, indent=1))
        files.write_text(files.folder(partial) / INFO, json.dumps(made_from, indent=1))
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a temporary folder
            Terramesh(data_dir=partial, ends=ends, form=form, parts=parts).download_and_prepare()
        shutil.rmtree(os.path.join(partial, "downloads"), ignore_errors=True)  # TFDS makes it, and nothing is downloaded
    with contextlib.suppress(OSError):  # what is left of them does no harm
        empty(parts)
        os.rmdir(parts)
    print(f"{os.path.join(out, records.DATASET)} holds {', '.join(f'{len(i)} locations of {split}' for split, i in indexes.items())}.")


def parts_of(out: str) -> str:
    """The folder where the files of `out` wait until all are there."""
    return os.path.abspath(f"{os.path.normpath(out)}.parts")


def files_of(parts: str, split: str, ends: Sequence[int]) -> list[tuple[int, int, str]]:
    """(start, stop, path) of each file of a split in `parts`."""
    paths = [os.path.join(parts, file_name(split, k, len(ends) - 1)) for k in range(len(ends) - 1)]
    return list(zip(ends, ends[1:], paths, strict=False))


def claimed(parts: str) -> tuple[Any, dict[str, list[int]]]:
    """What the files in a folder are made from and their `ends`; None if there are none. A FileExistsError if the folder is not ours.

    The ends are not found anew: a sample that cannot be read for a while would change them, and all that is done would be lost.
    """
    path = files.folder(parts) / CLAIM
    if path.exists():
        found = json.loads(path.read_text())
        return found["made_from"], found["ends"]
    if os.path.lexists(parts) and not (os.path.isdir(parts) and all(name.endswith(".tmp") for name in os.listdir(parts))):
        raise FileExistsError(f"{parts} holds something else than files of a preparation, which would wait there; move or delete it.")
    return None, {}


def claim(parts: str, made_from: Mapping[str, Any], ends: Mapping[str, Sequence[int]]) -> None:
    """Makes an empty folder one of files that are made from this."""
    files.write_text(files.folder(parts) / CLAIM, json.dumps({"made_from": made_from, "ends": ends}, indent=1))


def empty(parts: str) -> None:
    """The claim goes last, so that whatever is left stays known as ours."""
    for name in sorted(os.listdir(parts), key=CLAIM.__eq__):
        os.unlink(os.path.join(parts, name))


def is_finished(out: str, made_from: Mapping[str, str]) -> bool:
    if not os.path.exists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    path = os.path.join(out, INFO)
    if not os.path.isfile(path):
        raise FileExistsError(f"{out} is not empty and holds no prepared data; give --out a new folder, or delete it first.")
    with open(path, encoding="utf-8") as f:
        if json.load(f) != made_from:
            raise FileExistsError(
                f"{out} was made of other shards or tokenizers, or the shards have changed; give --out a new folder, or delete it."
            )
    return True


def _write_index(folder: str, index: Index, form: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
    """What is known of the records without reading them. The keys tell that it is of these, the id what they were made from."""
    version = hashlib.sha256(json.dumps([os.path.basename(folder), made_from], sort_keys=True).encode()).hexdigest()
    os.makedirs(folder)
    keys = index.keys.raw(slice(None))
    meta = {"id": version, "modalities": list(index.modalities), "subsets": list(index.subsets)}
    available, tokens = (
        there & np.array([m in form[kind] for m in index.modalities])
        for there, kind in ((index.available, "pixels"), (index.has_tokens, "tokens"))
    )
    arrays = {"keys": keys, "available": available, "has_tokens": tokens, "subset": index.subset}
    table.write(os.path.join(folder, records.NAME), meta, arrays)
