"""Several draws of one output, and what they say of each pixel: its mean, its spread, and how sure a class is. NumPy, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from terramind_jax import modalities


@dataclasses.dataclass(frozen=True)
class Draws:
    """Draws of a continuous modality. Figures are float32 ``[B, H, W, C]`` in the unit of the values."""

    values: np.ndarray  # [N, B, H, W, C]

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(0)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the draws, divided by N."""
        return self.values.std(0)

    def quantiles(self, levels: float | Sequence[float]) -> np.ndarray:
        """``[B, H, W, C]`` at one level in [0, 1], or ``[Q, B, H, W, C]`` at several, linear between draws."""
        return np.quantile(self.values, levels, axis=0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ClassDraws:
    """Draws of a class map."""

    values: np.ndarray  # [N, B, H, W, K] logits

    @property
    def probabilities(self) -> np.ndarray:
        """Mean of the draws' probabilities, float32 ``[B, H, W, K]``."""
        return probabilities(self.values).mean(0)

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of `probabilities` in nats, float32 ``[B, H, W]``, from 0 to log K."""
        return entropy(self.probabilities)


def collect(name: str, values: Sequence[np.ndarray | list[str]]) -> Draws | ClassDraws | np.ndarray | list[list[str]]:
    """The draws of output `name`; of coordinates an array ``[N, B, 2]``, of captions a list of N lists."""
    stream = modalities.output_stream(name)
    if stream.kind == "sequence":
        return np.stack(values) if isinstance(values[0], np.ndarray) else list(values)
    return (ClassDraws if modalities.get(stream.modality).kind == "classes" else Draws)(np.stack(values))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(probability: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -(probability * np.log(np.maximum(probability, 1e-12))).sum(-1)
