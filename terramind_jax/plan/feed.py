"""What the chips eat: views a second, and what storage, readers and the way to the device must give for it."""

from __future__ import annotations

import dataclasses

from terramind_jax.data.index import Index
from terramind_jax.plan.step import Step, bytes_of

# TerraMesh: 17 TB for 9.2 million samples with all modalities (huggingface.co/datasets/ibm-esa-geospatial/TerraMesh).
SAMPLE_BYTES = 1.85e6

# Seconds of one core of an AMD EPYC for `data.groups.ViewGroups` over the released streams of 264-pixel tiles in Zarr, 3.5 MB a sample:
# to read and decode a sample, and to mask and fill one view of it. Fitted to 1, 2, 4, 8 and 16 views a sample.
READ_SECONDS = 6e-3
VIEW_SECONDS = 0.5e-3


@dataclasses.dataclass(frozen=True)
class Feed:
    """What one host needs."""

    views: float  # masked views a second
    samples: float  # samples loaded a second; each gives `views_per_sample` views
    storage: float  # bytes a second from storage, at most: a modality that no view selects is not read
    device: float  # bytes a second to its chips
    cores: float  # that read


def rate(views: float, views_per_sample: int, sample_bytes: float = SAMPLE_BYTES, view_bytes: float = 0.0) -> Feed:
    """For `views` a second; `view_bytes` of each travel to a chip."""
    samples = views / views_per_sample
    return Feed(views, samples, samples * sample_bytes, views * view_bytes, samples * READ_SECONDS + views * VIEW_SECONDS)


def feed(step: Step, seconds: float, index: Index | None = None) -> Feed:
    """For steps of `seconds`. Sizes of samples are the index's, without one TerraMesh's."""
    views = step.config.train.batch_size / step.topology.hosts
    view_bytes = bytes_of(step.batch) * step.topology.chips / step.config.train.batch_size  # more than once along a tensor axis
    sample_bytes = SAMPLE_BYTES if index is None else index.stored_bytes() / max(len(index), 1)
    return rate(views / seconds, step.config.data.views_per_sample, sample_bytes, view_bytes)
