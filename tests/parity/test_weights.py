"""Our state dicts load strictly into TerraTorch's models of the same name, and theirs come back with every byte."""

import numpy as np
import peer
import pytest
import torch

import terramind_jax as tm

MODELS = {
    "terramind_v1_tiny": dict(modalities=["S2L2A", "coords", {"PLANET": 6}], merge_method="concat"),
    "terramind_v1_tiny_generate": dict(modalities=["S2L2A"], output_modalities=["LULC", "coords"]),
    "terramind_v1_tiny_tim": dict(modalities=["S2L2A", "S1GRD"], tim_modalities=["coords", "LULC"]),
    "terramind_v01_base": dict(modalities=["S2L2A"]),
    "terramind_v1_tokenizer_s1rtc": {},
    "terramind_v1_tokenizer_lulc": {},
}


def reference(name, seed, options):
    return peer.encdec("tiny", seed=seed) if name.endswith("_encdec") else peer.build(name, seed=seed, **options)


@pytest.mark.parametrize("name", [*MODELS, "terramind_v1_tiny_encdec"])
def test_there_and_back(name, tmp_path):
    options = MODELS.get(name, {})
    model = reference(name, 3, options)
    theirs = peer.numpy_state(model)
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    ours = tm.load(name, tmp_path / "theirs.pt", **options)
    exported = tm.to_torch(ours)
    assert set(exported) == set(theirs)
    assert all(exported[key].tobytes() == theirs[key].tobytes() for key in theirs)
    tm.save(ours, tmp_path / "ours.pt")
    saved = torch.load(tmp_path / "ours.pt", weights_only=True)
    fresh = reference(name, 4, options)
    fresh.load_state_dict(saved, strict=True)
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in fresh.state_dict().items())


def test_variables_from_a_live_state_dict():
    model = peer.build("terramind_v1_tiny", modalities=["S2L2A"], seed=5)
    variables = tm.from_torch(model.state_dict(), "terramind_v1_tiny", modalities=["S2L2A"])
    np.testing.assert_array_equal(variables["params"]["encoder_norm"]["scale"], peer.array(model.encoder_norm.weight))
