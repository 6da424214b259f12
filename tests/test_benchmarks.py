"""The benchmarks are run as scripts, whose folder comes first where Python looks for modules."""

import importlib.util
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_hides_a_module(script):
    assert importlib.util.find_spec(script.stem) is None
