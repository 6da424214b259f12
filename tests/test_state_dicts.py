"""Names and shapes of every released model's state dict are the reference's, which tests/parity/make_golden.py wrote down."""

import json
import pathlib

import pytest

from terramind_jax import build, zoo
from terramind_jax.convert import rules
from terramind_jax.sources import rules_of

STATE_DICTS = json.loads((pathlib.Path(__file__).parent / "golden" / "state_dicts.json").read_text())


@pytest.mark.parametrize("name", STATE_DICTS)
def test_names_and_shapes(name):
    model = build.model(name)
    ours = rules.shapes(model.variables, rules_of(model.module))
    assert {key: list(shape) for key, shape in ours.items()} == STATE_DICTS[name]


def test_counts_are_the_published_ones():
    counts = [len(STATE_DICTS[f"terramind_v1_{size}_encdec"]) for size in zoo.SIZES]
    assert counts == [306, 350, 374, 674]
    assert (len(STATE_DICTS["terramind_v1_tokenizer_dem"]), len(STATE_DICTS["terramind_v1_tokenizer_lulc"])) == (601, 310)
    assert set(STATE_DICTS) == {name for name, entry in zoo.MODELS.items() if entry.kind in ("encdec", "tokenizer")}
