"""Models with weights that NumPy draws from their names, and small summaries of what they compute.

tests/parity/make_golden.py runs them through TerraTorch and writes down the summaries; test_golden.py runs them through ours.
"""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
FEATURES = {"S2L2A": 12, "S1GRD": 2}  # inputs of the feature extractor and their channels


def load(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def weights(shapes: Mapping[str, tuple[int, ...]], keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict with the scale of a trained one; tied names are equal, and positions are those of `keep`."""
    state: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        first = _first(name)
        if first not in state:
            state[first] = keep[name] if name.endswith("pos_emb") else _draw(first, tuple(shape))
    return {name: state[_first(name)] for name in shapes}


def _first(name: str) -> str:
    """The name whose tensor a tied one shares."""
    name = name.replace("to_logits", "token_emb")
    return name.replace("decoder_", "encoder_") if name.endswith("mod_emb") else name


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.random(shape, np.float32) * np.float32(12**0.5) - np.float32(3**0.5)  # zero mean, unit variance
    if name.endswith("bias"):
        return x * np.float32(0.02)
    if len(shape) == 1:
        return 1 + x * np.float32(0.1)  # norms
    if "emb" in name and "time_embed" not in name and "emb_layers" not in name or "token" in name:
        return x * np.float32(0.05)
    return x * np.float32(np.prod(shape[1:]) ** -0.5)


def image(channels: int, size: int = 224) -> np.ndarray:
    """``[1, size, size, channels]`` standardised: waves, so that patches differ."""
    y, x = np.mgrid[:size, :size] / 16
    return np.stack([np.sin(x * (1 + c / 7) + y / (2 + c)) for c in range(channels)], -1)[None].astype(np.float32)


def classes(size: int = 64) -> np.ndarray:
    """LULC ``[1, size, size]``."""
    y, x = np.mgrid[:size, :size] // 5
    return ((x * 3 + y * 7) % 10)[None]


def tokens(count: int, size: int) -> np.ndarray:
    return (np.arange(size * size).reshape(1, size, size) * 7919) % count


def noise(channels: int, size: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1, size, size, channels), np.float32)


def summary(x: np.ndarray) -> list[float]:
    """64 numbers spread over an array."""
    flat = np.asarray(x).reshape(-1)
    return [float(v) for v in flat[np.linspace(0, flat.size - 1, 64).astype(int)]]
