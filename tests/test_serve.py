"""The page: what can be chosen, what is made of it, what is refused, what is deleted; and the page as its visitors see it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import random_networks
from matplotlib.image import imread

from terramind_jax import cli, config, generate_scenes, geo, plot, serve
from terramind_jax.modalities import STREAMS
from terramind_jax.scenes.feeding import Network

TILE = 48
PLACE = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), TILE, TILE)


@pytest.fixture(scope="module")
def network(compile_fast):
    streams = tuple(STREAMS[k] for k in ("untok_dem@224", "tok_ndvi@224", "tok_lulc@224"))
    return Network(*random_networks.build(streams, streams[1:], TILE), random_networks.build_tokenizers("NDVI", "LULC", image_size=TILE))


@pytest.fixture
def desk(network, monkeypatch, tmp_path):
    """A folder of weights and one of tiles, a and b; of the eight devices one is used."""
    settings = config.pretraining()
    settings.data.update(inputs=("DEM", "LULC"), targets=("NDVI", "LULC"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text(config.to_json(settings))
    (tmp_path / "served").mkdir()
    for modality, names in (("DEM", "ab"), ("NDVI", "a")):
        (tmp_path / "tiles" / modality).mkdir(parents=True)
        for seed, name in enumerate(names):
            write(tmp_path / "tiles" / modality / f"{name}.tif", seed)
    monkeypatch.setattr(generate_scenes, "load_network", lambda *args: network)
    monkeypatch.setattr(generate_scenes, "spread", lambda network: network)
    serve._network.cache_clear()
    return serve.Desk(tmp_path / "served", tmp_path / "weights", tiles=tmp_path / "tiles", max_mb=1)


def write(path, seed=0, bands=1, side=TILE):
    array = np.random.default_rng(seed).uniform(0, 1, (side, side, bands)).astype(np.float32)
    geo.write(path, array, like=geo.Place(PLACE.crs, PLACE.transform, side, side))
    return path


def test_what_can_be_chosen(desk, tmp_path):
    assert serve.choices(desk) == (["DEM"], ["LULC", "NDVI"])
    known = serve.Desk(desk.folder, desk.weights, lulc_codes="esri")
    assert serve.choices(known) == (["DEM", "LULC"], ["LULC", "NDVI"])
    inputs, outputs = serve.choices(serve.Desk(desk.folder, "hub", "terramind_v1_base"))
    assert inputs == ["S2L2A", "S2L1C", "S2RGB", "S1GRD", "S1RTC", "DEM", "NDVI"] and outputs[0] == "S2L2A" and len(outputs) == 6
    assert serve.choices(serve.Desk(desk.folder, "hub", "terramind_v01_base"))[1] == ["S2L2A", "S1GRD", "DEM", "LULC"]
    assert {name: [*files] for name, files in serve.find_tiles(desk.tiles).items()} == {"a": ["DEM", "NDVI"], "b": ["DEM"]}
    with pytest.raises(FileNotFoundError, match=r"No GeoTIFFs in .*weights; expected MODALITY/NAME\.tif"):
        serve.find_tiles(desk.weights)
    with pytest.raises(FileNotFoundError, match="There is no work directory nowhere"):
        serve.choices(serve.Desk(desk.folder, "nowhere"))


def test_a_tile_becomes_what_the_command_makes_of_it(desk, tmp_path):
    made = serve.make(desk, "a", {}, ["DEM"], ["NDVI", "LULC"], seed=3)
    assert [*made.pictures] == ["DEM (input)", "NDVI (generated)", "LULC (generated)", "NDVI (tile)"]
    assert [path.name for path in made.files] == ["a_NDVI.tif", "a_LULC.tif"]
    assert all(path.is_relative_to(desk.folder) for path in (*made.files, *made.pictures.values()))
    inputs = {"DEM": tmp_path / "tiles" / "DEM" / "a.tif"}
    expected = generate_scenes.run(weights=desk.weights, inputs=inputs, to=["NDVI", "LULC"], out=tmp_path / "out", seed=3)
    for path, other in zip(made.files, expected, strict=True):
        np.testing.assert_array_equal(geo.read(path), geo.read(other))
        assert geo.place(path) == PLACE
    again = serve.make(desk, "a", {}, ["DEM"], ["NDVI", "LULC"], seed=3)
    assert [path.read_bytes() for path in again.files] == [path.read_bytes() for path in made.files]
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in made.files)
    truth, generated = (imread(made.pictures[f"NDVI ({role})"])[..., :3] for role in ("tile", "generated"))
    assert imread(made.sheet).std() > 0.1
    assert truth.shape == generated.shape == (TILE, TILE, 3) and truth.std() > 0 and (truth != generated).any()


def test_an_upload_is_used_where_no_tile_is_chosen(desk):
    mine = write(desk.folder / "mine & yours.tif", seed=5)
    uploaded = serve.make(desk, "", {"DEM": mine, "NDVI": None}, ["DEM"], ["NDVI"])
    tile = serve.make(desk, "b", {"DEM": mine}, ["DEM"], ["NDVI"])
    assert [path.name for path in (*uploaded.files, *tile.files)] == ["mine___yours_NDVI.tif", "b_NDVI.tif"]
    np.testing.assert_array_equal(geo.read(uploaded.files[0].parent / "DEM" / "mine___yours.tif"), geo.read(mine))
    assert (imread(uploaded.pictures["DEM (input)"]) != imread(tile.pictures["DEM (input)"])).any()


def test_an_input_that_is_generated_again_keeps_its_colours():
    image = np.random.default_rng(0).uniform(500, 2000, (8, 8, 12))
    alone, again = (serve.pictures(plot.Scene("a", {"S2L2A": image}, made)) for made in ({}, {"S2L2A": 20 * image}))
    np.testing.assert_array_equal(again["S2L2A (input)"], alone["S2L2A (input)"])
    assert again["S2L2A (generated)"].mean() > 0.9  # in the colours of the input


def test_a_quicklook_of_what_is_chosen(desk):
    mine = write(desk.folder / "mine.tif", seed=5)
    assert serve.quicklook(desk, "", {"DEM": None}, ["DEM"]) is None and serve.quicklook(desk, "a", {}, []) is None
    own, b = serve.quicklook(desk, "", {"DEM": mine}, ["DEM"]), serve.quicklook(desk, "b", {}, ["DEM"])
    both = serve.quicklook(desk, "a", {}, ["DEM", "NDVI"])
    assert (imread(own) != imread(b)).any() and imread(both).shape[1] > 1.5 * imread(b).shape[1]
    assert {path.name for path in desk.folder.rglob("*") if path.is_file()} == {"mine.tif", "quicklook.png"}  # no copies
    before = sorted(desk.folder.rglob("*"))
    with pytest.raises(ValueError, match="There is no NDVI among the files of this tile"):
        serve.quicklook(desk, "b", {}, ["NDVI"])
    (desk.folder / "large").mkdir()
    other = write(desk.folder / "large" / "other.tif", side=64)
    with pytest.raises(ValueError, match="^NDVI/other.tif and DEM/mine.tif do not lie on one grid"):
        serve.quicklook(desk, "", {"DEM": mine, "NDVI": other}, ["DEM", "NDVI"])
    shutil.rmtree(other.parent)
    assert sorted(desk.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "name, message",
    [
        ("../outside.tif", "This is not a file that was uploaded."),
        ("gone.tif", "gone.tif is no longer here, as uploads are kept for 60 minutes; upload it again."),
        ("large.tif", "large.tif is larger than 1 MB, the limit of this page."),
        ("vrt.tif", "vrt.tif is no GeoTIFF."),
        ("bomb.tif", "bomb.tif holds 4 MB of pixels, and the limit of this page is 1 MB."),
        ("bands.tif", "DEM/bands.tif has 2 bands, expected 1 for DEM (DEM)."),
        ("small.tif", "DEM/small.tif is 40x40 pixels; expected at least 48x48."),
        ("damaged.tif", "DEM/damaged.tif is no raster that GDAL can read; expected a GeoTIFF."),
        (None, "There is no DEM among the uploads; add it, or leave it out."),
    ],
)
def test_what_is_refused_and_leaves_nothing(desk, tmp_path, name, message):
    write(tmp_path / "outside.tif")
    (desk.folder / "large.tif").write_bytes(b"II*\0" + bytes(1 << 20))
    (desk.folder / "vrt.tif").write_text(f"<VRTDataset><SourceFilename>{tmp_path}/outside.tif</SourceFilename></VRTDataset>")
    (desk.folder / "damaged.tif").write_bytes(b"II*\0")
    geo.write(desk.folder / "bomb.tif", np.zeros((1024, 1024), np.float32), like=geo.Place(PLACE.crs, PLACE.transform, 1024, 1024))
    write(desk.folder / "bands.tif", bands=2)
    write(desk.folder / "small.tif", side=40)
    before = sorted(desk.folder.rglob("*"))
    with pytest.raises(ValueError) as error:
        serve.make(desk, None, {"DEM": name and desk.folder / name}, ["DEM"], ["NDVI"])
    assert str(error.value) == message
    assert sorted(desk.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "tile, inputs, to, message",
    [
        ("../tiles/a", ["DEM"], ["NDVI"], "There is no tile '../tiles/a'"),
        ("b", ["DEM", "NDVI"], ["LULC"], "There is no NDVI among the files of this tile"),
        ("a", [], ["NDVI"], "No input is named"),
        ("a", ["DEM"], [], "No output is named"),
        ("a", ["DEM"], ["S1GRD"], "This model makes no S1GRD"),
    ],
)
def test_choices_that_cannot_be(desk, tile, inputs, to, message):
    with pytest.raises(ValueError, match=message):
        serve.make(desk, tile, {}, inputs, to)
    assert not any(desk.folder.iterdir())


def test_only_what_is_old_is_deleted(tmp_path):
    for name in ("old/deep/a.tif", "used/a.tif", "used/b.tif", "new/a.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "stray").touch()
    before = time.time() - 2 * serve.MAX_AGE
    for path in ("old/deep/a.tif", "old/deep", "old", "used/a.tif", "used", "stray"):
        os.utime(tmp_path / path, (before, before))
    serve.delete_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]
    assert sorted(path.name for path in (tmp_path / "used").iterdir()) == ["a.tif", "b.tif"]


def test_without_gradio_one_sentence_says_what_to_install(desk, monkeypatch, capsys):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # and as it was after the test
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["serve", f"--weights={desk.weights}"]) == 2
    assert capsys.readouterr().err == "error: The page needs Gradio, which is not installed: pip install 'terramind-jax[demo]'.\n"


def test_only_this_machine_sees_the_page_unless_told_otherwise(monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "run", lambda **arguments: seen.append(arguments))
    assert cli.main(["serve", "--weights=w"]) == cli.main(["serve", "--weights=w", "--host=0.0.0.0", "--port=80", "--max_mb=9"]) == 0
    assert [(call["host"], call["port"], call["max_mb"]) for call in seen] == [("127.0.0.1", 7860, 64), ("0.0.0.0", 80, 9)]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="max_mb is 0"):
        serve.run(weights="w", max_mb=0)


def test_the_page(desk, monkeypatch, tmp_path):
    client = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = serve.start(desk, "127.0.0.1", port)
    try:
        visitor = client.Client(blocks.local_url, verbose=False, download_files=tmp_path / "downloads")
        *_, pair, sheet, files = visitor.predict("a", ["DEM"], ["NDVI"], 0, 10, None, api_name="/generate")
        np.testing.assert_array_equal(geo.read(files[0]), geo.read(next(desk.folder.glob("session_*/a_NDVI.tif"))))
        assert [imread(path).shape[:2] for path in pair] == [(TILE, TILE)] * 2
        other = visitor.predict("NDVI (tile)", "NDVI (generated)", api_name="/compare")
        assert other[1] == pair[1] and (imread(other[0]) != imread(pair[0])).any()
        mine = client.handle_file(write(tmp_path / "mine.tif", bands=2))
        with pytest.raises(Exception, match="mine.tif has 2 bands, expected 1 for DEM"):
            visitor.predict("", ["DEM"], ["NDVI"], 0, 10, mine, api_name="/generate")
        for path in (tmp_path / "mine.tif", desk.weights / "config.json", os.path.abspath(__file__)):
            assert status(f"{blocks.local_url}gradio_api/file={path}") == 403
        assert status(f"{blocks.local_url}gradio_api/upload", large_form()) == 413
        with pytest.raises(ValueError, match="The page cannot be served at 127.0.0.1"):
            serve.start(desk, "127.0.0.1", port)
    finally:
        blocks.close()


def status(url, form=None):
    request = urllib.request.Request(url, form, {"Content-Type": "multipart/form-data; boundary=b"} if form else {})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def large_form():
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.tif"\r\n\r\n'
    return head + bytes((1 << 20) + 1) + b"\r\n--b--\r\n"
