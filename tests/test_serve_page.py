"""The page of ``terramind-jax serve`` in a headless Chromium, as a visitor uses it. Needs the extra ``page`` and a Chromium:

pip install -e ".[test,page]" && apt-get install -y chromium     # or Chrome, on the PATH
python -m pytest -m slow tests/test_serve_page.py
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import random_networks
import rasterio
from matplotlib.image import imread

from terramind_jax import geo
from terramind_jax.data.synthesize import write_tiles
from terramind_jax.tokenizer import diffusion

pytestmark = pytest.mark.slow

SIDE, LIMIT = 96, 1  # pixels of a tile, megabytes
SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, three tiles of the embedded world and what is refused; or a skip that says what is not installed."""
    for name in ("gradio", "playwright"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[page]'")
    if not chromium():
        pytest.skip("There is no Chromium or Chrome on the PATH: apt-get install -y chromium")
    root = tmp_path_factory.mktemp("served")
    random_networks.write_workdir(root / "model_of_mine", ("S2L2A", "DEM"), ("S1GRD", "NDVI", "LULC"))
    write_tiles(root / "tiles", count=3, size=SIDE)
    (root / "large.tif").write_bytes(b"II*\0" + bytes(LIMIT << 20))
    (root / "text.tif").write_text("not a raster")
    (root / "notes.txt").write_text("nor this")
    (root / "tmp").mkdir()
    return root


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def start(folder, port: int) -> subprocess.Popen:
    """The command as a user types it, in a process of its own with one device."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = {**os.environ, "XLA_FLAGS": flags, "TMPDIR": str(folder / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["serve", f"--weights={folder / 'model_of_mine'}", f"--tiles={folder / 'tiles'}", f"--port={port}", f"--max_mb={LIMIT}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", "terramind_jax", *command], env=environment, **pipes)


@pytest.fixture(scope="module")
def server(folder):
    """A running server and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(folder, port)
    try:
        assert wait_for_line(process) == f"The page is at http://127.0.0.1:{port}; Ctrl-C ends it.\n"
        yield process, port
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process: subprocess.Popen) -> str:
    ready, _, _ = select.select([process.stdout], [], [], SECONDS)
    return process.stdout.readline() if ready else f"nothing in {SECONDS} seconds"


@pytest.fixture(scope="module")
def browser(folder):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which root has to do without
        opened = playwright.chromium.launch(executable_path=chromium(), args=sandbox)
        yield opened
        opened.close()


@pytest.fixture
def page(server, browser, folder):
    """The page, ready. Afterwards its console must be without errors, and nothing may have been asked of another machine."""
    url = f"http://127.0.0.1:{server[1]}/"
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    page.errors, asked = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    quicklook(page).wait_for()
    yield page
    text = page.inner_text("body")
    context.close()
    assert "Traceback" not in text and str(folder) not in text
    assert page.errors == []
    assert [other for other in asked if not other.startswith((url, "data:", "blob:"))] == []


# ---- what a visitor does and sees ----


def quicklook(page):
    return page.locator("img[src$='quicklook.png']")


def group(page, name):
    return page.get_by_role("group").filter(has_text=name)


def tick(page, name, *wanted):
    for box in group(page, name).get_by_role("checkbox").all():
        box.set_checked(box.get_attribute("name") in wanted)


def choose(page, label, option):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def until_another(locator, source):
    """Waits until an image or link no longer has this address, and an image is loaded; returns the new one."""
    page, attribute = locator.page, "href" if locator.evaluate("e => e.tagName") == "A" else "src"
    for _ in range(SECONDS * 10):
        found = locator.get_attribute(attribute)
        if found != source and locator.evaluate("e => e.tagName == 'A' || e.complete"):
            return found
        page.wait_for_timeout(100)
    raise AssertionError(f"{source} stayed for {SECONDS} seconds.")


def image(page, address, tmp_path):
    """Colours ``[h, w, 3]`` of a PNG of the page."""
    response = page.request.get(address)
    assert response.ok
    (tmp_path / "image.png").write_bytes(response.body())
    return imread(tmp_path / "image.png")[..., :3]


def cut(picture) -> float:
    """Percent of an image's width that the slider hides."""
    return float(re.search(r"inset\(.* ([\d.]+)%\)", picture.get_attribute("style"))[1])


def link(page, modality):
    return page.locator(f"a[download$='_{modality}.tif']")


def generate(page, modality):
    """Presses the button and waits for a new file of this modality, the last that is shown."""
    before = link(page, modality).get_attribute("href") if link(page, modality).count() else None
    page.get_by_role("button", name="Generate").click()
    link(page, modality).wait_for()
    until_another(link(page, modality), before)


def download(page, modality, path):
    with page.expect_download() as started:
        link(page, modality).click()
    started.value.save_as(path)
    return path


# ---- tests ----


def test_title_and_controls(page, folder):
    assert page.title() == "terramind_jax"
    assert page.get_by_role("heading").all_inner_texts() == ["TerraMind: generate modalities from others"]
    text = page.inner_text("body")
    assert "of 1 MB at most" in text and "model_of_mine" in text
    for name, modalities in (("Inputs", ["S2L2A", "DEM"]), ("Outputs", ["S1GRD", "LULC", "NDVI"])):
        assert [box.get_attribute("name") for box in group(page, name).get_by_role("checkbox").all()] == modalities
    assert page.get_by_label("Seed", exact=True).input_value() == "0"
    assert page.get_by_role("slider").first.input_value() == str(diffusion.STEPS["dpmpp"])
    assert page.get_by_role("button", name="Generate").is_enabled()
    page.get_by_label("Tile", exact=True).click()
    tiles = sorted(path.stem for path in (folder / "tiles" / "DEM").iterdir())
    options = [text.removeprefix("✓").strip() for text in page.get_by_role("option").all_inner_texts()]
    assert options == ["GeoTIFFs of mine", *tiles] and len(tiles) == 3


def test_choosing_shows_the_quicklook(page, folder, tmp_path):
    tiles = sorted(path.stem for path in (folder / "tiles" / "DEM").iterdir())
    assert page.get_by_label("Tile", exact=True).input_value() == tiles[0]
    shown = [quicklook(page).get_attribute("src")]
    choose(page, "Tile", tiles[1])
    shown.append(until_another(quicklook(page), shown[0]))
    tick(page, "Inputs", "S2L2A", "DEM")
    shown.append(until_another(quicklook(page), shown[1]))
    first, second, both = (image(page, address, tmp_path) for address in shown)
    assert first.shape == second.shape and (first != second).any(-1).mean() > 0.3
    assert both.shape[0] > 1.5 * second.shape[0]
    assert quicklook(page).bounding_box()["width"] > 200


def test_what_is_made_lies_side_by_side_under_the_slider(page, folder, tmp_path):
    tick(page, "Inputs", "S2L2A", "DEM")
    tick(page, "Outputs", "NDVI", "LULC")
    generate(page, "LULC")
    left, right = pair = page.get_by_test_id("imageslider-image").all()
    addresses = [until_another(picture, None) for picture in pair]
    assert [page.get_by_label(side, exact=True).input_value() for side in ("Left", "Right")] == ["S2L2A (input)", "LULC (generated)"]
    looks = [image(page, address, tmp_path) for address in addresses]
    assert [look.shape[:2] for look in looks] == [(SIDE, SIDE)] * 2 and (looks[0] != looks[1]).any()
    boxes = [picture.bounding_box() for picture in pair]
    assert boxes[0] == boxes[1] and boxes[0]["width"] > 500  # one on the other, the right one cut at the slider

    handle = page.get_by_test_id("slider").bounding_box()
    middle = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    assert cut(right) == pytest.approx(50)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(boxes[0]["x"] + boxes[0]["width"] / 4, middle[1], steps=5)
    page.mouse.up()
    assert cut(right) == pytest.approx(25, abs=2)

    choose(page, "Right", "NDVI (tile)")  # which the tile has, beside what was generated
    other = image(page, until_another(right, addresses[1]), tmp_path)
    assert other.shape == looks[1].shape and (other != looks[1]).any()
    sheet = page.locator("img[src$='sheet.png']")
    assert image(page, sheet.get_attribute("src"), tmp_path).std() > 0.1 and sheet.bounding_box()["width"] > 500


def test_an_upload_comes_back_on_its_grid_and_a_seed_makes_one_file(page, folder, tmp_path):
    mine = tmp_path / "mine.tif"
    source = sorted((folder / "tiles" / "S2L2A").iterdir())[2]
    shutil.copyfile(source, mine)
    choose(page, "Tile", "GeoTIFFs of mine")
    quicklook(page).wait_for(state="hidden")
    tick(page, "Outputs", "NDVI")
    page.locator("input[type=file]").set_input_files(mine)
    quicklook(page).wait_for()
    files = []
    for seed in (5, 5, 6):
        page.get_by_label("Seed", exact=True).fill(str(seed))
        generate(page, "NDVI")
        files.append(download(page, "NDVI", tmp_path / f"{len(files)}.tif"))
    with rasterio.open(mine) as given, rasterio.open(files[0]) as made:
        assert (made.crs, made.transform, made.shape) == (given.crs, given.transform, given.shape) and made.crs
        assert made.count == 1 and np.isfinite(made.read()).all()
        tags = {name.removeprefix("terramind_jax_"): text for name, text in made.tags().items()}
        assert (tags["seed"], tags["model"], tags["inputs"]) == ("5", "model_of_mine", '{"S2L2A": "mine.tif"}')
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (geo.read(files[0]) != geo.read(files[2])).any()


def test_what_cannot_be_used_is_told_in_a_sentence(page, folder):
    choose(page, "Tile", "GeoTIFFs of mine")
    place = page.locator("input[type=file]")
    place.wait_for(state="attached")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("There is no S2L2A among the uploads; add it, or leave it out.").wait_for()
    place.set_input_files(folder / "notes.txt")
    page.get_by_text("Invalid file type: notes.txt. Only .tif, .tiff allowed.").wait_for()
    place.set_input_files(folder / "text.tif")
    page.get_by_text("text.tif is no GeoTIFF.").wait_for()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("text.tif is no GeoTIFF.").nth(1).wait_for()
    page.reload()
    choose(page, "Tile", "GeoTIFFs of mine")
    page.errors.clear()
    place.set_input_files(folder / "large.tif")
    page.get_by_text(re.compile("exceed the maximum allowed size.*large.tif")).wait_for()
    page.errors[:] = [error for error in page.errors if error != "Response" and "404" not in error]  # how Gradio logs its refusal
    tick(page, "Outputs")
    choose(page, "Tile", sorted((folder / "tiles" / "DEM").iterdir())[0].stem)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("No output is named; generation needs at least one.").wait_for()


# ---- the terminal ----


def test_only_this_machine_is_served(server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:  # sends nothing
        try:
            asking.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("This machine has no address but its own loopback.")
        address = asking.getsockname()[0]
    with socket.create_connection(("127.0.0.1", server[1]), timeout=5), pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, server[1]), timeout=5)


def test_a_second_server_on_the_port_ends_in_a_sentence(server, folder):
    second = start(folder, server[1])
    said = second.communicate(timeout=SECONDS)
    message = f"error: The page cannot be served at 127.0.0.1:{server[1]}; choose another --host or --port.\n"
    assert (second.returncode, *said) == (2, "", message)


def test_ctrl_c_ends_it_in_the_midst_of_a_generation(server, page, folder):
    process, _ = server
    large = geo.Place("EPSG:32633", (10.0, 0, 5e5, 0, -10.0, 5.3e6), 640, 640)
    geo.write(folder / "dem.tif", np.random.default_rng(0).integers(0, 3000, (640, 640, 1)).astype(np.int16), like=large)
    choose(page, "Tile", "GeoTIFFs of mine")
    quicklook(page).wait_for(state="hidden")
    tick(page, "Inputs", "DEM")
    page.locator("input[type=file]").set_input_files(folder / "dem.tif")
    quicklook(page).wait_for()
    tick(page, "Outputs", "S1GRD", "NDVI", "LULC")
    page.get_by_role("button", name="Generate").click()
    said = [""]
    while not said[-1].startswith("Loading"):
        assert process.poll() is None and len(said) < 100, said
        said.append(wait_for_line(process))
    page.wait_for_timeout(1000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and "Traceback" not in errors and "FATAL" not in errors, errors
    assert list((folder / "tmp").glob("terramind_jax_*")) == []
    page.goto("about:blank")
    page.errors.clear()  # of the lost server
