"""Which samples were bad and why: counted by reason, listed in the work directory, and the last ones told in full.

Data workers mark a bad sample with modality and reason; for a whole sentence the last ones are read again, with everything they have.
"""

from __future__ import annotations

import collections
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax import files
from terramind_jax.data import errors, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index
from terramind_jax.modalities import Stream

FOLDER = "bad_samples"  # of a work directory, with one file a host
FLUSH_SECONDS = 30  # between writes of the list
SHOWN = 4  # samples that are named in full


class Faults:
    """Remembers the bad samples among this host's batches."""

    def __init__(
        self,
        index: Index | None = None,
        read: Callable[[int], Any] | None = None,
        workdir: str | os.PathLike | None = None,
        host: int = 0,
    ) -> None:
        """`read` reads all that matters of a sample, given by its place in the index. With a `workdir` it has a list of them (`listed`).

        Without an index there are none: where a sample that cannot be read is an error.
        """
        self._index, self._read = index, read
        self._bad: collections.deque[int] = collections.deque(maxlen=SHOWN)
        self._list = None if workdir is None else _List(workdir, host)

    def following(self, batches: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The same batches, as the data pipeline gives them; their bad samples are remembered as they pass."""
        for batch in batches:
            for i, fault in zip(batch["sample"][batch["bad"]].tolist(), batch["fault"][batch["bad"]].tolist(), strict=True):
                if i >= 0:
                    self._add(i, fault.decode())
            yield batch

    def _add(self, i: int, fault: str) -> None:
        if i not in self._bad:
            self._bad.append(i)
        if self._list is not None:
            self._list.add(self._index.keys[i], *fault.split(" "))

    def flush(self) -> None:
        """What was listed is stored when this returns."""
        if self._list is not None:
            self._list.flush()

    def reasons(self) -> str:
        """How many there are of each reason, and one sentence a sample, of the last `SHOWN`."""
        said = " ".join(map(self._reason, self._bad)) or "those of this host are none of them."
        return said if self._list is None else f"{self._list.summary()} {said}".lstrip()

    def _reason(self, i: int) -> str:
        try:
            self._read(i)
        except (DataError, OSError) as error:
            return str(error)
        return f"Sample {self._index.keys[i]!r} can be read now."


class _List:
    """This host's part of the list. It is written whole, as nothing can be appended in an object store."""

    def __init__(self, workdir: str | os.PathLike, host: int) -> None:
        self._workdir, self._path = workdir, files.folder(workdir) / FOLDER / f"{host:05d}.jsonl"
        self._text = self._path.read_text() if self._path.exists() else ""
        self._unwritten, self._written = False, time.monotonic()
        self._known = {(line["key"], line["modality"]) for line in listed(workdir)}

    def add(self, key: str, modality: str, reason: str) -> None:
        if (key, modality) in self._known:
            return
        self._known.add((key, modality))
        self._text += json.dumps({"key": key, "modality": modality, "reason": reason}) + "\n"
        self._unwritten = True
        if time.monotonic() - self._written > FLUSH_SECONDS:
            self.flush()

    def summary(self) -> str:
        self.flush()
        found = ", ".join(f"{n} {reason}" for reason, n in counts(self._workdir).items())
        return f"{found}, listed in {self._path.parent}." if found else ""

    def flush(self) -> None:
        if not self._unwritten:
            return
        try:
            files.write_text(self._path, self._text)
            self._unwritten = False
        except Exception as error:  # a store that cannot be reached for a moment does not end the run
            warnings.warn(f"The list of bad samples could not be written to {self._path}: {error}", stacklevel=2)
        self._written = time.monotonic()


def listed(workdir: str | os.PathLike) -> list[dict[str, str]]:
    """The bad samples of a run, ``{"key", "modality", "reason"}`` (see `errors.REASONS`), once each, whichever host met them.

    They are those met so far: a view only reads the modalities that its masks select.
    """
    folder = files.folder(workdir) / FOLDER
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    found: dict[tuple[str, str], dict[str, str]] = {}
    for path in paths:
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault((line["key"], line["modality"]), line)
    return list(found.values())


def counts(workdir: str | os.PathLike) -> dict[str, int]:
    """How many bad samples a run has listed, by reason, in the order of `errors.REASONS`."""
    found = collections.Counter(line["reason"] for line in listed(workdir))
    return {reason: found[reason] for reason in errors.REASONS if found[reason]}


def read_streams(index: Index, streams: Sequence[Stream], image_size: int, i: int) -> None:
    """Reads what sample `i` has of `streams`; a `DataError` or OSError for the first that cannot be read."""
    for stream in streams:
        table = index.available if stream.kind == "pixels" else index.has_tokens
        there = stream.modality in index.modalities and table[i, index.modalities.index(stream.modality)]
        if stream.kind == "pixels" and there:
            views.read_variants(index, i, stream.modality, image_size)
        elif stream.kind == "sequence" or there:
            views.Sample(index, i, 0, image_size).ids(stream, np.zeros(0, int))
