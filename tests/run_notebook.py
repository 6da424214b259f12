"""Runs one notebook top to bottom in this process, with small networks if weights are random: ``run_notebook.py FILE OUT NAME=VALUE...``

Lines that begin with ``%`` are left out, ``!terramind-jax ...`` runs in this process, and ``NAME = ...`` of the notebook becomes VALUE. The
figures that cells show go to OUT as ``CELL_NUMBER.png``.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import nano_models
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from terramind_jax import cli


def cells(path: str | os.PathLike) -> list[str]:
    """The sources of a notebook's code cells."""
    return ["".join(cell["source"]) for cell in json.loads(Path(path).read_text())["cells"] if cell["cell_type"] == "code"]


def plain(source: str) -> str:
    """A cell as Python: without magic, and with commands as calls of ``shell``."""
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    return "\n".join(re.sub(r"^(\s*)!(.*)$", lambda m: f"{m[1]}shell(f{m[2]!r})", line) for line in lines)


def shell(command: str) -> None:
    """The package's own command; a notebook needs no other."""
    program, *arguments = shlex.split(command)
    if program != "terramind-jax" or cli.main(arguments):
        raise RuntimeError(f"This failed: {command}")


def run(path: str | os.PathLike, out: Path, values: Mapping[str, str]) -> dict[str, object]:
    """Executes the cells one after another, in one namespace, and returns that."""
    names = {"shell": shell, "__name__": "__main__"}
    out.mkdir(parents=True, exist_ok=True)
    for i, source in enumerate(cells(path)):
        for name, value in values.items():
            source = re.sub(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, flags=re.MULTILINE)
        shown = _execute(plain(source), f"{Path(path).name}, cell {i}", names)
        figures = [*([shown] if isinstance(shown, Figure) else []), *map(plt.figure, plt.get_fignums())]
        for k, figure in enumerate(figures):
            figure.savefig(out / f"{i:02d}_{k}.png", dpi=100)
        plt.close("all")
    return names


def _execute(source: str, where: str, names: dict) -> object:
    """Runs a cell and returns what a notebook would show of it, the value of a last expression."""
    tree = ast.parse(source, where)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    return eval(compile(last, where, "eval"), names) if last else None


if __name__ == "__main__":
    notebook, folder, *given = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TERRAMIND_WEIGHTS") == "random":
            nano_models.shrink(patch, "base")
        run(notebook, Path(folder), dict(pair.split("=", 1) for pair in given))
