"""GeoTIFF in, GeoTIFF out: windows, place, files, errors and a run that is stopped, with networks of random weights."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
import types

import jax
import launching
import numpy as np
import pytest
import random_networks
import rasterio
import tqdm
from elevations import PLACE, elevation, folder_with_a_bad_raster, with_a_bad_raster

from terramind_jax import cli, coordinates, generate, generate_scenes, geo, locate, modalities
from terramind_jax.modalities import STREAMS
from terramind_jax.scenes import feeding, generating, reading, windows, writing

TILE = 48


@pytest.fixture(scope="module")
def networks():
    jax.config.update("jax_disable_most_optimizations", True)
    encoder = tuple(STREAMS[k] for k in ("untok_dem@224", "tok_ndvi@224", "tok_lulc@224", "coords"))
    yield random_networks.build(encoder, encoder[1:], TILE), random_networks.build_tokenizers("NDVI", "LULC", image_size=TILE)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def weights(networks, monkeypatch, tmp_path):
    return random_networks.as_workdir(monkeypatch, tmp_path / "weights", *networks)


@pytest.fixture
def copies(monkeypatch):
    """Generation replaced by something whose place can be seen: tokens are the patches' numbers, NDVI and the class follow from them."""
    calls = []

    def tokens(module, variables, inputs, targets, *, seed, at, known_tokens, only, **options):
        calls.append({"seed": seed.tolist(), "inputs": inputs, "at": at.tolist(), "only": only, "known": sorted(known_tokens), **options})
        if only == "coords":
            return {only: np.zeros((len(at), 4), np.int32)}
        return {only: numbers(at)}

    def pixels(stream, ids, tokenizers, *, seed, at, **options):
        calls.append({"seed": seed.tolist(), "at": at.tolist(), **options})
        np.testing.assert_array_equal(ids, numbers(at))  # the map of the scene holds each window's tokens
        image = np.kron(ids, np.ones((1, 16, 16)))[..., None].astype(np.float32)
        return image if stream.modality == "NDVI" else 50 * (image % 10 == np.arange(10)).astype(np.float32)

    monkeypatch.setattr(generating, "generate_tokens", tokens)
    monkeypatch.setattr(generate, "decode_output", pixels)
    return calls


def numbers(at):
    rows, columns = np.asarray(at).T[:, :, None, None]
    return (rows + np.arange(3)[:, None]) * 10 + columns + np.arange(3)


def patches(height, width):
    """What `copies` makes of a scene."""
    return (np.arange(height)[:, None] // 16 * 10 + np.arange(width) // 16)[..., None]


def same_file(a, b):
    """Equal but for what batches round: values to 1e-4, the probabilities of a density, which are small, to a thousandth of each."""
    if a.suffix == ".json":
        assert a.read_text() == b.read_text()
        return
    bounds = dict(rtol=1e-3, atol=0) if a.parent.name == "coords_density" else dict(rtol=0, atol=1e-4)
    np.testing.assert_allclose(geo.read(a), geo.read(b), **bounds)
    assert geo.read_header(a).place == geo.read_header(b).place


def test_one_window_is_what_generate_makes(weights, networks, tmp_path):
    array, options = elevation(tmp_path / "a.tif", TILE, TILE), {"guidance_scale": 3.0, "top_p": 0.5}
    (trained, tokenizers), to = networks, ["NDVI", "coords", "LULC"]
    written = generate_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=to, out=tmp_path / "out", seed=5, **options)
    names = [p.relative_to(tmp_path / "out").as_posix() for p in written]
    assert names == ["NDVI/a.tif", "coords/a.json", "coords_density/a.tif", "LULC/a.tif"]
    made = generate.generate(*trained, tokenizers, {"DEM": array[None]}, to, seed=5, **options)
    ndvi, lulc = geo.read(written[0], "NDVI"), geo.read(written[3], "LULC")
    assert ndvi.dtype == np.float32 and lulc.dtype == np.uint8
    np.testing.assert_allclose(ndvi, made["NDVI"][0], atol=1e-4)
    np.testing.assert_array_equal(lulc[..., 0], made["LULC"][0].argmax(-1))
    assert set(json.loads(written[1].read_text())[0]) == {"lon", "lat"}
    assert (tmp_path / "out" / "a.png").is_file() and not (tmp_path / "out" / "unfinished").exists()


def test_a_file_of_some_bands_is_filled_as_in_python(monkeypatch, tmp_path):
    given = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
    names = [band for band in modalities.S2L2A_BANDS if band not in ("COASTAL_AEROSOL", "WATER_VAPOR")]
    trained = random_networks.build((STREAMS["untok_sen2l2a@224"],), (STREAMS["tok_ndvi@224"],), TILE)
    tokenizers = random_networks.build_tokenizers("NDVI", image_size=TILE)
    weights = random_networks.as_workdir(monkeypatch, tmp_path / "weights", trained, tokenizers)
    array = np.random.default_rng(0).integers(1, 6000, (TILE, TILE, 10)).astype(np.uint16)
    geo.write(tmp_path / "a.tif", array, like=geo.Place(PLACE.crs, PLACE.transform, TILE, TILE))
    call = dict(weights=weights, inputs={"S2L2A": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    (path,) = generate_scenes.run(**call, bands={"S2L2A": given})
    made = generate.generate(*trained, tokenizers, {"S2L2A": array[None]}, ["NDVI"], seed=0, bands={"S2L2A": names})
    np.testing.assert_allclose(geo.read(path), made["NDVI"][0], atol=1e-4)
    assert json.loads(geo.read_header(path).tags["terramind_jax_bands"]) == {"S2L2A": names}
    assert (tmp_path / "out" / "a.png").is_file()


def test_files_bear_the_modality_s_own_name(weights, copies, tmp_path, capsys):
    """Whatever the reference's rules take for it; named twice it is made once."""
    elevation(tmp_path / "a.tif")
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out")
    written = generate_scenes.run(**call, to=["tok_ndvi@224", "ndvi", "NDVI", "lulc_map"])
    assert [p.relative_to(tmp_path / "out").as_posix() for p in written] == ["NDVI/a.tif", "LULC/a.tif"]
    assert "a: NDVI, LULC ->" in capsys.readouterr().out and not (tmp_path / "out" / "ndvi").exists()
    with pytest.raises(ValueError, match="This model makes no S1GRD; it makes"):
        generate_scenes.run(**call | {"out": tmp_path / "radar"}, to=["S1"])


@pytest.mark.parametrize("overlap, batch_size", [(None, 8), (32, 2), (0, 1)])
def test_every_pixel_of_any_size_is_covered(weights, copies, tmp_path, overlap, batch_size):
    elevation(tmp_path / "a.tif")  # 100 x 59 pixels: 7 x 4 patches, the last ones over the edge
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out", overlap=overlap, batch_size=batch_size)
    paths = generate_scenes.run(**call, to=["NDVI", "LULC"], seed=7, steps=3, timesteps=5, sampler="ddim", clip="none")
    np.testing.assert_allclose(geo.read(paths[0]), patches(100, 59), rtol=1e-5)
    np.testing.assert_array_equal(geo.read(paths[1]), patches(100, 59) % 10)
    assert geo.read(paths[0]).place == PLACE
    assert all(call["seed"] == [7] * min(batch_size, 2) and len(call["at"]) == min(batch_size, 2) for call in copies)
    settings = {tuple(call.get(name) for name in ("steps", "timesteps", "sampler", "clip")) for call in copies}
    assert settings == {(3, None, None, None), (None, 5, "ddim", "none")}
    assert {(c["only"], *c["known"]) for c in copies if "only" in c} == {("tok_ndvi@224",), ("tok_lulc@224", "tok_ndvi@224")}


@pytest.fixture
def together(monkeypatch):
    """Small scenes are done together, as on an accelerator."""
    monkeypatch.setattr(feeding, "at_once", lambda network, batch_size, samples: batch_size)


def test_small_scenes_are_done_together(weights, copies, together, tmp_path):
    """Side by side where they are cut at the same rows, as many as fill a batch; each as if it were alone."""
    sizes = {"a": (48, 48), "b": (80, 48), "c": (48, 96), "d": (48, 64), "e": (75, 50), "f": (48, 59)}
    for name, size in sizes.items():
        elevation(tmp_path / "scenes" / f"{name}.tif", *size)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "scenes"}, to=["NDVI", "coords"], overlap=0, batch_size=4)
    for path in generate_scenes.run(**call, out=tmp_path / "out"):
        if path.parent.name == "NDVI":
            np.testing.assert_allclose(geo.read(path), patches(*sizes[path.stem]), rtol=1e-5)
        elif path.parent.name == "coords":
            assert len(json.loads(path.read_text())) == {"a": 1, "b": 2, "e": 4}.get(path.stem, 2)
    drawn = [one["at"] for one in copies if one.get("only") == "tok_ndvi@224"]
    a_and_c, b_and_e, d_and_f = [[0, 0], [0, 0], [0, 3]], [[0, 0], [0, 0], [0, 1]], [[0, 0], [0, 1]] * 2
    assert drawn == [[*a_and_c, [0, 3]], b_and_e, [[2, column] for _, column in b_and_e], d_and_f]  # the first filled up to the last's size


def test_scenes_done_together_are_as_if_alone(weights, together, tmp_path):
    """With networks that see their inputs; of several draws the spread, too."""
    for seed, name in enumerate("abc"):
        elevation(tmp_path / "scenes" / f"{name}.tif", TILE, TILE, seed, hole=np.s_[:20, :40] if name == "c" else None)
    call = dict(weights=weights, to=["NDVI", "coords"], samples=2, seed=1, quicklook=False)
    written = generate_scenes.run(**call, inputs={"DEM": tmp_path / "scenes"}, out=tmp_path / "out")
    for path in written:
        one = {"DEM": tmp_path / "scenes" / f"{path.stem}.tif"}
        if not (tmp_path / path.stem).exists():
            generate_scenes.run(**call, inputs=one, out=tmp_path / path.stem)
        alone = tmp_path / path.stem / path.relative_to(tmp_path / "out")
        same_file(path, alone)
    a, b = (geo.read(path) for path in written if path.parent.name == "NDVI" and path.stem in "ab")
    assert np.abs(a - b).max() > 1  # they see different inputs


@pytest.fixture
def bars(monkeypatch):
    """(first, last and total count) of the bars of scenes."""
    shown = []

    class Bar(tqdm.tqdm):
        def __exit__(self, *error):
            shown.append((self.initial, self.n, self.total))
            super().__exit__(*error)

    monkeypatch.setattr(generating, "tqdm", Bar)
    return shown


def test_bars_count_passes_of_the_networks(weights, networks, copies, bars, tmp_path):
    """So that the time left is right although a window's diffusion takes as long as that of many windows of tokens."""
    elevation(tmp_path / "a.tif")
    (module, variables), tokenizers = networks
    ndvi, _ = tokenizers["NDVI"]
    diffusing = ndvi.clone(config=dataclasses.replace(ndvi.config, decoder="unet"))
    network = feeding.Network(module, variables, tokenizers | {"NDVI": (diffusing, {})})
    call = dict(weights=weights, network=network, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out", samples=2)
    generate_scenes.run(**call, to=["NDVI", "LULC", "coords"], steps=4, timesteps=7, sampler="ddim")
    # Windows, samples; tokens of two images and a sequence; 7 timesteps of DDIM are 8; a ViT; of all samples one density over the Earth.
    total = 6 * (2 * (4 + 4 + 3 + 8 + 1) + 1)
    assert bars == [(0, total, total)]


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(weights, copies, together, bars, monkeypatch, tmp_path, capsys):
    def pixels(stream, ids, tokenizers, *, seed, at, **options):  # windows do not agree, so that blending shows which there were
        bands = 1 if stream.modality == "NDVI" else 10
        draws = [np.random.default_rng([one, bands, *corner]) for one, corner in zip(seed, at, strict=True)]
        return np.stack([draw.normal(size=(TILE, TILE, bands)) for draw in draws])

    monkeypatch.setattr(generate, "decode_output", pixels)
    elevation(tmp_path / "scenes" / "a.tif", hole=np.s_[70:, :20])
    elevation(tmp_path / "scenes" / "b.tif", TILE, TILE)
    elevation(tmp_path / "scenes" / "c.tif", 98, TILE)  # beside a, which has as many rows of windows
    call = dict(
        weights=weights, inputs={"DEM": tmp_path / "scenes"}, to=["NDVI", "LULC"], overlap=32, samples=2, batch_size=3
    )  # 6 windows a row, in 2 batches
    whole = generate_scenes.run(**call, out=tmp_path / "whole")
    bars.clear()
    left = []

    def stop(*args, original=None, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return original(*args, **options)

    for where, name in ((generating, "generate_tokens"), (generate, "decode_output")):
        original = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, original=original, **options: stop(*args, original=original, **options))
    stops, parts = 0, None
    while parts is None:
        left[:] = [None] * 7
        try:
            parts = generate_scenes.run(**call, out=tmp_path / "parts")
        except KeyboardInterrupt:
            stops += 1
            assert "the same command goes on from there" in capsys.readouterr().out
    assert stops > 4
    first, total = 5 * 3 * 4 * 2, 1 * 4 * 2  # of a and c, and of b: windows, times passes, times samples
    assert {of for *_, of in bars} == {first, total} and all(n - begun <= 7 * 3 for begun, n, _ in bars)  # 7 calls for 3 windows each
    assert [n for _, n, of in bars if n == of] == [first, total] and max(begun for begun, n, of in bars if of == first) > 60
    for a, b in zip(whole, parts, strict=True):
        assert a.read_bytes() == b.read_bytes()
    pictures = ["a.png", "b.png", "c.png"]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["LULC", "LULC_std", "NDVI", "NDVI_std", *pictures]


@pytest.mark.parametrize("stops", [[(3, 0)], [(3, 3)], [(3, 7)], [(3, 1), (1, 0)], [(3, 2), (1, 1)], [(3, 5), (1, 3)], [(1, 3), (3, 2)]])
def test_a_stopped_run_goes_on_where_other_scenes_are_done_together(weights, copies, monkeypatch, tmp_path, stops):
    """As with another number of devices, and then with that of the beginning. Stops are (windows a row together, calls before)."""
    sizes = {"a": (96, 48), "b": (96, 64), "c": (96, 59), "d": (96, 48)}  # together: a and b, c and d; of two rows of windows
    for name, size in sizes.items():
        elevation(tmp_path / "scenes" / f"{name}.tif", *size)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "scenes"}, to=["NDVI", "LULC"], overlap=0, out=tmp_path / "out")

    def stop(*args, original=generate.decode_output, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return original(*args, **options)

    for size, calls in stops:
        left = [None] * calls
        with monkeypatch.context() as other:
            other.setattr(feeding, "at_once", lambda *arguments, size=size: size)
            other.setattr(generate, "decode_output", stop)
            with pytest.raises(KeyboardInterrupt):
                generate_scenes.run(**call)
    monkeypatch.setattr(feeding, "at_once", lambda *arguments: 3)
    written = generate_scenes.run(**call)
    for path in written:
        expected = patches(*sizes[path.stem]) if path.parent.name == "NDVI" else patches(*sizes[path.stem]) % 10
        np.testing.assert_allclose(geo.read(path), expected, rtol=1e-5)
    assert not (tmp_path / "out" / "unfinished").exists() and len(written) == 8


def test_which_scenes_are_done_together():
    """As few groups as there can be, even ones, of those that are cut at the same rows; a wide one is alone."""

    def groups(size, *scenes):
        return feeding.together([windows.Cut(3, 0, rows, tuple(range(0, 3 * n, 3)), (0,) * n) for rows, n in scenes], size)

    one, two = (0,), (0, 3)
    assert groups(8, *[(one, 1)] * 9) == [([0, 1, 2, 3, 4], 5), ([5, 6, 7, 8], 5)]
    assert groups(8, *[(two, 2)] * 5) == [([0, 1, 2], 6), ([3, 4], 6)]
    assert groups(4, (one, 2), (two, 1), (one, 9), (two, 2), (one, 2)) == [([0, 4], 4), ([1, 3], 3), ([2], 9)]
    assert groups(1, *[(one, 1), (one, 2)]) == [([0], 1), ([1], 2)]


@pytest.mark.parametrize(
    "devices, batch_size, samples, width, sizes",
    [(1, 8, 1, 8, [8]), (1, 8, 3, 3, [5, 5]), (3, 8, 1, 9, [9]), (8, 1, 1, 8, [8]), (8, 20, 1, 24, [24]), (4, 4, 2, 2, [4])],
)
def test_batches_are_as_large_as_can_be(devices, batch_size, samples, width, sizes):
    network = feeding.Network(None, {}, {}, sharding=types.SimpleNamespace(num_devices=devices))
    work = feeding.Work([], windows.Cut(3, 0, (0,), tuple(range(0, 3 * width, 3)), (0,) * width), np.ones((1, width), bool), width)
    batches = list(feeding.batches(network, work, 0, batch_size, samples))
    assert [len(batch) for batch in batches] == sizes
    assert {*itertools.chain(*batches)} == {(k, j) for k in range(samples) for j in range(width)}


def test_a_full_disk_in_the_midst_of_a_scene_loses_nothing(weights, copies, monkeypatch, tmp_path):
    elevation(tmp_path / "a.tif")
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI", "LULC"], samples=2)
    whole = generate_scenes.run(**call, out=tmp_path / "whole")
    written, write_rows = [], writing.write_rows

    def fill(path, *rows):
        written.append(path.name)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_rows(path, *rows)

    monkeypatch.setattr(writing, "write_rows", fill)
    with pytest.raises(OSError, match="No space left") as error:
        generate_scenes.run(**call, out=tmp_path / "parts")
    assert error.value.errno == errno.ENOSPC and written == ["NDVI.tif", "NDVI_std.tif"]
    parts, tokens = generate_scenes.run(**call, out=tmp_path / "parts"), sum("only" in one for one in copies)
    assert tokens == 2 * 2 * 3  # commands, targets, rows of windows: those of the second were not drawn anew
    for a, b in zip(whole, parts, strict=True):
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_ctrl_c_and_a_kill_of_the_command_lose_nothing(tmp_path):
    """In processes of its own, in the midst of a scene; what a user sees of both, and the same bytes in the end."""
    random_networks.write_workdir(tmp_path / "model_of_mine", ("DEM",), ("NDVI", "LULC"), TILE)
    elevation(tmp_path / "a.tif", 320, 320)
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}

    log = tmp_path / "log.txt"  # what a pipe would not hold

    def start(out):
        words = [f"--weights={tmp_path / 'model_of_mine'}", f"--input=DEM={tmp_path / 'a.tif'}", "--to=NDVI,LULC", f"--out={out}"]
        command = [sys.executable, "-m", "terramind_jax", "generate", *words]
        with open(log, "w") as said:
            return subprocess.Popen(command, env=environment, stdout=said, stderr=said)

    def finish(out):
        assert start(out).wait(timeout=300) == 0, log.read_text()
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def is_begun(process, piece):
        assert process.poll() is None, log.read_text()
        journal = tmp_path / "parts" / "unfinished" / "journal.json"
        return journal.exists() and json.loads(journal.read_text())["done"].get(piece)

    ends = {}
    for number, piece in ((signal.SIGINT, "a/NDVI/tokens"), (signal.SIGKILL, "a/NDVI/pixels")):
        process = start(tmp_path / "parts")
        try:
            launching.wait_for(functools.partial(is_begun, process, piece), seconds=300)
            process.send_signal(number)
            ends[number] = process.wait(timeout=300)
        finally:
            process.kill()
        said = log.read_text()
        assert "Traceback" not in said and ("Stopped. What is done stays in" in said) == (number == signal.SIGINT)
        assert not (tmp_path / "parts" / "a.png").exists()
    assert ends == {signal.SIGINT: cli.STOPPED, signal.SIGKILL: -signal.SIGKILL}
    whole, parts = finish(tmp_path / "whole"), finish(tmp_path / "parts")
    assert sorted(whole) == ["LULC/a.tif", "NDVI/a.tif", "a.png"] and whole == parts


def test_another_command_does_not_go_on(weights, monkeypatch, tmp_path):
    elevation(tmp_path / "a.tif")
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "decode_output", stop)
    with pytest.raises(KeyboardInterrupt):
        generate_scenes.run(**call)
    with pytest.raises(FileExistsError, match="holds the work of another command: its seed was 0, now it is 1"):
        generate_scenes.run(**call, seed=1)
    with pytest.raises(KeyboardInterrupt):
        generate_scenes.run(**call, steps=1)  # the same one
    with pytest.raises(FileExistsError, match="its steps was 1, now it is 2"):
        generate_scenes.run(**call, steps=2)
    monkeypatch.setattr(feeding.Network, "dtype", "bfloat16")  # as on another device
    with pytest.raises(FileExistsError, match='its dtype was "float32", now it is "bfloat16"'):
        generate_scenes.run(**call)


@with_a_bad_raster
def test_one_bad_raster_of_a_folder_is_told_before_anything_is_made(weights, copies, monkeypatch, tmp_path, how, message):
    bad = folder_with_a_bad_raster(tmp_path / "scenes", how)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "scenes"}, to=["NDVI"], out=tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        generate_scenes.run(**call)
    assert not copies and not list((tmp_path / "out").iterdir())
    bad.unlink()  # which is another command
    elevation(tmp_path / "scenes" / "c.tif")
    measured, original = [], reading.measured
    monkeypatch.setattr(reading, "measured", lambda scene, cut: measured.append(scene.name) or original(scene, cut))
    assert [path.stem for path in generate_scenes.run(**call)] == ["a", "c"] == measured


def test_no_data_stays_no_data(weights, copies, tmp_path):
    hole = np.zeros((100, 112), bool)
    hole[:, 60:], hole[3, 4] = True, True
    elevation(tmp_path / "a.tif", width=112, hole=hole)
    ndvi, lulc = generate_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI", "LULC"], out=tmp_path / "out")
    np.testing.assert_array_equal(np.isnan(geo.read(ndvi)[..., 0]), hole)
    np.testing.assert_array_equal(geo.read(lulc)[..., 0] == 255, hole)
    np.testing.assert_allclose(geo.read(ndvi)[~hole], patches(100, 112)[~hole], rtol=1e-5)
    assert geo.read_header(lulc).nodata == 255 and np.isnan(geo.read_header(ndvi).nodata)
    assert max(column for call in copies for _, column in call["at"]) == 2  # windows from columns 0, 2, 4; the last has no data
    assert all(np.isfinite(x).all() for call in copies for x in call.get("inputs", {}).values())


def test_a_hole_in_one_input_is_not_seen(weights, networks, tmp_path):
    """As if those patches were hidden, whatever stands for them in the file; a patch with some data is seen."""
    hole = np.zeros((TILE, TILE), bool)
    hole[:, 16:], hole[40, 40] = True, False
    inputs = {"DEM": tmp_path / "dem.tif", "NDVI": tmp_path / "ndvi.tif"}
    dem, place = elevation(inputs["DEM"], TILE, TILE, hole=hole), geo.Place(PLACE.crs, PLACE.transform, TILE, TILE)
    ndvi = np.random.default_rng(1).uniform(-1, 1, dem.shape).astype(np.float32)
    geo.write(inputs["NDVI"], ndvi, like=place)
    (found,) = generate_scenes.run(weights=weights, inputs=inputs, to=["LULC"], out=tmp_path / "out")
    geo.write(tmp_path / "marked.tif", np.where(hole[..., None], -9999, dem), like=place, nodata=-9999)
    marked = inputs | {"DEM": tmp_path / "marked.tif"}
    (same,) = generate_scenes.run(weights=weights, inputs=marked, to=["LULC"], out=tmp_path / "same")
    np.testing.assert_array_equal(geo.read(same), geo.read(found))

    filled = np.where(hole[..., None], modalities.get("DEM").mean, dem)
    make = functools.partial(generate.generate, *networks[0], networks[1], outputs=["LULC"], seed=0)
    clear = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1]], bool)
    anything = np.where(np.kron(clear, np.ones((16, 16)))[..., None], filled, 5000)
    hidden = make({"DEM": anything[None], "NDVI": ndvi[None]}, visible={"DEM": clear[None]})
    np.testing.assert_array_equal(geo.read(found)[..., 0], hidden["LULC"][0].argmax(-1))
    assert (make({"DEM": filled[None], "NDVI": ndvi[None]})["LULC"] != hidden["LULC"]).mean() > 0.1


def test_holes_of_land_cover_are_painted(weights, networks, tmp_path):
    """What there is of a map stays, as its tokens have it; patches that a hole touches are painted."""
    inputs, place = {"DEM": tmp_path / "dem.tif", "LULC": tmp_path / "lulc.tif"}, geo.Place(PLACE.crs, PLACE.transform, TILE, TILE)
    dem, clear = elevation(inputs["DEM"], TILE, TILE), np.array([[1, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
    lulc = np.random.default_rng(1).integers(0, 10, (TILE, TILE, 1)).astype(np.uint8)
    holes = np.where(np.kron(clear, np.ones((16, 16), bool))[..., None], lulc, 255).astype(np.uint8)
    holes[30:34, :5] = 255  # into two patches of the first column
    clear[1:, 0] = False
    geo.write(inputs["LULC"], holes, like=place, nodata=255)
    (found,) = generate_scenes.run(weights=weights, inputs=inputs, to=["LULC"], out=tmp_path / "out", lulc_codes="terramesh")
    given = {"DEM": dem[None], "LULC": lulc[None]}
    made = generate.generate(*networks[0], networks[1], given, ["LULC"], seed=0, visible={"LULC": clear[None]})
    np.testing.assert_array_equal(geo.read(found)[..., 0], made["LULC"][0].argmax(-1))


def test_what_clouds_hide_is_painted(networks, monkeypatch, tmp_path):
    """An input of pixels that is the output, too: it is made anew from its patches without a hole, whatever the others hold, and NDVI."""
    encoder, place = (STREAMS["untok_dem@224"], STREAMS["tok_ndvi@224"]), geo.Place(PLACE.crs, PLACE.transform, TILE, TILE)
    tokenizers = random_networks.build_tokenizers("DEM", "NDVI", image_size=TILE)
    system = random_networks.build(encoder, (STREAMS["tok_dem@224"],), TILE), tokenizers
    weights = random_networks.as_workdir(monkeypatch, tmp_path / "weights", *system)
    inputs, clear = {"DEM": tmp_path / "dem.tif", "NDVI": tmp_path / "ndvi.tif"}, np.array([[1, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
    hole = ~np.kron(clear, np.ones((16, 16), bool))
    hole[30:34, :5] = True  # into two patches of the first column
    clear[1:, 0] = False
    dem = elevation(inputs["DEM"], TILE, TILE, hole=hole)
    ndvi = np.random.default_rng(1).uniform(-1, 1, dem.shape).astype(np.float32)
    geo.write(inputs["NDVI"], ndvi, like=place)
    (found,) = generate_scenes.run(weights=weights, inputs=inputs, to=["DEM"], out=tmp_path / "out", seed=3)
    make = functools.partial(generate.generate, *system[0], system[1], outputs=["DEM"], seed=3)
    anything = np.where(np.kron(clear, np.ones((16, 16), bool))[..., None], dem, 5000)
    made = make({"DEM": anything[None], "NDVI": ndvi[None]}, visible={"DEM": clear[None]})["DEM"][0]
    painted = geo.read(found)
    np.testing.assert_allclose(painted[hole], made[hole], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(painted, made, rtol=1e-4, atol=1e-2)
    for other in ({"DEM": anything[None] + 300, "NDVI": ndvi[None]}, {"DEM": anything[None], "NDVI": -ndvi[None]}):
        assert np.abs(make(other, visible={"DEM": clear[None]})["DEM"][0] - made)[hole].mean() > 1  # both inputs tell


def test_what_is_not_chained_does_not_condition(weights, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, quicklook=False)
    (alone,) = generate_scenes.run(**call, to=["LULC"], out=tmp_path / "alone")
    _, unchained = generate_scenes.run(**call, to=["NDVI", "LULC"], out=tmp_path / "unchained", chained=False)
    _, chained = generate_scenes.run(**call, to=["NDVI", "LULC"], out=tmp_path / "chained")
    np.testing.assert_array_equal(geo.read(unchained), geo.read(alone))
    assert (geo.read(chained) != geo.read(alone)).mean() > 0.1


def test_memory_does_not_grow_with_the_height(weights, monkeypatch, tmp_path):
    def tokens(*network, at, only, **options):
        return {only: np.zeros((len(at), 3, 3), np.int32)}

    def pixels(stream, ids, *tokenizers, **options):
        return np.zeros((len(ids), TILE, TILE, 10), np.float32)

    monkeypatch.setattr(generating, "generate_tokens", tokens)
    monkeypatch.setattr(generate, "decode_output", pixels)
    peaks = []
    for height in (256, 2048):  # all probabilities of the higher one would be 20 MiB
        elevation(tmp_path / f"{height}.tif", height, 256)
        call = dict(weights=weights, inputs={"DEM": tmp_path / f"{height}.tif"}, to=["LULC"], out=tmp_path / str(height))
        tracemalloc.start()
        generate_scenes.run(**call, quicklook=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0], peaks


def test_the_spread_of_samples(weights, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE + 16)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI", "LULC"], seed=3, quicklook=False, batch_size=2)
    one = generate_scenes.run(**call, out=tmp_path / "one")
    several = generate_scenes.run(**call, out=tmp_path / "several", samples=3)
    assert [p.parent.name for p in several] == ["NDVI", "NDVI_std", "LULC", "LULC_std"]
    for a, b in zip(one, several[::2], strict=True):
        np.testing.assert_array_equal(geo.read(a), geo.read(b))  # in batches of one size
    spread, entropy = geo.read(several[1]), geo.read(several[3])
    assert spread.min() >= 0 and spread.max() > 0 and np.isfinite(spread).all()
    assert entropy.min() >= 0 and 0 < entropy.max() <= np.log(10) + 1e-6
    assert geo.read_header(several[1]).descriptions == ("NDVI standard deviation",)


def test_files_tell_what_they_were_made_from(weights, copies, tmp_path):
    for name in ("scenes/a", "scenes/b"):
        elevation(tmp_path / f"{name}.tif", TILE, TILE)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "scenes"}, to=["NDVI", "LULC"], seed=3, timesteps=4)
    ndvi, lulc, other, _ = generate_scenes.run(**call, out=tmp_path / "out")
    tags = geo.read_header(ndvi).tags
    found = {
        name: tags[f"terramind_jax_{name}"]
        for name in ("model", "seed", "steps", "timesteps", "weights_sha256", "dtype", "inputs", "version")
    }
    assert found["dtype"] == "float32"
    assert found["model"] == str(weights) and found["seed"] == "3" and found["timesteps"] == "4" and found["steps"] == "1"
    assert json.loads(found["inputs"]) == {"DEM": str(tmp_path / "scenes")} and len(found["weights_sha256"]) == 64
    assert geo.read_header(lulc).tags["classes"].startswith("0 no data, 1 water, 2 trees")
    with rasterio.open(lulc) as file:  # the colours of a picture's legend
        assert file.colormap(1)[2][:3] == (0x2F, 0x7D, 0x3B) and file.nodata == 255
    assert tags["terramind_jax_scene"] == "a" and geo.read_header(other).tags["terramind_jax_scene"] == "b"
    assert "terramind_jax_scenes" not in tags  # which may be thousands


@pytest.mark.parametrize(("options", "expected"), [({}, ("dpmpp", "12")), ({"sampler": "ddim"}, ("ddim", "50"))])
def test_steps_that_nobody_asked_for_are_told(weights, copies, tmp_path, options, expected):
    elevation(tmp_path / "a.tif", TILE, TILE)
    (path,) = generate_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out", **options)
    tags = geo.read_header(path).tags
    assert (tags["terramind_jax_sampler"], tags["terramind_jax_timesteps"]) == expected
    assert {(call["sampler"], str(call["timesteps"])) for call in copies if "sampler" in call} == {expected}


def test_weights_are_known_by_their_bytes():
    a, b = {"x": np.arange(3.0), "y": np.ones(2)}, {"x": np.arange(3.0), "y": np.array([1, 1.0000001])}
    assert generate_scenes.digest(a) == generate_scenes.digest({k: v.copy() for k, v in a.items()})
    assert len({generate_scenes.digest(x) for x in (a, b, {"x": a["y"], "y": a["x"]})}) == 3


def test_several_devices_make_the_same(weights, monkeypatch, tmp_path, capsys):
    elevation(tmp_path / "scenes" / "a.tif", TILE, TILE + 32)
    elevation(tmp_path / "scenes" / "b.tif", TILE, TILE, seed=1)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "scenes"}, to=["NDVI", "LULC", "coords"], quicklook=False)
    one = generate_scenes.run(**call, out=tmp_path / "one")
    monkeypatch.setattr(generate_scenes, "spread", feeding.spread)
    several = generate_scenes.run(**call, out=tmp_path / "several")
    assert "a ... b (2 scenes)" in capsys.readouterr().err  # a CPU's devices, too, have to have a window each
    for a, b in zip(one, several, strict=True):
        same_file(a, b)


def test_a_file_in_the_place_of_the_folder_is_told_before_weights_are_loaded(tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="out is a file; expected a folder."):
        generate_scenes.run(weights=tmp_path / "nowhere", inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")


def test_nothing_is_replaced(weights, copies, tmp_path):
    elevation(tmp_path / "a.tif")
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    generate_scenes.run(**call)
    with pytest.raises(FileExistsError, match=r"out/NDVI/a\.tif exists already, the first of 2 outputs that do; choose another folder"):
        generate_scenes.run(**call)
    (tmp_path / "out" / "a.png").unlink()
    with pytest.raises(FileExistsError, match=r"out/NDVI/a\.tif exists already"):
        generate_scenes.run(**call)


def test_a_scene_without_crs_is_said(weights, copies, tmp_path, capsys):
    geo.write(tmp_path / "a.tif", np.ones((TILE, TILE, 1), np.int16))
    generate_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    assert "a: the input does not say where it lies (it has no CRS), so the outputs do not either.\n" in capsys.readouterr().out


def test_two_files_of_one_scene_are_refused(weights, copies, tmp_path):
    for name in ("a.tif", "a.tiff"):
        elevation(tmp_path / "dem" / name, TILE, TILE)
    with pytest.raises(ValueError, match=r"a\.tif and .*a\.tiff are of one scene, a; rename one of them"):
        generate_scenes.run(weights=weights, inputs={"DEM": tmp_path / "dem"}, to=["NDVI"], out=tmp_path / "out")


def test_folders_join_by_file_name_and_a_raster_gives_its_position(weights, copies, tmp_path, capsys):
    for folder, names in (("dem", "abc"), ("where", "bcd")):
        for name in names:
            (tmp_path / folder).mkdir(exist_ok=True)
            elevation(tmp_path / folder / f"{name}.tif", TILE, TILE + 16)
    inputs = {"DEM": tmp_path / "dem", "coords": tmp_path / "where"}
    written = generate_scenes.run(weights=weights, inputs=inputs, to=["NDVI"], out=tmp_path / "out")
    assert [p.name for p in written] == ["b.tif", "c.tif"]
    assert re.search(r"Left out: 2 scenes that are not in all of .*dem, .*where; the first is a\.\n", capsys.readouterr().out)
    where = geo.Place(PLACE.crs, PLACE.transform, TILE, TILE + 16)
    expected = generate.encode_input(STREAMS["coords"], np.array([geo.lonlat(where, 24, 24), geo.lonlat(where, 24, 40)]), {})
    np.testing.assert_array_equal(copies[0]["inputs"]["coords"], expected)


def test_coordinates_are_json_null_where_missing(weights, copies, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE + 16)
    path, _ = generate_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["coords"], out=tmp_path / "out")
    assert json.loads(path.read_text()) == [{"lon": None, "lat": None}] * 2


def test_the_density_over_the_earth_is_the_mean_of_the_windows(weights, networks, monkeypatch, tmp_path):
    """Of those with data; a stopped run counts each row of windows once."""
    array = elevation(tmp_path / "a.tif", TILE + 16, TILE + 64, hole=np.s_[:, TILE:])
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["coords"], overlap=0)
    _, path = generate_scenes.run(**call, out=tmp_path / "out")
    windows = np.stack([array[:TILE, :TILE], array[16:, :TILE]])
    expected, density = generate.locate(*networks[0], {}, {"DEM": windows}), geo.read(path)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3 * expected.max()
    np.testing.assert_allclose(density[..., 0], expected.mean(0), rtol=1e-3)
    assert density.astype(np.float64).sum() == pytest.approx(1, abs=1e-6)
    header, (lons, lats) = geo.read_header(path), coordinates.grid()
    assert header.place.crs == "EPSG:4326" and header.descriptions == ("probability",) and header.tags["terramind_jax_seed"] == "0"
    assert geo.lonlat(header.place, 173.5, 766.5) == pytest.approx((lons[766], lats[173]))

    def stop(*arguments, original=locate.density, **options):
        if len(calls) == 1:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append("made")
        return original(*arguments, **options)

    calls = []
    monkeypatch.setattr(locate, "density", stop)
    with pytest.raises(KeyboardInterrupt):
        generate_scenes.run(**call, out=tmp_path / "parts")
    _, parts = generate_scenes.run(**call, out=tmp_path / "parts")
    assert calls == ["made", "stopped", "made"] and parts.read_bytes() == path.read_bytes()
    for other in (tmp_path / "out" / "coords" / "a.json", tmp_path / "out" / "a.png"):
        other.unlink(missing_ok=True)
    with pytest.raises(FileExistsError, match=r"out/coords_density/a\.tif exists already"):
        generate_scenes.run(**call, out=tmp_path / "out")


@pytest.mark.parametrize(
    "inputs, to, message",
    [
        ({}, ["NDVI"], "No input is named"),
        ({"DEM": "a.tif"}, [], "No output is named"),
        ({"S3": "a.tif"}, ["NDVI"], "Unknown input modality 'S3'"),
        ({"DEM": "a.tif"}, ["S3"], "Unknown output modality 'S3'"),
        ({"DEM": "a.tif"}, ["caption"], "A caption is text, which this command neither reads nor writes"),
        ({"DEM": "missing.tif"}, ["NDVI"], "There is no file or folder"),
        ({"DEM": "empty"}, ["NDVI"], "empty holds no GeoTIFF"),
        ({"DEM": "tiles"}, ["NDVI"], "tiles holds no GeoTIFF .*; did you mean .*tiles/DEM?"),
        ({"DEM": "a.tif", "coords": "empty"}, ["NDVI"], "mix files and folders"),
        ({"DEM": "one", "coords": "two"}, ["NDVI"], "share no file name"),
        ({"DEM": "a.tif", "coords": "shifted.tif"}, ["NDVI"], "do not lie on one grid"),
        ({"DEM": "small.tif"}, ["NDVI"], "is 47x48 pixels; expected at least 48x48"),
        ({"DEM": "nothing.tif"}, ["NDVI"], "nothing.tif is empty: none of its pixels has data"),
        ({"DEM": "text.tif"}, ["NDVI"], "text.tif is no raster that GDAL can read"),
        ({"DEM": "a.tif"}, ["NDVI", "DEM"], "This model makes no DEM; it makes NDVI, LULC, coords"),
        ({"S1GRD": "a.tif"}, ["NDVI"], "a.tif has 1 bands, expected 2 for S1GRD"),
    ],
)
def test_errors_say_what_is_wrong(weights, copies, tmp_path, inputs, to, message):
    for folder in ("empty", "one", "two", "tiles/DEM"):
        (tmp_path / folder).mkdir(parents=True)
    elevation(tmp_path / "a.tif", TILE, TILE)
    elevation(tmp_path / "one" / "a.tif", TILE, TILE)
    elevation(tmp_path / "two" / "b.tif", TILE, TILE)
    elevation(tmp_path / "small.tif", 47, 48)
    square = geo.Place(PLACE.crs, PLACE.transform, TILE, TILE)
    geo.write(
        tmp_path / "shifted.tif", np.zeros((TILE, TILE)), like=geo.Place(PLACE.crs, (10, 0, 500_003.0, 0, -10, 5_300_000.0), TILE, TILE)
    )
    geo.write(tmp_path / "nothing.tif", np.full((TILE, TILE), np.nan, np.float32), like=square)
    (tmp_path / "text.tif").write_text("hello")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate_scenes.run(weights=weights, inputs={name: tmp_path / path for name, path in inputs.items()}, to=to, out=tmp_path / "out")
    assert not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overlap": 8}, "The overlap is 8 pixels"),
        ({"samples": 0}, "samples is 0"),
        ({"timesteps": 0}, "number of timesteps is 0"),
        ({"sampler": "euler"}, "Unknown sampler 'euler'"),
        ({"clip": "no"}, "Unknown clip 'no'"),
    ],
)
def test_options_that_cannot_be(weights, tmp_path, options, message):
    elevation(tmp_path / "a.tif", TILE, TILE)
    with pytest.raises(ValueError, match=message):
        generate_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out", **options)


def test_a_missing_or_foreign_tokenizer_is_named(weights, networks, monkeypatch, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="There is no tokenizer .*elsewhere/NDVI"):
        generate_scenes.run(**call, tokenizers=tmp_path / "elsewhere")
    monkeypatch.setattr(generate_scenes.tokenizer, "load", lambda workdir: networks[1]["LULC"])
    with pytest.raises(ValueError, match="has 4375 codes, but the model was trained with 15360"):
        generate_scenes.run(**call)


def test_weights_that_are_no_work_directory(tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    call = dict(inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="not the work directory of a training run"):
        generate_scenes.run(weights=tmp_path, **call)
    with pytest.raises(FileNotFoundError, match=r"There is no work directory .*nothing\.$"):
        generate_scenes.run(weights=tmp_path / "nothing", **call)
    with pytest.raises(FileNotFoundError, match="no work directory random; for hub or random weights say which model"):
        generate_scenes.run(weights="random", **call)
    with pytest.raises(ValueError, match="terramind_v1_tiny_tim does not generate; choose one such as terramind_v1_base"):
        generate_scenes.run(weights="random", model="terramind_v1_tiny_tim", **call)
