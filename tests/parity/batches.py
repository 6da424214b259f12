"""Random batches of slots, in the format of `terramind_jax.data.pipeline` and in the reference's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from terramind_jax import modalities
from terramind_jax.modalities import DECODER_STREAMS, ENCODER_STREAMS, PATCH_SIZE, Stream

PADDING = 255
GRID = (modalities.IMAGE_SIZE // PATCH_SIZE) ** 2
START = 5  # [S_1], which opens a sequence that is to be written
TARGETS_FROM = 8  # where the reference's array of a sequence holds its target, after the input


def draw(
    batch: int,
    inputs: int,
    targets: int,
    seed: int = 0,
    *,
    encoder: Sequence[Stream] = ENCODER_STREAMS,
    decoder: Sequence[Stream] = DECODER_STREAMS,
    empty: int = 0,
) -> dict[str, np.ndarray]:
    """Slots with the streams drawn evenly, disjoint positions, and pixels of the stored types; up to `empty` slots of a sample unused."""
    rng = np.random.default_rng(seed)
    capacity = int(2 * batch * inputs / len(encoder)) + 16
    out = {f"{side}_{name}": [] for side in ("input", "target") for name in ("modality", "position", "id")} | {"target_input": []}
    used = dict.fromkeys((s.key for s in encoder), 0)
    for _ in range(batch):
        permutation = {s.modality: rng.permutation(GRID) for s in (*encoder, *decoder)}
        taken = dict.fromkeys(permutation, 0)
        for side, streams, budget in (("input", encoder, inputs), ("target", decoder, targets)):
            counts = np.bincount(rng.integers(0, len(streams), budget - rng.integers(0, empty + 1)), minlength=len(streams))
            rows = {"modality": [], "position": [], "id": [], "input": []}
            for m, (stream, n) in enumerate(zip(streams, counts, strict=True)):
                n = min(n, 2) if stream.kind == "sequence" else min(n, GRID // 3)
                first = taken[stream.modality] if stream.kind != "pixels" else 0
                positions = np.arange(n) if stream.kind == "sequence" else np.sort(permutation[stream.modality][first : first + n])
                taken[stream.modality] += n if stream.kind == "tokens" else 0
                ids = rng.integers(7, stream.vocab_size or 8, n)
                if stream.kind == "pixels":
                    ids = np.minimum(used[stream.key] + np.arange(n), capacity - 1)
                    used[stream.key] += n
                rows["modality"] += [m] * n
                rows["position"] += positions.tolist()
                rows["id"] += ids.tolist()
                rows["input"] += ([START, *ids[:-1]] if n else []) if stream.kind == "sequence" else [0] * n
            missing = budget - len(rows["modality"])
            out[f"{side}_modality"].append(rows["modality"] + [PADDING] * missing)
            for name in ("position", "id") + (("input",) if side == "target" else ()):
                out[f"{side}_{name}"].append(rows[name] + [0] * missing)
    types = {"modality": np.uint8, "position": np.uint16, "id": np.int32, "input": np.int32}
    slots = {k: np.asarray(v, types[k.rsplit("_", 1)[1]]) for k, v in out.items()}
    patches = {s.key: _patches(rng, s, capacity) for s in encoder if s.kind == "pixels"}
    nothing = {"bad": np.zeros(batch, bool), "overflow": np.zeros(batch, np.int32)}
    return {**slots, **nothing, "patches": patches}


def _patches(rng: np.random.Generator, stream: Stream, capacity: int) -> np.ndarray:
    """Stored patches ``[1, capacity, P*P*C]`` with the modality's statistics, as far as its type can hold them."""
    dtype = np.dtype(modalities.get(stream.modality).dtype)
    x = modalities.destandardize(stream.modality, rng.standard_normal((1, capacity, PATCH_SIZE**2, stream.channels), np.float32))
    if dtype.kind in "iu":
        x = np.clip(np.round(x), np.iinfo(dtype).min, np.iinfo(dtype).max)
    return x.astype(dtype).reshape(1, capacity, -1)


def to_reference(
    batch: dict[str, np.ndarray], encoder: Sequence[Stream] = ENCODER_STREAMS, decoder: Sequence[Stream] = DECODER_STREAMS
) -> dict[str, dict[str, np.ndarray]]:
    """The same slots as the reference's dict of whole modalities with masks (True = hidden), spec 4; unselected pixels are 0."""
    size = batch["input_modality"].shape[0]
    mods = {}
    for side, streams in (("input", encoder), ("target", decoder)):
        for m, stream in enumerate(streams):
            length = GRID if stream.kind != "sequence" else 2 * TARGETS_FROM
            mod = mods.setdefault(
                stream.key,
                {
                    "tensor": np.zeros((size, length), np.int64),
                    "input_mask": np.ones((size, length), bool),
                    "target_mask": np.ones((size, length), bool),
                    "decoder_attention_mask": np.zeros((size, length), np.int64),
                },
            )
            for b in range(size):
                rows = np.flatnonzero(batch[f"{side}_modality"][b] == m)
                where, ids = batch[f"{side}_position"][b, rows].astype(int), batch[f"{side}_id"][b, rows]
                if stream.kind == "sequence" and side == "target" and len(rows):
                    ids = np.append(batch["target_input"][b, rows[:1]], ids)
                    where = TARGETS_FROM + np.arange(len(ids))
                mod[f"{side}_mask"][b, where] = False
                mod["tensor"][b, where] = ids
                if side == "target" and len(where):
                    mod["decoder_attention_mask"][b, where if stream.kind == "sequence" else where.min()] = (
                        1 if stream.kind == "sequence" else len(where)
                    )
    for stream in encoder:
        if stream.kind == "pixels":
            mod = mods[stream.key]
            mod["tensor"] = _image(stream, batch["patches"][stream.key], mod["tensor"], mod["input_mask"])
    return mods


def _image(stream: Stream, patches: np.ndarray, rows: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Standardised images ``[B, C, H, W]`` with patch ``rows[b, p]`` at each position p that is not hidden."""
    side, p = modalities.IMAGE_SIZE // PATCH_SIZE, PATCH_SIZE
    x = modalities.standardize(stream.modality, patches[0].reshape(-1, p * p, stream.channels))
    x = np.where(hidden[..., None, None], np.zeros((), x.dtype), x[rows])  # [B, N, P*P, C]
    x = x.reshape(len(rows), side, side, p, p, stream.channels).transpose(0, 5, 1, 3, 2, 4)
    return np.ascontiguousarray(x.reshape(len(rows), stream.channels, modalities.IMAGE_SIZE, modalities.IMAGE_SIZE))
