"""What a command has done, in a folder of its own beside its outputs, so that the same command goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from terramind_jax import files

FOLDER = "unfinished"


@dataclasses.dataclass
class Journal:
    """`done` tells of each piece of work how far it is; `folder` holds it and half-made files, and goes when all is done."""

    folder: Path
    command: Mapping[str, Any]
    done: dict[str, int]

    def folder_of(self, *piece: str) -> Path:
        """For what is half made of a scene, or within it of some that are done together."""
        folder = self.folder.joinpath(*piece)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, *scenes: str) -> None:
        """These scenes are done, all at once, and nothing is needed of what was half made of them, nor of its counts."""
        self.done = {piece: count for piece, count in self.done.items() if piece.split("/")[0] not in scenes} | dict.fromkeys(scenes, 1)
        self.save()
        for scene in scenes:
            shutil.rmtree(self.folder_of(scene))

    def get(self, *piece: str) -> int:
        return self.done.get("/".join(piece), 0)

    def set(self, *piece: str, count: int) -> None:
        """The work up to `count` is on disk."""
        self.done["/".join(piece)] = count
        self.save()

    def tags(self, scene: str) -> dict[str, str]:
        """What a file of a scene is made from, for the file to say: the whole command, but of its scenes this one."""
        told = {name: x for name, x in self.command.items() if name != "scenes"} | {"scene": scene}
        return {f"terramind_jax_{name}": x if isinstance(x, str) else json.dumps(x) for name, x in told.items()}

    def save(self) -> None:
        text = json.dumps({"command": self.command, "done": self.done}, indent=2)
        files.write_text(files.folder(self.folder / "journal.json"), text)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Tells what is left of what was stopped; nothing is left of what was finished, or failed before anything was done."""
        if kind is None or (not self.done and not issubclass(kind, KeyboardInterrupt)):
            shutil.rmtree(self.folder)
        elif issubclass(kind, KeyboardInterrupt):
            print(f"\nStopped. What is done stays in {self.folder}; the same command goes on from there.", flush=True)


def check_outputs(out: Path, outputs: Iterable[Path]) -> None:
    """Raises FileExistsError if outputs are there already, unless a stopped command may have written them.

    And NotADirectoryError if `out`, or a folder that it is to lie in, is a file.
    """
    deepest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not deepest.is_dir():
        raise NotADirectoryError(f"{deepest} is a file; expected a folder.")
    there = [path for path in outputs if path.exists()]
    if not there or (out / FOLDER / "journal.json").is_file():
        return
    first = f", the first of {len(there)} outputs that do" if there[1:] else ""
    raise FileExistsError(f"{there[0]} exists already{first}; choose another folder, or delete what is there first.")


def start(out: Path, command: Mapping[str, Any]) -> Journal:
    """A new journal in `out`, or the old one if the same command was stopped; FileExistsError if that was another."""
    folder, command = out / FOLDER, json.loads(json.dumps(command))
    if (folder / "journal.json").is_file():
        found = json.loads((folder / "journal.json").read_text())
        _check_same(folder, found["command"], command)
        print(f"Going on with what is unfinished in {folder}", flush=True)
        return Journal(folder, command, found["done"])
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, command, {})
    journal.save()
    return journal


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in dict.fromkeys((*before, *now)):
        was, is_now = before.get(name), now.get(name)
        if was != is_now:
            differs = f"its {name} was {json.dumps(was)}, now it is {json.dumps(is_now)}"
            raise FileExistsError(f"{folder} holds the work of another command: {differs}; repeat that one, or delete the folder.")
