"""A page in the browser: a tile or uploaded GeoTIFFs in, what a model makes of them beside it. What the command ``serve`` does.

All files of the page lie in one temporary folder, which goes with the server. What has not changed for an hour goes earlier.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.image
import numpy as np

from terramind_jax import config, generate_scenes, geo, modalities, plot, sources, zoo
from terramind_jax.data.errors import DataError
from terramind_jax.scenes import reading
from terramind_jax.tokenizer import diffusion
from terramind_jax.train import pretrain

MAX_AGE = 3600.0  # seconds after which files are deleted
# What a TIFF begins with. GDAL goes by content, not by name: a VRT in the place of a GeoTIFF could make it read any file of this machine.
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ERRORS = (ValueError, FileNotFoundError, ConnectionError, DataError)  # told on the page
INTRODUCTION = """## TerraMind: generate modalities from others

Choose a tile or upload GeoTIFFs, one for each modality and all on one grid, of {max_mb} MB at most. Choose what the model, {model}, reads
and what it generates. All that you upload and make is deleted after {minutes:.0f} minutes.
"""


@dataclasses.dataclass(frozen=True)
class Desk:
    """What a page works with: `weights`, `model`, `tokenizers` and `lulc_codes` are those of `generate_scenes.run`.

    Args:
      folder: for all that visitors upload and make.
      tiles: folder of GeoTIFFs ``MODALITY/NAME.tif`` to choose from; None: visitors bring theirs.
      max_mb: megabytes (2**20 bytes) of one GeoTIFF at most, as a file and unpacked.
    """

    folder: Path
    weights: str | os.PathLike
    model: str | None = None
    tokenizers: str | os.PathLike | None = None
    tiles: str | os.PathLike | None = None
    lulc_codes: str | None = None
    max_mb: int = 64


@dataclasses.dataclass(frozen=True)
class Made:
    """PNGs by what they show, inputs first; one of all of them with their scales and classes; and the generated GeoTIFFs."""

    pictures: dict[str, Path]
    sheet: Path
    files: list[Path]


# ---- what there is to choose from ----


def find_tiles(folder: str | os.PathLike | None) -> dict[str, dict[str, Path]]:
    """``{name: {modality: path}}`` of a folder ``MODALITY/NAME.tif``; a FileNotFoundError if it holds none."""
    found: dict[str, dict[str, Path]] = {}
    if folder is None:
        return found
    names = [name for name, modality in modalities.MODALITIES.items() if modality.is_image]
    for name in names:
        for path in sorted(Path(folder, name).glob("*")):
            if path.suffix.lower() in reading.SUFFIXES:
                found.setdefault(path.stem, {})[name] = path
    if not found:
        raise FileNotFoundError(f"No GeoTIFFs in {folder}; expected MODALITY/NAME.tif with a MODALITY among {', '.join(names)}.")
    return dict(sorted(found.items()))


def name_of(desk: Desk) -> str:
    return desk.model or Path(desk.weights).resolve().name


def choices(desk: Desk) -> tuple[list[str], list[str]]:
    """The images that a model takes, and those that it makes. Land cover is taken if its codes are known."""
    if desk.model is None:
        generate_scenes.check_workdir(desk.weights)
        workdir = generate_scenes.workdir(desk.weights)
        sources.declare(workdir)
        encoder, decoder = pretrain.streams(config.of_workdir(workdir))
    elif zoo.get(desk.model).version == "v1":
        encoder, decoder = modalities.ENCODER_STREAMS, modalities.DECODER_STREAMS
    else:
        encoder, decoder = modalities.V01_ENCODER_STREAMS, modalities.V01_DECODER_STREAMS
    images = [name for name, modality in modalities.MODALITIES.items() if modality.is_image]
    read, made = {stream.key for stream in encoder}, {stream.modality for stream in decoder}
    inputs = [name for name in images if modalities.input_stream(name).key in read and (name != "LULC" or desk.lulc_codes)]
    return inputs, [name for name in images if name in made]


# ---- from what is chosen to what is shown ----


def make(
    desk: Desk,
    tile: str | None,
    uploads: Mapping[str, str | os.PathLike | None],
    inputs: Sequence[str],
    to: Sequence[str],
    *,
    seed: int = 0,
    timesteps: int | None = None,
) -> Made:
    """Generates `to` from a tile, or from uploads where none is chosen, in a new folder of `desk.folder`.

    Args:
      tile: one of `find_tiles`; what it has of `to` is shown beside what was generated.
      uploads: GeoTIFFs in `desk.folder` by modality.
      inputs, to, seed, timesteps: as of `generate_scenes.run`, which makes the same of the same files.

    Raises:
      ValueError: everything that a visitor can do wrong, in one sentence without paths of this machine. Nothing is left of it.
    """
    steps = None if timesteps is None else int(timesteps)
    with _session(desk) as session:
        return _make(desk, session, tile, uploads, inputs, to, seed=int(seed), timesteps=steps)


def quicklook(desk: Desk, tile: str | None, uploads: Mapping[str, str | os.PathLike | None], inputs: Sequence[str]) -> Path | None:
    """A PNG of the inputs that are chosen, of uploads those that are there; None: there is nothing to see yet. The rest as of `make`."""
    inputs = [name for name in inputs if tile or uploads.get(name)]
    if not inputs:
        return None
    with _session(desk) as session:
        scene = _open(desk, session, tile, uploads, inputs)
        shown = {view: reading.glance(scene, name, generate_scenes.PICTURE) for name in inputs for view in plot.views(name)}
        plot.images(shown, columns=2, path=session / "quicklook.png")
        for name in inputs:
            shutil.rmtree(session / name)
    return session / "quicklook.png"


_at_work: set[Path] = set()  # sessions in which a thread still makes something


@contextlib.contextmanager
def _session(desk: Desk) -> Iterator[Path]:
    """A new folder of `desk.folder`. If what is done in it fails it goes, and what a visitor can do wrong is told without its path."""
    session = Path(tempfile.mkdtemp(prefix="session_", dir=desk.folder))
    _at_work.add(session)
    try:
        yield session
    except BaseException as error:
        shutil.rmtree(session)
        if isinstance(error, ERRORS):
            raise ValueError(str(error).replace(f"{session}{os.sep}", "")) from error
        raise
    finally:
        _at_work.discard(session)


def _open(desk: Desk, session: Path, tile, uploads, inputs, to=()) -> reading.Scene:
    """The inputs, and what a tile has of `to`, as copies in `session`."""
    given = find_tiles(desk.tiles).get(tile) if tile else {m: inside(desk.folder, path) for m, path in uploads.items() if path}
    if given is None:
        raise ValueError(f"There is no tile {tile!r}.")
    absent = [name for name in inputs if name not in given]
    if absent:
        raise ValueError(f"There is no {absent[0]} among the {'files of this tile' if tile else 'uploads'}; add it, or leave it out.")
    names = {m: re.sub(r"[^\w.-]", "_", path.stem)[:80] for m, path in given.items()}
    compared = [m for m in to if m in given and m not in inputs and (m != "LULC" or desk.lulc_codes)]
    taken = {m: take(given[m], session / m / f"{names[m]}.tif", m, desk.max_mb) for m in (*inputs, *compared)}
    return reading.open_scene(names[inputs[0]], taken, desk.lulc_codes)


def _make(desk: Desk, session: Path, tile, uploads, inputs, to, **options) -> Made:
    generate_scenes.check_names(dict.fromkeys(inputs), to, desk.lulc_codes)
    scene = _open(desk, session, tile, uploads, inputs, to)
    network = _network(desk.weights, desk.model, tuple(inputs), tuple(to), desk.tokenizers)
    same = dict(weights=desk.weights, model=desk.model, tokenizers=desk.tokenizers, lulc_codes=desk.lulc_codes, network=network)
    given = {m: scene.paths[m] for m in inputs}
    tags = dict(model=name_of(desk), inputs={m: path.name for m, path in given.items()})  # no folders of this machine
    written = generate_scenes.run(inputs=given, to=to, out=session / "made", quicklook=False, tags=tags, **same, **options)
    look = generate_scenes.look(session / "made", scene, inputs, to)
    shown = pictures(look)
    for label, image in shown.items():
        matplotlib.image.imsave(session / f"{label}.png", image)
    plot.contact_sheet(session / "sheet.png", [look], title="All, with scales and classes")
    files = [path.replace(session / f"{scene.name}_{path.parent.name}.tif") for path in written]  # of one folder, so that names differ
    return Made({label: session / f"{label}.png" for label in shown}, session / "sheet.png", files)


@functools.lru_cache(maxsize=1)
def _network(weights, model, inputs, to, tokenizers):
    return generate_scenes.load_network(weights, model, inputs, to, tokenizers)


def inside(folder: Path, path: str | os.PathLike) -> Path:
    """A visitor's file; a ValueError if it lies anywhere but in `folder`, a FileNotFoundError if it has been deleted."""
    path = Path(path).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError("This is not a file that was uploaded.")
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is no longer here, as uploads are kept for {MAX_AGE / 60:.0f} minutes; upload it again.")
    return path


def take(source: Path, target: Path, modality: str, max_mb: int) -> Path:
    """Copies one GeoTIFF to `target` and checks its header. Raises a ValueError for what is too large, no TIFF, or not `modality`."""
    if source.stat().st_size > max_mb << 20:
        raise ValueError(f"{source.name} is larger than {max_mb} MB, the limit of this page.")
    with open(source, "rb") as file:
        if file.read(4) not in TIFF:
            raise ValueError(f"{source.name} is no GeoTIFF.")
    target.parent.mkdir()
    shutil.copyfile(source, target)
    header = geo.read_header(target, modality)
    unpacked = header.place.height * header.place.width * header.bands * np.dtype(header.dtype).itemsize
    if unpacked > max_mb << 20:
        raise ValueError(f"{source.name} holds {unpacked / 2**20:.0f} MB of pixels, and the limit of this page is {max_mb} MB.")
    return target


def pictures(scene: plot.Scene) -> dict[str, np.ndarray]:
    """Every view of a scene as colours ``[h, w, 3]`` in 0-1, by its name; what was generated has the limits of what was measured."""
    given = dataclasses.replace(scene, truth={**scene.inputs, **scene.truth})
    shown = {"input": scene.inputs, "generated": scene.generated, "tile": scene.truth}
    return {f"{view} ({role})": plot.render(view, x, given.limits(view)) for role, found in shown.items() for view, x in found.items()}


def delete_old(folder: Path, age: float = MAX_AGE) -> None:
    """Deletes what lies in `folder`, each file or folder in it as a whole, if nothing of it has changed for `age` seconds."""
    before = time.time() - age
    for entry in folder.iterdir():
        try:
            if all(path.stat().st_mtime < before for path in (entry, *entry.rglob("*"))):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except FileNotFoundError:  # it is being written, or goes by itself
            continue


# ---- the page ----


def run(
    *,
    weights: str | os.PathLike,
    model: str | None = None,
    tokenizers: str | os.PathLike | None = None,
    tiles: str | os.PathLike | None = None,
    lulc_codes: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_mb: int = 64,
) -> None:
    """Serves the page at ``http://{host}:{port}`` until Ctrl-C or SIGTERM; the rest as of `Desk`.

    What is being generated then is given up, and the process ends with it.

    Raises:
      FileNotFoundError: no weights, or no tiles.
      ImportError: Gradio, the extra ``demo``, is not installed.
      ValueError: an unknown model, a limit below 1 MB, or a port that is taken.
    """
    if max_mb < 1:
        raise ValueError(f"max_mb is {max_mb}; expected at least 1.")
    with tempfile.TemporaryDirectory(prefix="terramind_jax_", ignore_cleanup_errors=True) as folder:  # files may come as it goes
        desk = Desk(Path(folder).resolve(), weights, model, tokenizers, tiles, lulc_codes, max_mb)
        blocks = start(desk, host, port)
        threading.Thread(target=_keep_deleting, args=[desk.folder], daemon=True).start()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes then, too
        print(f"The page is at http://{host}:{port}; Ctrl-C ends it.", flush=True)
        blocks.block_thread()
    if _at_work:  # the interpreter would abort as it ends, with a thread in the midst of XLA
        sys.stdout.flush()
        os._exit(0)


def start(desk: Desk, host: str, port: int):
    """Serves a page in threads of its own, and returns it as ``gradio.Blocks``. Raises as `run` does."""
    blocks = page(desk)
    try:
        most = desk.max_mb << 20
        blocks.launch(server_name=host, server_port=port, share=False, max_file_size=most, quiet=True, prevent_thread_lock=True)
    except (OSError, OverflowError) as error:  # taken, another machine's, or no port
        raise ValueError(f"The page cannot be served at {host}:{port}; choose another --host or --port.") from error
    return blocks


def _keep_deleting(folder: Path) -> None:
    while True:
        time.sleep(MAX_AGE / 6)
        delete_old(folder)


def page(desk: Desk):
    """The page as ``gradio.Blocks``, not yet served. Raises as `run` does."""
    os.environ["GRADIO_TEMP_DIR"] = str(desk.folder)  # what Gradio keeps lies where old files are deleted
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # it would keep copies in the browser
    try:
        import gradio as gr
    except ImportError:
        raise ImportError("The page needs Gradio, which is not installed: pip install 'terramind-jax[demo]'.") from None
    readable, makeable = choices(desk)
    tiles = find_tiles(desk.tiles)

    def told(function, *arguments, **options):
        """What `function` returns; a ValueError is shown until the visitor closes it."""
        try:
            return function(desk, *arguments, **options)
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def choose(tile, inputs):
        """What can be chosen of another tile, and the places for uploads where it is none."""
        known = [name for name in readable if name in tiles[tile]] if tile else readable
        inputs = [name for name in inputs if name in known] or known[:1]
        return [gr.CheckboxGroup(known, value=inputs), *places(tile, inputs)]

    def places(tile, inputs):
        return [gr.File(visible=not tile and name in inputs) for name in readable]

    def glance(tile, inputs, *uploads):
        picture = told(quicklook, tile, dict(zip(readable, uploads, strict=True)), inputs)
        return gr.Image(picture, visible=picture is not None)

    def generate(tile, inputs, to, seed, timesteps, *uploads):
        made = told(make, tile, dict(zip(readable, uploads, strict=True)), inputs, to, seed=seed, timesteps=timesteps)
        names, files = list(made.pictures), [str(path) for path in made.files]
        left, right = names[0], next(name for name in names if name.endswith("(generated)"))
        sheet = gr.Image(made.sheet, visible=True)
        return made, gr.Dropdown(names, value=left), gr.Dropdown(names, value=right), compare(made, left, right), sheet, files

    def compare(made, left, right):
        pair = tuple(made.pictures.get(name) for name in (left, right)) if made else (None, None)
        return pair if all(path and path.is_file() for path in pair) else None

    first = next(iter(tiles), "")
    inputs = [name for name in readable if not first or name in tiles[first]]
    with gr.Blocks(title="terramind_jax", analytics_enabled=False) as blocks:
        made = gr.State()
        gr.Markdown(INTRODUCTION.format(model=name_of(desk), minutes=MAX_AGE / 60, max_mb=desk.max_mb))
        with gr.Row():
            with gr.Column(scale=1):
                tile = gr.Dropdown([("GeoTIFFs of mine", ""), *tiles], value=first, label="Tile", visible=bool(tiles))
                chosen = gr.CheckboxGroup(inputs, value=inputs[:1], label="Inputs")
                uploads = [
                    gr.File(label=name, file_types=[*reading.SUFFIXES], visible=not tiles and name in inputs[:1]) for name in readable
                ]
                to = gr.CheckboxGroup(makeable, value=[name for name in makeable if name not in inputs[:1]][:1], label="Outputs")
                seed = gr.Number(0, label="Seed", info="The same seed makes the same files.", precision=0, minimum=0)
                info = "Of outputs that are decoded by diffusion: with the released models all but LULC. More take longer."
                timesteps = gr.Slider(1, 50, value=diffusion.steps_of("dpmpp"), step=1, label="Steps", info=info)
                button = gr.Button("Generate", variant="primary")
                seen = gr.Image(label="Quick-look", show_label=False, interactive=False, visible=False, buttons=[], format="png")
            with gr.Column(scale=2):
                with gr.Row():
                    left, right = gr.Dropdown([], label="Left"), gr.Dropdown([], label="Right")
                slider = gr.ImageSlider(label="Side by side", max_height=768, format="png")
                sheet = gr.Image(label="All", show_label=False, interactive=False, visible=False, buttons=["fullscreen"], format="png")
                files = gr.File(label="GeoTIFFs", file_count="multiple", interactive=False)
        looked = dict(fn=glance, inputs=[tile, chosen, *uploads], outputs=seen, api_visibility="private", trigger_mode="always_last")
        tile.change(choose, [tile, chosen], [chosen, *uploads], api_visibility="private").then(**looked)
        chosen.input(places, [tile, chosen], uploads, api_visibility="private").then(**looked)
        gr.on([blocks.load, *(event for upload in uploads for event in (upload.upload, upload.clear))], **looked)
        results = [made, left, right, slider, sheet, files]
        button.click(generate, [tile, chosen, to, seed, timesteps, *uploads], results, api_name="generate", show_progress_on=slider)
        gr.on([left.input, right.input], compare, [made, left, right], slider, api_name="compare")
    return blocks
