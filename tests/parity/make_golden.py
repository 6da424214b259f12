"""Writes what the ordinary tests check against without TerraTorch: names and shapes of its state dicts.

make golden        # or: python tests/parity/make_golden.py, in an environment that has TerraTorch
"""

from __future__ import annotations

import json
import pathlib
import sys
from functools import partial
from unittest import mock

import batches
import peer
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import golden_models as golden  # noqa: E402

from terramind_jax import zoo


def state_dicts() -> dict[str, dict[str, list[int]]]:
    """``{model: {name: shape}}`` of every whole model that a published file holds (spec 10.2 to 10.5)."""
    makers = {f"terramind_v1_{size}_encdec": partial(peer.encdec, size) for size in zoo.SIZES}
    makers |= {name: partial(peer.build, name) for name, entry in zoo.MODELS.items() if entry.kind == "tokenizer"}
    return {name: {key: list(x.shape) for key, x in make().state_dict().items()} for name, make in makers.items()}


def outputs() -> dict[str, list[float]]:
    """Summaries of what the models compute with the weights of `golden_models`."""
    return {**_features(), **_pretraining(), **_class_map_tokenizer(), **_diffusion_tokenizer()}


def _with_weights(model: torch.nn.Module) -> torch.nn.Module:
    state = peer.numpy_state(model)
    peer.load_state(model, golden.weights({name: x.shape for name, x in state.items()}, state))
    return model


def _features() -> dict[str, list[float]]:
    model = _with_weights(peer.build("terramind_v1_tiny", modalities=list(golden.FEATURES)))
    out = model({name: peer.nchw(golden.image(channels)) for name, channels in golden.FEATURES.items()})
    return {f"features of the {which} layer": golden.summary(peer.array(out[i])) for which, i in (("first", 0), ("last", -1))}


def _pretraining() -> dict:
    model, batch = _with_weights(peer.encdec("tiny")), batches.draw(2, 64, 64, seed=3, empty=8)
    reference = {key: peer.tensors(mod) for key, mod in batches.to_reference(batch).items()}
    loss, losses = model(reference, num_encoder_tokens=64, num_decoder_tokens=64, loss_type="mod")
    return {"pretraining loss": float(loss), "pretraining losses": {key: float(x) for key, x in losses.items()}}


def _class_map_tokenizer() -> dict[str, list[float]]:
    model = _with_weights(peer.build("terramind_v1_tokenizer_lulc"))
    tokens = model.tokenize(torch.from_numpy(golden.classes()))
    logits = model.decode_tokens(torch.from_numpy(golden.tokens(4375, 4)))
    return {"LULC tokens": tokens.flatten().tolist(), "LULC logits": golden.summary(peer.nhwc(logits))}


def _diffusion_tokenizer() -> dict[str, list[float]]:
    model = _with_weights(peer.build("terramind_v1_tokenizer_dem"))
    tokens = model.tokenize(peer.nchw(golden.image(1, 64)))
    start = peer.nchw(golden.noise(1, 32))
    with mock.patch.object(torch, "randn", lambda *args, **kwargs: start):
        pixels = model.decode_tokens(torch.from_numpy(golden.tokens(15360, 2)), timesteps=2)
    return {"DEM tokens": tokens.flatten().tolist(), "DEM pixels": golden.summary(peer.nhwc(pixels))}


def write(name: str, value: dict) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(part, separators=(',', ':'))}" for key, part in value.items()]
    golden.GOLDEN.mkdir(exist_ok=True)
    (golden.GOLDEN / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write("state_dicts.json", state_dicts())
    with torch.no_grad():
        write("outputs.json", outputs())
