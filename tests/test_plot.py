"""Pictures: shared colour limits, readable layouts, files that appear whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread

from terramind_jax import modalities, plot


def image(name, seed=0, side=32):
    rng = np.random.default_rng(seed)
    if name == "LULC":
        return rng.integers(0, 10, (side, side)).astype(np.uint8)
    mean, std = modalities.statistics(name)
    return (mean + std * rng.normal(size=(side, side, len(mean)))).astype(np.float32)


NAMES = [name for name, modality in modalities.MODALITIES.items() if modality.is_image]


@pytest.mark.parametrize("name", NAMES)
def test_every_modality_renders_as_colours(name):
    colours = plot.render(name, image(name))
    assert colours.shape == (32, 32, 3)
    assert np.isfinite(colours).all() and colours.min() >= 0 and colours.max() <= 1
    assert colours.std() > 0.01
    flat = np.zeros_like(image(name))
    assert np.isfinite(plot.render(name, flat)).all()


@pytest.mark.parametrize("name, view, band", [("S2L2A", "S2L2A IRRG", 7), ("S2L1C", "S2L1C IRRG", 7), ("S1RTC", "S1RTC false colour", 0)])
def test_views_of_optics_and_radar(name, view, band):
    assert view in plot.views(name)
    flat = np.repeat(np.linspace(-0.1, 0.1, 32 * 32).reshape(32, 32, 1), len(modalities.statistics(name)[0]), -1) + 1000.0
    bright = flat.copy()
    bright[8:16, 8:16, band] += 300  # what reflects most in the near infrared, or in VV, is red
    red, green, _ = plot.render(view, bright)[12, 12]
    assert red > green and plot.render(name, bright).shape == (32, 32, 3)
    holes = np.where(np.arange(32)[:, None, None] < 4, np.nan, bright)
    assert (plot.render(view, holes)[:4] == 1).all()


@pytest.mark.parametrize("name", ["S2L2A", "S2L1C"])
def test_true_colour_shows_red_green_and_blue_as_they_are(name):
    ground = np.repeat(np.linspace(-0.1, 0.1, 32 * 32).reshape(32, 32, 1), len(modalities.get(name).bands), -1) + 1000.0
    for channel, band in enumerate(("RED", "GREEN", "BLUE")):
        bright = ground.copy()
        bright[8:16, 8:16, modalities.get(name).bands.index(band)] += 300
        assert plot.render(name, bright)[12, 12].argmax() == channel


def test_light_falls_on_hills_from_the_upper_left():
    row, column = np.indices((33, 33)) - 16
    hill = 200 - 10 * np.hypot(row, column)[..., None]
    light = plot.render("DEM", hill).sum(-1)
    above, below, left, right = light[8, 16], light[24, 16], light[16, 8], light[16, 24]
    assert above > below and left > right and light[10, 10] > light[10, 22] > light[22, 22]


def test_other_modalities_have_one_view():
    assert [plot.views(name) for name in ("DEM", "LULC", "NDVI")] == [("DEM",), ("LULC",), ("NDVI",)]


def test_class_maps_and_logits_render_alike():
    classes = image("LULC")
    np.testing.assert_array_equal(plot.render("LULC", classes), plot.render("LULC", np.eye(10)[classes]))
    np.testing.assert_array_equal(plot.render("LULC", classes), plot.render("LULC", classes[..., None]))
    assert len(plot.LULC_COLOURS) == len(set(plot.LULC_COLOURS)) == len(modalities.LULC_CLASSES)


@pytest.mark.parametrize("name", ["S2L2A", "S1GRD", "NDVI"])
def test_truth_sets_the_limits_of_what_was_generated(name):
    truth, generated = image(name), image(name, 1) * 3
    scene = plot.Scene("a", {}, {name: generated}, {name: truth})
    np.testing.assert_array_equal(scene.limits(name), plot.limits(name, truth))
    assert plot.Scene("a", {}, {name: generated}).limits(name) is not None


def test_limits_of_elevation_span_truth_and_generated():
    truth, generated = np.linspace(0, 100, 1024).reshape(32, 32, 1), np.linspace(400, 450, 1024).reshape(32, 32, 1)
    low, high = plot.Scene("a", {}, {"DEM": generated}, {"DEM": truth}).limits("DEM")
    assert (low, high) == (plot.limits("DEM", truth)[0], plot.limits("DEM", generated)[1])


def test_same_value_same_colour_in_truth_and_generated():
    truth = np.linspace(-25, 0, 1024).reshape(32, 32, 1).repeat(2, -1)
    generated = np.full_like(truth, truth[16, 5, 0])
    within = plot.limits("S1GRD", truth)
    assert (plot.render("S1GRD", generated, within)[0, 0] == plot.render("S1GRD", truth, within)[16, 5]).all()


def test_flat_elevation_is_not_stretched():
    low, high = plot.limits("DEM", np.full((16, 16, 1), 300.0))
    assert high - low == pytest.approx(plot.MIN_RELIEF) and (low + high) / 2 == pytest.approx(300)


def scene(name, truth=True):
    made = {m: image(m, 1) for m in ("S1GRD", "DEM", "LULC", "NDVI")}
    return plot.Scene(name, {"S2L2A": image("S2L2A")}, made, {m: image(m) for m in made} if truth else {}, {"NDVI": "RMSE 0.1"})


def test_contact_sheet_has_a_row_for_truth_and_one_for_generated(tmp_path):
    plot.contact_sheet(tmp_path / "deep" / "both.png", [scene("a"), scene("b")], title="Title", caption="Caption", dpi=40)
    plot.contact_sheet(tmp_path / "deep" / "one.png", [scene("a", truth=False)], dpi=40)
    both, one = (imread(tmp_path / "deep" / f"{name}.png") for name in ("both", "one"))
    assert abs(both.shape[1] - one.shape[1]) <= 1
    assert both.shape[0] > 3 * one.shape[0] * 0.8
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["both.png", "one.png"]  # no temporary is left


def test_contact_sheet_errors(tmp_path):
    with pytest.raises(ValueError, match="no scene to draw"):
        plot.contact_sheet(tmp_path / "a.png", [])
    other = plot.Scene("b", {"S2L2A": image("S2L2A")}, {"DEM": image("DEM")})
    with pytest.raises(ValueError, match="Scene 'b' differs in its inputs or outputs from 'a'"):
        plot.contact_sheet(tmp_path / "a.png", [scene("a"), other])


def pictures(figure):
    """The images of a figure, without its colour bars."""
    found = [axes.images[0].get_array() for axes in figure.axes]
    return [x for x in found if x.shape == (32, 32, 3)]


def test_images_side_by_side(tmp_path):
    names = ["S2L2A", "S2L2A IRRG", "DEM", "DEM generated", "LULC", "S1GRD of seed 1"]
    shown = {name: image(name.partition(" ")[0], seed) for seed, name in enumerate(names)}
    figure = plot.images(shown, columns=4, path=tmp_path / "images.png", dpi=40)
    drawn = pictures(figure)
    assert len(drawn) == 6 and {*names} <= {text.get_text() for text in figure.texts} and (tmp_path / "images.png").is_file()
    both = plot.Scene("", {}, {"DEM": shown["DEM generated"]}, {"DEM": shown["DEM"]}).limits("DEM")
    np.testing.assert_array_equal(drawn[3], plot.render("DEM", shown["DEM generated"], both))
    np.testing.assert_array_equal(drawn[0], plot.render("S2L2A", shown["S2L2A"]))  # another view has limits of its own
    assert (pictures(plot.images(shown, shared=False))[3] != drawn[3]).any()
    own = pictures(plot.images(shown, within={"DEM generated": (0.0, 9000.0)}))
    np.testing.assert_array_equal(own[3], plot.render("DEM", shown["DEM generated"], (0.0, 9000.0)))
    np.testing.assert_array_equal(own[2], drawn[2])
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*modalities.LULC_CLASSES}
    with pytest.raises(ValueError, match="0 images for 5 columns"):
        plot.images({"corner": None})


def test_places_of_images_stay_empty():
    """The last image is where it would be if there were one before it."""
    full, gap = (plot.images({"LULC": image("LULC"), "DEM": second, "NDVI": image("NDVI")}) for second in (image("DEM"), None))
    assert len(pictures(gap)) == 2 and "DEM" not in {text.get_text() for text in gap.texts}
    assert gap.axes[1].get_position().bounds == full.axes[3].get_position().bounds


def test_loss_curves_from_files_and_work_directories(tmp_path):
    lines = [{"step": s, "loss": 9.0 - s / 100} for s in range(1, 101)] + [{"step": 50, "loss": None}]
    lines += [{"step": 100, "val/loss": 8.1, "val/loss/DEM": 7.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot.loss_curves(tmp_path / "loss.png", {"a": tmp_path, "b": tmp_path / "metrics.jsonl"}, dpi=40)
    assert imread(tmp_path / "loss.png").std() > 0
    with pytest.raises(FileNotFoundError, match="metrics of a training run"):
        plot.loss_curves(tmp_path / "loss.png", {"a": tmp_path / "missing"})
    with pytest.raises(ValueError, match="no run to draw"):
        plot.loss_curves(tmp_path / "loss.png", {})


def test_smoothing_keeps_constants_and_length():
    series = np.stack([np.arange(200.0), np.full(200, 3.0)], axis=1)
    np.testing.assert_allclose(plot._smooth(series), series)
