"""The notebooks: in the form that Colab opens, without outputs, in the README; and each runs from top to bottom (the longer ones: slow)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_notebook
from matplotlib.image import imread

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/terramind-jax/terramind_jax/blob/main/notebooks/"
INSTALL = '%pip install -q "terramind_jax[torch] @ git+https://github.com/terramind-jax/terramind_jax"\nimport terramind_jax as tm'

# How many figures each shows, and what its variables are for a short run.
SHORT = {
    "1_any_to_any_generation": (7, {"STEPS": "1"}),
    "2_tokenizers": (4, {}),
    "3_large_scenes": (5, {"SIZE, STEPS": "288, 1"}),
    "4_pretraining_on_your_own_data": (3, {"COUNT, STEPS": "16, 3"}),
    "5_finetuning_with_tim": (4, {"COUNT, SIZE, EPOCHS": "8, 64, 2"}),
    "6_exchange_with_terratorch": (1, {}),
    "7_looking_inside": (6, {}),
}
QUICK = ("3_large_scenes", "7_looking_inside")


def test_there_are_seven():
    assert [path.stem for path in NOTEBOOKS] == [*SHORT]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_what_colab_opens(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) and all(re.fullmatch(r"[\w-]{1,64}", cell["id"]) for cell in cells)
    for cell in cells:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code and cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert f"({COLAB}{path.name})" in "".join(cells[0]["source"])
    sources = run_notebook.cells(path)
    assert sources[0] == INSTALL and sources[1].startswith("%matplotlib inline\n")  # else figures of our own are not shown
    commands = any("!terramind-jax generate" in source for source in sources)  # a TPU would be taken if the notebook asked for it itself
    assert ("!terramind-jax info\n" if commands else "print(jax.devices())") in sources[1]
    for source in sources:
        compile(run_notebook.plain(source), path.name, "exec")


def test_the_readme_lists_them():
    readme = (REPOSITORY / "README.md").read_text()
    assert re.findall(re.escape(COLAB) + r"([\w.]+)\)", readme) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in NOTEBOOKS]
)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    figures, values = SHORT[path.stem]
    program = [sys.executable, Path(__file__).parent / "run_notebook.py", path, tmp_path / "figures"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERRAMIND_WEIGHTS": "random"}
    run = [*program, *(f"{name}={value}" for name, value in values.items())]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = sorted((tmp_path / "figures").iterdir())
    assert len(shown) == figures and all(imread(figure).std() > 0.01 for figure in shown)
