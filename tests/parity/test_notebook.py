"""Notebook 6 where TerraTorch is installed: it compares with TerraTorch itself."""

import pathlib

import peer  # noqa: F401 - imports TerraTorch, also where torchvision does not load
import run_notebook

NOTEBOOK = pathlib.Path(__file__).parents[2] / "notebooks" / "6_exchange_with_terratorch.ipynb"


def test_the_notebook_of_exchange_compares_with_terratorch(monkeypatch, tmp_path):
    """The smallest released model: TerraTorch knows no smaller one. Its state dict loads strictly, or the cell fails."""
    monkeypatch.setenv("TERRAMIND_WEIGHTS", "random")
    monkeypatch.chdir(tmp_path)
    names = run_notebook.run(NOTEBOOK, tmp_path / "figures", {"MODEL, MODALITIES": '"terramind_v1_tiny", ["S2L2A", "S1GRD"]'})
    assert names["what"] == "TerraTorch" and len(names["others"]) == len(names["features"]) == 12
    assert max(names["relative"]) < 1e-4
