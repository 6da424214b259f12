"""Tokens of an index's samples, joined to them by key: those in tars, or in the records of a data set that `tokenize` wrote.

Both read tokens of a sample and tell whether they are those of other pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from terramind_jax.data import order, tars
from terramind_jax.data.columns import Column, Columns, Keys
from terramind_jax.data.errors import DataError
from terramind_jax.data.records import Records
from terramind_jax.data.shards import token_source
from terramind_jax.files import parse_npy

if TYPE_CHECKING:
    from terramind_jax.data.index import Index

_COMPARED = 8  # samples whose places are compared with those of their tokens


class TokensInTars:
    """Token shards, a column a modality."""

    def __init__(self, columns: Columns):
        self.columns = columns

    def read(self, i: int, modality: str) -> np.ndarray:
        """Stored ids ``[variants, h, w]`` of sample `i`, of K codebooks ``[..., K]``; `DataError` if they cannot be read."""
        payload = self.columns.whole(i, modality)
        try:
            ids = parse_npy(payload)
        except Exception as error:  # a damaged header raises SyntaxError, TypeError, MemoryError, ...
            raise DataError(f"{self.columns.where(i, modality)} is no readable .npy file ({error}).") from error
        if ids.dtype.kind not in "iu":
            raise DataError(f"{self.columns.where(i, modality)} holds {ids.dtype} instead of integer token ids.", "value")
        return ids

    def stored_bytes(self) -> int:
        return self.columns.stored_bytes()

    def check(self, index: Index, pixels: Columns) -> None:
        """A ValueError if the tokens of a modality are those of other samples altogether, or of other pixels under the same keys."""
        _check_keys(index, {m: (np.count_nonzero(column.size), column.folder) for m, column in self.columns.items()})
        for m in pixels.keys() & self.columns.keys():
            self._check_source(index, pixels[m], m)

    def _check_source(self, index: Index, pixels: Column, modality: str) -> None:
        """A ValueError if a token shard tells that it was made from other pixels; one of each modality is asked, and need not tell."""
        column = index.modalities.index(modality)
        both = np.flatnonzero(index.available[:, column] & index.has_tokens[:, column])
        if not len(both):
            return
        i = int(both[0])
        shard, made_from = self.columns[modality].path(i), pixels.path(i)
        if os.path.basename(shard) != os.path.basename(made_from):
            return
        try:
            start = bytes(self.columns.store.read(shard, 0, 2 * tars.BLOCK))
            read = lambda offset, size: start[offset : offset + size]  # noqa: E731
            told = token_source(tars.scan(shard, read, len(start)), read)
            same = not told or told == index.fingerprint(modality, pixels.beside(i))
        except (OSError, DataError):
            return  # a shard that cannot be read is found out where it is
        if not same:
            raise ValueError(
                f"{shard} holds tokens of other pixels than those of {made_from}, though under the same keys; tokenize these shards "
                "(again, if they have changed since), or point to the tokens that were made from them."
            )


class TokensInRecords:
    """Records of tokens; location `i` of the index is sample ``rows[i]`` of them, -1 where they have none; without `rows`, the same."""

    def __init__(self, records: Records, rows: np.ndarray | None, keys: Keys):
        self.columns: Mapping[str, Column] = {}  # none in tars
        self._records, self._rows, self._keys = records, rows, keys

    def read(self, i: int, modality: str) -> np.ndarray:
        """As `TokensInTars.read`."""
        if (row := self._row(i)) < 0:
            raise DataError(f"Sample {self._keys[i]!r} has no tokens of {modality} in {self._records.root}.", "missing")
        return self._records.tokens(row, modality)

    def stored_bytes(self) -> int:
        """Of all that the records hold."""
        return self._records.stored_bytes()

    def check(self, index: Index, pixels: Columns) -> None:
        """A ValueError if the tokens of a modality are those of other samples altogether, or lie elsewhere, as far as a few tell."""
        counts = self._records.has_tokens.sum(0).tolist()
        _check_keys(index, {m: (n, self._records.root) for m, n in zip(self._records.modalities, counts, strict=True)})
        there = np.flatnonzero(index.has_tokens.any(1))
        for i in there[order.spread(len(there), _COMPARED)].tolist():
            own, other = index.coordinates(i), self._records.coordinates(self._row(i))
            if own and other and not np.allclose(own, other, rtol=0, atol=1e-4):
                raise ValueError(
                    f"Sample {index.keys[i]!r} lies at {own[0]:.4f}, {own[1]:.4f}, and its tokens in {self._records.root} were made of one "
                    f"at {other[0]:.4f}, {other[1]:.4f}; tokenize these shards, or point to the tokens that were made from them."
                )

    def _row(self, i: int) -> int:
        return i if self._rows is None else int(self._rows[i])


def _check_keys(index: Index, stored: Mapping[str, tuple[int, str]]) -> None:
    """A ValueError if none of a modality's tokens, of which `stored` gives the number and the place, has the key of a sample."""
    for m, (count, folder) in stored.items():
        if count and not index.has_tokens[:, index.modalities.index(m)].any():
            raise ValueError(
                f"None of the {count} tokens in {folder} has the key of a sample with pixels, such as {index.keys[0]!r}; tokenize these "
                "shards, or point to the tokens that were made from them."
            )
