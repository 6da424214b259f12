"""What the chips eat: views a second, and what storage, readers and the way to the device must give for it."""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict

from terramind_jax import sharding
from terramind_jax.data.index import Index
from terramind_jax.plan.step import Step, bytes_of

# TerraMesh: 17 TB for 9.2 million samples with all modalities (huggingface.co/datasets/ibm-esa-geospatial/TerraMesh).
SAMPLE_BYTES = 1.85e6

# Seconds of one core of an AMD EPYC, by benchmarks/reader.py: to read and decode a sample, 264-pixel tiles of all streams in Zarr, and
# to mask and fill one view of it.
READ_SECONDS = 6e-3
VIEW_SECONDS = 0.5e-3


@dataclasses.dataclass(frozen=True)
class Feed:
    """What one host needs."""

    views: float  # masked views a second
    samples: float  # samples loaded a second, one for all of its views if `times_read` is 1
    storage: float  # bytes a second from storage, at most: a modality that no view selects is not read
    device: float  # bytes a second to its chips
    cores: float  # that read
    times_read: int = 1  # how often a sample is loaded for its views


def rate(views: float, views_per_sample: int, sample_bytes: float = SAMPLE_BYTES, view_bytes: float = 0.0, times_read: int = 1) -> Feed:
    """For `views` a second; `view_bytes` of each travel to a chip."""
    samples = views * times_read / views_per_sample
    return Feed(views, samples, samples * sample_bytes, views * view_bytes, samples * READ_SECONDS + views * VIEW_SECONDS, times_read)


def times_read(config: ConfigDict, hosts: int) -> int:
    """How many data workers, at most, meet a view of the same sample, which each of them loads.

    Batches go round the workers of a host, and the views of a sample to batches that are `data.view_window` samples apart.
    """
    views, workers = config.data.views_per_sample, max(config.run.workers, 1)
    batches, rest = divmod(config.data.view_window, config.train.batch_size)
    return min(views, hosts * workers if rest else workers // math.gcd(batches, workers))


def feed(step: Step, seconds: float, index: Index | None = None) -> Feed:
    """For steps of `seconds`. Sizes of samples are the index's, without one TerraMesh's."""
    shares = len(set(sharding.shares(step.mesh.devices).values()))  # fewer than hosts where a tensor axis spans some
    views = step.config.train.batch_size / shares
    view_bytes = bytes_of(step.batch) * step.topology.chips / step.config.train.batch_size  # more than once along a tensor axis
    sample_bytes = SAMPLE_BYTES if index is None else index.stored_bytes() / max(len(index), 1)
    return rate(views / seconds, step.config.data.views_per_sample, sample_bytes, view_bytes, times_read(step.config, shares))
