"""What a protocol leaves: tables in Markdown and CSV, with the published numbers of the same protocol below its own."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from terramind_jax.convert.files import check_free
from terramind_jax.data import shards

PUBLISHED = Path(__file__).parent / "published.json"
OWN = "this run"

Row = Mapping[str, Any]  # column to text or number; what a row lacks, and NaN, is shown as a dash


@contextmanager
def folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder that is `out` when the ``with`` block ends well, and else is removed; a FileExistsError if `out` exists."""
    check_free(Path(out))
    with shards.new_folder(os.fspath(out)) as partial:
        yield Path(partial)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, with all columns in the order in which they are first seen; columns without anything are left out."""
    rows = [{name: x for name, x in row.items() if not _is_nothing(x)} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_text(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_per_cent(rows: Sequence[Row]) -> list[Row]:
    """Rows with every share, which is what their floats are, times a hundred."""
    return [{name: 100 * x if isinstance(x, float) else x for name, x in row.items()} for row in rows]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows with every digit."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if _is_nothing(x) else x for name, x in row.items()} for row in rows)


def write_report(path: Path, title: str, *paragraphs: str) -> str:
    """A Markdown file, and its text."""
    text = "\n\n".join([f"# {title}", *(p for p in paragraphs if p)]) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def published(protocol: str) -> tuple[list[dict[str, Any]], str]:
    """The published rows of a protocol, each with its ``source``, and what is to be known when comparing with them."""
    known = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    found = known["protocols"][protocol]
    return [{**row, "source": known["sources"][row["source"]]} for row in found["rows"]], found["note"]


def compared(protocol: str, rows: Sequence[Row], *others: str) -> str:
    """Own rows above those published ones that have a number in a column of theirs, and the note on these; rows of `others`, too.

    Where own rows name their data sets, published ones of another are left out. Where none is left there is no note; a protocol of
    which nothing is published keeps its own, which says so.
    """
    known, note = published(protocol)
    theirs = known + [row for other in others for row in published(other)[0]]
    own = {row["data set"] for row in rows if "data set" in row}
    theirs = [row for row in theirs if not own or row.get("data set") in (None, *own)]
    columns = {name for row in rows for name in row}
    measured = {name for row in rows for name, x in row.items() if isinstance(x, float)}
    theirs = [{name: x for name, x in row.items() if name in (*columns, "source")} for row in theirs if measured & row.keys()]
    shown = table([*({**row, "source": OWN} for row in rows), *theirs])
    return f"{shown}\n\n{note}" if theirs or not known else shown


def _is_nothing(x: Any) -> bool:
    return x is None or x == "" or (isinstance(x, float) and math.isnan(x))


def _text(x: Any) -> str:
    if x is None:
        return "-"
    if not isinstance(x, float):
        return str(x)
    return f"{x:.2f}" if abs(x) >= 10 or x == 0 else f"{x:.3f}"
