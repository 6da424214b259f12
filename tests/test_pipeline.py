"""The data contract: order, slots, crops, views, groups and hosts, on an index in memory and on small shards."""

import collections
import dataclasses
import io
import itertools
import logging
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terramind_jax import coordinates, modalities
from terramind_jax.data import crops, groups, masks, order, pipeline, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import open_index
from terramind_jax.data.pipeline import PADDING, DataConfig
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.modalities import DECODER_STREAMS, ENCODER_STREAMS

SIZE, TILE, SIDE = 64, 80, 4
NAMES = ("S2L2A", "S1GRD", "S1RTC", "DEM", "LULC")
CONFIG = DataConfig(image_size=SIZE, threads=0)
MASKS = masks.MaskConfig(input_tokens=24, target_tokens=16)


@pytest.fixture(autouse=True)
def forget_warnings():
    views.warn_once.cache_clear()


class MemoryIndex:
    """The interface of `Index` over random arrays; counts what is read. Sample i has S1GRD if even, else S1RTC."""

    def __init__(self, n=12, bad=(), without_place=(), tile=TILE):
        self.keys, self.modalities, self.bad, self.without_place, self.tile = (
            [f"k{i:03d}" for i in range(n)],
            NAMES,
            bad,
            without_place,
            tile,
        )
        self.available = np.ones((n, len(NAMES)), bool)
        self.available[1::2, 1] = self.available[::2, 2] = False
        self.has_tokens = self.available.copy()
        self.subsets, self.subset = ("tiny",), np.zeros(n, np.uint8)
        self.reads = collections.Counter()

    def __len__(self):
        return len(self.keys)

    def patches(self, *what):
        """Only whole images are here."""

    def read(self, i, modality, out=None):
        assert self.available[i, NAMES.index(modality)], "read what is not there"
        self.reads[i, modality] += 1
        if i in self.bad or (i, modality) in self.bad:
            raise DataError(f"shard 7: sample {self.keys[i]!r} is damaged.")
        m = modalities.get(modality)
        rng = np.random.default_rng([i, NAMES.index(modality)])
        return rng.integers(0, 10 if modality == "LULC" else 100, (len(m.bands), self.tile, self.tile)).astype(m.dtype).transpose(1, 2, 0)

    def tokens(self, i, modality):
        assert self.has_tokens[i, NAMES.index(modality)], "tokens that are not there"
        self.reads[i, modality + "_tokens"] += 1
        rng = np.random.default_rng([i, NAMES.index(modality), 1])
        return rng.integers(0, 4375, (crops.VARIANTS, SIDE, SIDE)).astype(np.uint16)

    def coordinates(self, i):
        self.reads[i, "coords"] += 1
        return None if i in self.without_place else (i / 4 - 100, 45.0)


def take(count, index=None, data=CONFIG, mask=MASKS, batch_size=4, encoder=ENCODER_STREAMS, decoder=DECODER_STREAMS, **options):
    iterator = pipeline.batches(index or MemoryIndex(), encoder, decoder, data, mask, batch_size=batch_size, **options)
    return list(itertools.islice(iterator, count))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert_equal(value, b[key]) if isinstance(value, dict) else np.testing.assert_array_equal(value, b[key], err_msg=key)


def rows(batch):
    """One row a view, independent of batch and group boundaries: slots, and the pixels that slots point to."""
    group = len(batch["sample"]) // next(iter(batch["patches"].values())).shape[0]
    found = []
    for b, sample in enumerate(batch["sample"].tolist()):
        row = [sample, bool(batch["bad"][b])]
        row += [batch[k][b].tobytes() for k in batch if k.startswith("target") or k in ("input_modality", "input_position")]
        for slot, e in enumerate(batch["input_modality"][b].tolist()):
            value = batch["input_id"][b, slot]
            if e != PADDING and ENCODER_STREAMS[e].kind == "pixels":
                value = batch["patches"][ENCODER_STREAMS[e].key][b // group, value].tobytes()
            row.append(value)
        found.append(tuple(row))
    return found


# ---- the batch --------------------------------------------------------------------------------------------------------------


def test_shapes_and_types_are_those_of_the_contract_and_never_change():
    data = DataConfig(image_size=SIZE, patch_group=2, threads=0)
    flat = [b | b.pop("patches") for b in take(4, MemoryIndex(bad=(3,)), data)]
    shapes = [{k: (v.shape, v.dtype) for k, v in b.items()} for b in flat]
    assert all(s == shapes[0] for s in shapes)
    assert shapes[0]["input_modality"] == ((4, 24), np.uint8) and shapes[0]["target_modality"] == ((4, 16), np.uint8)
    assert shapes[0]["input_position"] == ((4, 24), np.uint16) and shapes[0]["target_position"] == ((4, 16), np.uint16)
    assert {shapes[0][k][1] for k in ("input_id", "target_input", "target_id", "overflow")} == {np.dtype(np.int32)}
    assert shapes[0]["sample"] == ((4,), np.int64) and shapes[0]["bad"] == ((4,), bool)
    for stream in (s for s in ENCODER_STREAMS if s.kind == "pixels"):
        shape, dtype = shapes[0][stream.key]
        assert shape[0] == 2 and shape[2] == 256 * stream.channels and dtype == modalities.get(stream.modality).dtype


def test_slots_are_sorted_with_padding_last_and_only_what_a_sample_has():
    for batch in take(6):
        for b, sample in enumerate(batch["sample"]):
            for role, streams in (("input", ENCODER_STREAMS), ("target", DECODER_STREAMS)):
                stream, position = batch[f"{role}_modality"][b].astype(int), batch[f"{role}_position"][b]
                used = int((stream != PADDING).sum())
                assert (stream[used:] == PADDING).all() and (np.diff(stream[:used] * 1000 + position[:used]) > 0).all()
                absent = "sen1rtc" if sample % 2 == 0 else "sen1grd"
                assert not [e for e in stream[:used] if absent in streams[e].key or streams[e].modality in ("NDVI", "S2RGB", "S2L1C")]
        assert not batch["bad"].any() and not batch["overflow"].any()


def test_pixels_and_tokens_are_those_of_the_sample_at_one_crop():
    index, checked = MemoryIndex(), set()
    for batch in take(6, index):
        for b, i in enumerate(batch["sample"].tolist()):
            if i in checked:
                continue  # another epoch, another crop
            checked.add(i)
            variant = int(order.generator("crop", 0, 0, i).integers(crops.VARIANTS))
            for slot, e in enumerate(batch["input_modality"][b]):
                if e == PADDING or ENCODER_STREAMS[e].kind == "sequence":
                    continue
                stream, position, value = ENCODER_STREAMS[e], int(batch["input_position"][b, slot]), batch["input_id"][b, slot]
                if stream.kind == "tokens":
                    assert value == index.tokens(i, stream.modality)[variant].flat[position]
                    continue
                image = crops.crop(index.read(i, stream.modality), variant, SIZE)
                y, x = 16 * (position // SIDE), 16 * (position % SIDE)
                np.testing.assert_array_equal(batch["patches"][stream.key][b, value], image[y : y + 16, x : x + 16].reshape(-1))
            for slot, t in enumerate(batch["target_modality"][b]):
                if t != PADDING and DECODER_STREAMS[t].kind == "tokens":
                    grid = index.tokens(i, DECODER_STREAMS[t].modality)[variant]
                    assert (
                        batch["target_id"][b, slot] == grid.flat[batch["target_position"][b, slot]] and not batch["target_input"][b, slot]
                    )
    assert len(checked) == len(index)


def test_coordinates_enter_as_ids_and_samples_without_a_place_leave_them_out():
    seen = 0
    for batch in take(12, MemoryIndex(without_place=(1, 2)), mask=masks.MaskConfig(24, 16, ({"coords": 1.0, "S2L2A": 1.0},))):
        for b, i in enumerate(batch["sample"].tolist()):
            inputs = batch["input_id"][b][batch["input_modality"][b] == 0]
            targets, given = (batch[k][b][batch["target_modality"][b] == 0] for k in ("target_id", "target_input"))
            if i in (1, 2):
                assert not len(inputs) and not len(targets) and not batch["bad"][b]
                continue
            ids = coordinates.encode(i / 4 - 100, 45.0)
            allowed = {*ids.tolist(), *range(coordinates.SENTINEL + 1, coordinates.SENTINEL + 5)}
            assert {*inputs.tolist(), *targets.tolist(), *given.tolist()} <= allowed
            assert (given[1:] == targets[:-1]).all()
            seen += len(targets)
    assert seen


def test_a_full_buffer_drops_the_last_patches_of_the_group_and_counts_them():
    key, data = "untok_sen2l2a@224", DataConfig(image_size=SIZE, patch_group=4, threads=0)
    mask = masks.MaskConfig(input_tokens=12, target_tokens=8, input_alphas=({key: 1.0},))
    (full,) = take(1, data=data, mask=mask)
    (small,) = take(1, data=DataConfig(image_size=SIZE, patch_group=4, capacity={key: 20}, threads=0), mask=mask)
    assert not full["overflow"].any() and (full["input_modality"] != PADDING).sum(1).tolist() == [12, 12, 12, 12]
    assert small["overflow"].tolist() == [0, 4, 12, 12] and (small["input_modality"] != PADDING).sum(1).tolist() == [12, 8, 0, 0]
    valid = small["input_modality"] != PADDING
    assert sorted(small["input_id"][valid].tolist()) == list(range(20))
    np.testing.assert_array_equal(small["patches"][key][0], full["patches"][key][0, :20])


def test_default_capacity_follows_availability_and_rarely_overflows():
    data = DataConfig(image_size=SIZE, patch_group=8, threads=0)
    batch = take(12, data=data, batch_size=16)
    dropped, used = sum(b["overflow"].sum() for b in batch), sum((b["input_modality"] != PADDING).sum() for b in batch)
    assert dropped <= 0.01 * used
    capacity = {k: v.shape[1] for k, v in batch[0]["patches"].items()}
    assert capacity["untok_sen2rgb@224"] == 8 and 16 <= capacity["untok_sen1grd@224"] <= capacity["untok_sen2l2a@224"] < 8 * 16


def test_stated_means_of_filled_slots_are_those_of_the_batches():
    inputs, targets = groups.filled_slots(ENCODER_STREAMS, DECODER_STREAMS, CONFIG, MASKS, MemoryIndex())
    drawn = take(60, batch_size=12)
    for name, streams, stated in (("input", ENCODER_STREAMS, inputs), ("target", DECODER_STREAMS, targets)):
        slots = np.concatenate([batch[f"{name}_modality"] for batch in drawn])
        counted = np.bincount(slots[slots != PADDING], minlength=len(streams)) / len(slots)
        np.testing.assert_allclose(list(stated.values()), counted, atol=0.6)  # each mean is of 256 to 720 views
        assert sum(stated.values()) == pytest.approx(counted.sum(), rel=0.02)
        assert sum(stated.values()) < 0.98 * slots.shape[1]  # coordinates leave most of their share empty


def test_a_bad_sample_keeps_its_slot_and_stops_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        found = take(3, MemoryIndex(bad=(3, 5)), mask=masks.MaskConfig(24, 16, ({"S2L2A": 1.0, "DEM": 1.0},)))
    good = take(3, mask=masks.MaskConfig(24, 16, ({"S2L2A": 1.0, "DEM": 1.0},)))
    for batch, reference in zip(found, good, strict=True):
        np.testing.assert_array_equal(batch["sample"], reference["sample"])
        np.testing.assert_array_equal(batch["bad"], np.isin(batch["sample"], (3, 5)))
        assert (batch["input_modality"][batch["bad"]] == PADDING).all() and (batch["target_modality"][batch["bad"]] == PADDING).all()
        np.testing.assert_array_equal(batch["target_id"][~batch["bad"]], reference["target_id"][~batch["bad"]])
    assert sum(b["bad"].sum() for b in found) == 2
    assert "shard 7: sample 'k003' is damaged" in caplog.text


def test_a_bad_sample_is_logged_once(caplog):
    mask = masks.MaskConfig(24, 16, ({"S2L2A": 1.0, "DEM": 1.0},))
    with caplog.at_level(logging.WARNING):
        found = take(6, MemoryIndex(bad=(3, 5)), mask=mask)
    assert sum(b["bad"].sum() for b in found) == 4
    assert sorted(r.getMessage() for r in caplog.records) == [f"Skipped: shard 7: sample 'k00{i}' is damaged." for i in (3, 5)]


class Spoiled(MemoryIndex):
    """Sample 3 has a class and a token that do not exist."""

    def read(self, i, modality, out=None):
        array = super().read(i, modality).copy()
        array[..., 0] = 10 if (i, modality) == (3, "LULC") else array[..., 0]
        return array

    def tokens(self, i, modality):
        grid = super().tokens(i, modality)
        grid[0, 0, 0] = 4375 if (i, modality) == (3, "LULC") else grid[0, 0, 0]
        return grid


def test_ids_beyond_the_vocabulary_make_a_sample_bad(caplog):
    mask = masks.MaskConfig(24, 16, ({"tok_lulc@224": 1.0},), ({"DEM": 1.0},))
    with caplog.at_level(logging.WARNING):
        found = take(3, Spoiled(), mask=mask)
    assert np.concatenate([b["sample"][b["bad"]] for b in found]).tolist() == [3]
    assert "Sample 'k003': tokens of LULC go from" in caplog.text and "to 4375, but its vocabulary has 4375" in caplog.text


def test_crops_with_classes_that_do_not_exist_are_bad():
    images = list(pipeline.image_batches(Spoiled(), "LULC", batch_size=4, image_size=SIZE, train=False, threads=0))
    assert np.flatnonzero(np.concatenate([b["bad"] for b in images])).tolist() == [3]
    variants = pipeline.variant_images(Spoiled(), "LULC", image_size=SIZE, threads=0)
    assert [v["sample"] for v in variants if v["bad"]] == [3]


# ---- order, position, hosts -------------------------------------------------------------------------------------------------


def test_every_epoch_visits_every_sample_once_in_another_order():
    samples = np.concatenate([b["sample"] for b in take(9, MemoryIndex(12))])
    epochs = samples.reshape(3, 12)
    assert all(sorted(e) == list(range(12)) for e in epochs.tolist())
    assert len({tuple(e) for e in epochs.tolist()}) == 3


def test_resuming_from_what_was_consumed_continues_the_same_run():
    data = DataConfig(image_size=SIZE, patch_group=2, views_per_sample=2, view_window=8, threads=0)
    bad = tuple((i, "DEM") for i in range(8))  # a view may need what another view of the sample does not
    whole = take(8, MemoryIndex(bad=bad), data)
    assert 0 < sum(b["bad"].sum() for b in whole) < 32
    for start in range(1, 7):
        for a, b in zip(take(2, MemoryIndex(bad=bad), data, consumed=4 * start), whole[start:], strict=False):
            assert_equal(a, b)


@pytest.mark.parametrize("consumed", [0, 20])
def test_hosts_and_batch_size_only_deal_out_the_same_views(consumed):
    data = DataConfig(image_size=SIZE, patch_group=2, threads=0)
    whole = [row for b in take(2, data=data, batch_size=12, consumed=consumed) for row in rows(b)]
    for hosts, batch_size in ((2, 8), (3, 12), (1, 4)):
        shares = [take(24 // batch_size, data=data, batch_size=batch_size, consumed=consumed, host=h, hosts=hosts) for h in range(hosts)]
        for b, parts in enumerate(zip(*shares, strict=True)):
            found = [row for part in parts for row in rows(part)]
            assert collections.Counter(found) == collections.Counter(whole[b * batch_size : (b + 1) * batch_size])


def test_another_seed_or_epoch_gives_other_masks_and_the_same_seed_the_same():
    first, again, other = (take(3, seed=s) for s in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)
    assert not set(sum(map(rows, first), [])) & set(sum(map(rows, other), []))
    later = sum(map(rows, take(3, seed=5, consumed=12)), [])
    assert len(later) == 12 and not set(sum(map(rows, first), [])) & set(later)


def test_views_of_a_sample_go_to_different_batches_and_it_is_read_once():
    index = MemoryIndex()
    data = DataConfig(image_size=SIZE, views_per_sample=3, view_window=4, threads=0)
    found = take(9, index, data)
    for batch in found:
        assert len(set(batch["sample"].tolist())) == 4
    for b in range(0, 9, 3):
        assert all(set(found[b]["sample"]) == set(batch["sample"]) for batch in found[b : b + 3])
    assert len({row for batch in found for row in rows(batch)}) == 36
    probed = {(int(i == 2), m) for i, m in enumerate(NAMES)} | {(int(i == 2), f"{m}_tokens") for i, m in enumerate(NAMES)}
    assert all(count <= 1 + (key in probed) for key, count in index.reads.items())  # the start looks at one sample of each


def test_what_no_mask_selects_is_never_read():
    index, mask = MemoryIndex(), masks.MaskConfig(24, 16, ({"untok_sen2l2a@224": 1.0},), ({"tok_lulc@224": 1.0},))
    given = pipeline.batches(index, ENCODER_STREAMS, DECODER_STREAMS, CONFIG, mask, batch_size=4)
    assert {name for _, name in index.reads} > {"DEM", "DEM_tokens"}  # the start looks at one sample of each
    index.reads.clear()
    assert not any(batch["bad"].any() for batch in itertools.islice(given, 6))
    assert {name for _, name in index.reads} == {"S2L2A", "LULC_tokens"}


def test_a_window_that_does_not_fit_batch_and_workers_is_said_once(caplog):
    data = DataConfig(image_size=SIZE, views_per_sample=2, view_window=8, threads=0)
    for workers, said in ((0, 0), (2, 0), (3, 1), (3, 1)):
        pipeline.batches(MemoryIndex(), ENCODER_STREAMS, DECODER_STREAMS, data, MASKS, batch_size=4, workers=workers)
        assert len(caplog.records) == said
    assert "view_window 8 is no multiple of batch_size x workers = 12: a sample is read again" in caplog.text


@pytest.mark.parametrize(("window", "again"), [(16, 0), (8, 1)])
def test_later_views_wait_with_the_worker_that_gives_them_and_no_more_than_its_share(window, again):
    data = DataConfig(image_size=SIZE, views_per_sample=3, view_window=window, threads=0)
    index, most = MemoryIndex(16), 0
    groups = pipeline.ViewGroups(index, ENCODER_STREAMS, DECODER_STREAMS, data, MASKS, seed=0, train=True, readers=4)
    for position in (4 * batch + row for batch in (0, 4, 8) for row in range(4)):  # what the first of four workers gives
        groups(position)
        most = max(most, len(groups.memo.views))
    assert most <= 2 * window / 4
    assert (max(index.reads.values()) > 1) == again


def test_views_do_not_depend_on_what_was_kept_in_memory():
    data = DataConfig(image_size=SIZE, views_per_sample=3, view_window=4, threads=0)
    dataset = pipeline.make_dataset(MemoryIndex(), ENCODER_STREAMS, DECODER_STREAMS, data, MASKS, batch_size=4)
    in_order = [dataset[b] for b in range(6)]
    fresh = pickle.loads(
        pickle.dumps(pipeline.ViewGroups(MemoryIndex(), ENCODER_STREAMS, DECODER_STREAMS, data, MASKS, seed=0, train=True))
    )
    for b in (5, 1, 4, 0):
        assert_equal(dataset[b], in_order[b])
        np.testing.assert_array_equal(fresh(4 * b)["target_id"][0], in_order[b]["target_id"][0])


def test_validation_is_one_pass_in_order_with_the_centre_crop_and_padded_shapes():
    index = MemoryIndex(10)
    found = take(99, index, train=False, data=DataConfig(image_size=SIZE, views_per_sample=4, threads=0))
    assert np.concatenate([b["sample"] for b in found]).tolist() == [*range(10), -1, -1]
    assert np.concatenate([b["bad"] for b in found]).tolist() == [False] * 10 + [True] * 2
    assert_equal(found[-1], take(99, index, train=False, consumed=8)[0])
    assert [len(take(99, index, train=False, host=h, hosts=2)) for h in (0, 1)] == [3, 3]
    for slot in np.flatnonzero(found[0]["target_modality"][0] == 5):
        assert found[0]["target_id"][0, slot] == index.tokens(0, "S2L2A")[0].flat[found[0]["target_position"][0, slot]]


# ---- subsets ----


class TwoSubsets(MemoryIndex):
    """Every fourth sample is of the subset b, and there is an empty one."""

    def __init__(self, n=12):
        super().__init__(n)
        self.subsets, self.subset = ("a", "b", "none"), (np.arange(n) % 4 == 3).astype(np.uint8)


def weighted(**weights):
    return dataclasses.replace(CONFIG, subset_weights=weights)


@pytest.mark.parametrize(("weights", "share"), [({"a": 1, "b": 1}, 1 / 2), ({"b": 0.2, "a": 0.8}, 1 / 5)])
def test_subsets_take_turns_by_their_weights_and_miss_nothing(weights, share):
    """Two hosts for a while, then three: 120 samples in all."""
    whole = take(30, TwoSubsets(), weighted(**weights))
    samples = np.concatenate([b["sample"] for b in whole])
    of_b = samples % 4 == 3
    assert all(abs(of_b[: i + 1].sum() - (i + 1) * share) <= 1 for i in range(len(samples)))
    for subset, part in (({0, 1, 2, 4, 5, 6, 8, 9, 10}, samples[~of_b]), ({3, 7, 11}, samples[of_b])):
        cycles = [part[i : i + len(subset)].tolist() for i in range(0, len(part) - len(subset), len(subset))]
        assert all(sorted(cycle) == sorted(subset) for cycle in cycles) and len(set(map(tuple, cycles))) > 1
    for hosts, first in ((2, 0), (3, 48)):
        options = {"batch_size": 12, "hosts": hosts, "consumed": first}
        shares = [take(4, TwoSubsets(), weighted(**weights), host=h, **options) for h in range(hosts)]
        found = np.concatenate([np.stack([b["sample"] for b in batch], 1).reshape(-1) for batch in zip(*shares, strict=True)])
        np.testing.assert_array_equal(found, samples[first : first + 48])


def test_validation_mixes_subsets_evenly():
    """Whichever batch is the last one; samples of a subset keep their order, and none is left out."""
    index = TwoSubsets(12)
    index.subset = np.sort(index.subset)  # as keys are sorted, subsets lie one after the other
    samples = np.concatenate([b["sample"] for b in take(9, index, train=False)])
    of_b = samples >= 9
    assert samples[~of_b].tolist() == list(range(9)) and samples[of_b].tolist() == [9, 10, 11]
    assert all(abs(of_b[:i].sum() - i / 4) <= 1 for i in range(13))


def test_a_subset_without_a_weight_is_left_out_and_said(caplog):
    found = take(4, TwoSubsets(), weighted(b=3))
    assert set(np.concatenate([b["sample"] for b in found])) == {3, 7, 11}
    assert "Not visited, as subset_weights does not name them: a, none." in caplog.text
    everything = take(9, TwoSubsets(), weighted(b=3), train=False)
    assert sorted(np.concatenate([b["sample"] for b in everything])) == list(range(12))


def test_buffers_have_room_for_the_weights_not_for_the_natural_shares():
    """Here b has all the S1RTC of the index."""
    index = TwoSubsets()
    index.available[:, 2] = index.subset == 1
    index.available[:, 1] = index.subset == 0
    rows = {}
    for b in (0.01, 100):
        data = dataclasses.replace(weighted(a=1, b=b), patch_group=8)
        rows[b] = take(1, index, data, batch_size=8)[0]["patches"]["untok_sen1rtc@224"].shape[1]
    assert rows[0.01] < rows[100]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "c": 1}, "subset_weights names 'c', which is no subset of the shards; expected some of a, b, none."),
        ({"none": 1}, "subset_weights names 'none', but none of its samples has both an input and a target"),
    ],
)
def test_weights_of_no_use_are_one_sentence(weights, message):
    with pytest.raises(ValueError, match=message):
        take(1, TwoSubsets(), weighted(**weights))


# ---- whole crops ------------------------------------------------------------------------------------------------------------


def test_image_batches_visit_what_has_the_modality_with_a_new_fixed_crop_each_epoch():
    index = MemoryIndex(12, bad=(4,))
    options = {"batch_size": 2, "image_size": SIZE, "threads": 0}
    found = list(itertools.islice(pipeline.image_batches(index, "S1GRD", **options), 6))
    samples = np.concatenate([b["sample"] for b in found])
    assert sorted(samples[:6]) == sorted(samples[6:]) == [0, 2, 4, 6, 8, 10]
    for batch in found[:3]:
        assert batch["image"].shape == (2, SIZE, SIZE, 2) and batch["image"].dtype == np.float16
        for image, bad, i in zip(batch["image"], batch["bad"], batch["sample"].tolist(), strict=True):
            variant = int(order.generator("crop", 0, 0, i).integers(crops.VARIANTS))
            assert bad == (i == 4)
            np.testing.assert_array_equal(image, 0 if bad else crops.crop(index.read(i, "S1GRD"), variant, SIZE))
    assert_equal(found[4], next(pipeline.image_batches(index, "S1GRD", consumed=8, **options)))
    halves = [next(pipeline.image_batches(index, "S1GRD", host=h, hosts=2, **options))["sample"] for h in (0, 1)]
    assert sorted(np.concatenate(halves)) == sorted(samples[:2])
    last = list(pipeline.image_batches(index, "S1GRD", train=False, **{**options, "batch_size": 4}))
    assert np.concatenate([b["sample"] for b in last]).tolist() == [0, 2, 4, 6, 8, 10, -1, -1]


def test_image_batches_say_what_is_clear():
    """In the crop of the image; nothing of what is bad or has no mask."""
    index, mask = MemoryIndex(4, bad=(2,)), np.arange(TILE * TILE).reshape(TILE, TILE) % 7
    index.cloud_mask = lambda i: None if i == 1 else mask
    (batch,) = pipeline.image_batches(index, "S2L2A", batch_size=4, image_size=SIZE, train=False, threads=0, clear=True)
    assert batch["bad"].tolist() == [False, False, True, False]
    for i, clear in enumerate(batch["clear"]):
        np.testing.assert_array_equal(clear, crops.crop(mask[..., None], 0, SIZE)[..., 0] < 3 if i in (0, 3) else False)
    index.cloud_mask = lambda i: mask[: SIZE - 1]
    (batch,) = pipeline.image_batches(index, "S2L2A", batch_size=4, image_size=SIZE, train=False, threads=0, clear=True)
    assert batch["bad"].all() and b"shape" in batch["fault"][0]


def test_variant_images_cover_all_variants_in_index_order():
    index = MemoryIndex(4, bad=(2,))
    found = list(pipeline.variant_images(index, "DEM", image_size=SIZE, threads=0))
    assert [f["sample"] for f in found] == [0, 1, 2, 3] and [f["bad"] for f in found] == [False, False, True, False]
    for v in range(crops.VARIANTS):
        np.testing.assert_array_equal(found[1]["images"][found[1]["inverse"][v]], crops.crop(index.read(1, "DEM"), v, SIZE))
    assert len(next(pipeline.variant_images(index, "DEM", image_size=TILE, threads=0))["images"]) == 2
    assert [f["sample"] for f in pipeline.variant_images(index, "DEM", image_size=SIZE, samples=[3, 1], threads=0)] == [3, 1]


def test_pixels_that_are_not_finite_make_a_sample_bad():
    index, read = MemoryIndex(2), MemoryIndex.read
    index.read = lambda i, m, out=None: (
        np.where(np.arange(TILE)[:, None, None] >= 0, np.nan, read(index, i, m)) if m == "S1GRD" else read(index, i, m)
    )
    batch = next(pipeline.image_batches(index, "S1GRD", batch_size=1, image_size=SIZE, threads=0))
    assert batch["bad"].all() and not batch["image"].any()


# ---- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"batch_size": 6, "data": DataConfig(image_size=SIZE, patch_group=4)},
            "batch_size 6 is no multiple of hosts x patch_group = 1 x 4",
        ),
        ({"data": DataConfig(image_size=60)}, "image_size is 60; expected a multiple of the patch size 16"),
        ({"data": DataConfig(image_size=SIZE, views_per_sample=2, view_window=2)}, "two views of a sample would meet in one batch"),
        ({"data": DataConfig(image_size=SIZE, capacity={"S2L2A": 3})}, "capacity names 'S2L2A', which is no pixel stream"),
        ({"data": DataConfig(image_size=96)}, "Tiles of DEM are 80x80 pixels, smaller than image_size 96"),
        ({"data": DataConfig(image_size=48)}, r"expected \(10, 3, 3\); tokenize for image_size 48"),
        ({"host": 2, "hosts": 2}, "host 2 one of 2"),
        (
            {"encoder": (dataclasses.replace(modalities.STREAMS["tok_dem@224"], vocab_size=30),)},
            "Sample 'k000': tokens of DEM go from .*, but its vocabulary has 30; tokenize again",
        ),
        ({"decoder": (modalities.STREAMS["tok_ndvi@224"],)}, "None of the 12 samples has both an input among .* made by `tokenize`"),
    ],
)
def test_requests_that_cannot_work_say_why(options, message):
    with pytest.raises(ValueError, match=message):
        take(1, **options)


def test_a_modality_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match="No sample of the index has NDVI; it holds S2L2A, S1GRD"):
        pipeline.image_batches(MemoryIndex(), "NDVI", batch_size=1, image_size=SIZE)
    with pytest.raises(ValueError, match="Sample 'k001' has no S1GRD"):
        pipeline.variant_images(MemoryIndex(), "S1GRD", image_size=SIZE, samples=[1])


# ---- shards and workers -----------------------------------------------------------------------------------------------------


def write_shards(root, n=6, size=72):
    """Small real shards: S2L2A and DEM pixels, tokens of both; one S2L2A sample is damaged."""
    rng = np.random.default_rng(0)
    place = {"center_lon": np.array([8.5]), "center_lat": np.array([47.0])}
    for name in ("S2L2A", "DEM"):
        bands = len(modalities.get(name).bands)
        with ShardWriter(root, "train", name, "world", 1) as writer, ShardWriter(root, "train", f"{name}_tokens", "world", 1) as tokens:
            for i in range(n):
                array = rng.integers(0, 3000, (1, bands, size, size)).astype(modalities.get(name).dtype)
                payload = write_sample({"bands": array, **place})
                writer.add(f"k{i}", b"PK" + bytes(40) if (name, i) == ("S2L2A", 2) else payload)
                file = io.BytesIO()
                np.save(file, rng.integers(0, 4000, (crops.VARIANTS, SIDE, SIDE), dtype=np.uint16))
                tokens.add(f"k{i}", file.getvalue(), ".npy")


def test_shards_give_batches_in_threads_and_mark_the_damaged_sample(tmp_path):
    write_shards(tmp_path)
    index, data = open_index(tmp_path, "train"), DataConfig(image_size=SIZE, patch_group=2, threads=2)
    found = take(3, index, data, batch_size=2)
    for a, b in zip(found, take(3, index, CONFIG, batch_size=2), strict=True):
        assert rows(a) == rows(b)
    needed = take(3, index, data, batch_size=2, mask=masks.MaskConfig(24, 16, ({"untok_sen2l2a@224": 1.0},)))  # the damaged array
    assert np.concatenate([b["sample"][b["bad"]] for b in needed]).tolist() == [2]
    images = list(pipeline.image_batches(index, "S2L2A", batch_size=3, image_size=SIZE, train=False))
    assert np.concatenate([b["bad"] for b in images]).tolist() == [False, False, True, False, False, False]


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(tmp_path):
    write_shards(tmp_path)
    index, data = open_index(tmp_path, "train"), DataConfig(image_size=SIZE, patch_group=2, views_per_sample=2, view_window=4)
    for a, b in zip(take(5, index, data, batch_size=2, workers=2), take(5, index, data, batch_size=2), strict=True):
        assert_equal(a, b)


def share(root, count, **options):
    """The samples that one host, in a process of its own, is given; those of its first batches."""
    return np.stack([b["sample"] for b in take(count, open_index(root, "train"), **options)])


def test_two_processes_read_the_index_between_them_and_any_number_goes_on(tmp_path):
    """The two find no index, so both build it."""
    write_shards(tmp_path, n=18)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:

        def together(count, hosts, consumed):
            options = {"batch_size": 6, "hosts": hosts, "consumed": consumed}
            futures = [pool.submit(share, tmp_path, count, host=host, **options) for host in range(hosts)]
            return np.stack([f.result() for f in futures], -1).reshape(-1).tolist()

        seen = together(2, 2, 0)
        goes_on = {hosts: together(4, hosts, 12) for hosts in (1, 2, 3)}
    assert all(found == goes_on[2] for found in goes_on.values())
    seen += goes_on[2]
    assert sorted(seen[:18]) == sorted(seen[18:]) == list(range(18)) and seen[:18] != seen[18:]
    assert seen == np.concatenate([b["sample"] for b in take(6, open_index(tmp_path, "train"), batch_size=6)]).tolist()


# ---- properties -------------------------------------------------------------------------------------------------------------


def check_epoch(bad, stretches, seed):
    """Stretches are (hosts, samples a host, workers): each resumes where the one before it stopped, the last goes on to the end."""
    index, seen, consumed = MemoryIndex(bad=tuple(bad)), [], 0
    for number, (hosts, each, workers) in enumerate(stretches):
        size = hosts * each
        count = 1 if number < len(stretches) - 1 else -(-(len(index) - consumed) // size)
        options = dict(batch_size=size, consumed=consumed, hosts=hosts, workers=workers, seed=seed)
        shares = [take(count, index, host=host, **options) for host in range(hosts)]
        for batch in zip(*shares, strict=True):
            slots = zip(*(b["sample"].tolist() for b in batch), strict=True)
            seen += [i for slot in slots for i in slot]
            assert all(b["bad"][s] <= (i in bad) for b in batch for s, i in enumerate(b["sample"].tolist()))
        consumed += count * size
    assert sorted(seen[: len(index)]) == list(range(len(index)))
    assert seen == [order.place(p, len(index), seed).rank for p in range(len(seen))]


bad_samples = st.sets(st.integers(0, 11), max_size=5)
shares_of_hosts = st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (2, 2)])


@settings(max_examples=12, deadline=None)
@given(bad_samples, st.lists(shares_of_hosts, min_size=1, max_size=3), st.integers(0, 9))
def test_an_epoch_is_the_index_whatever_fails_and_wherever_it_was_resumed(bad, stretches, seed):
    check_epoch(bad, [(*stretch, 0) for stretch in stretches], seed)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(bad_samples, st.lists(st.tuples(shares_of_hosts, st.integers(0, 2)), min_size=2, max_size=2), st.integers(0, 9))
def test_an_epoch_is_the_index_with_any_number_of_worker_processes(bad, stretches, seed):
    check_epoch(bad, [(*stretch, workers) for stretch, workers in stretches], seed)


def test_a_shuffle_window_keeps_shards_together_and_misses_nothing(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        with ShardWriter(tmp_path, "train", "LULC", "x", number) as shard:
            for i in range(number, 32, 4):  # neighbours in a shard are none in the order of keys
                shard.add(f"k{i:02d}", write_sample({"bands": rng.integers(0, 10, (1, 1, TILE, TILE)).astype(np.uint8)}))
    index = open_index(tmp_path, "train")
    stored = index.in_storage_order(np.arange(32))
    assert [index.keys[int(i)] for i in stored[:8]] == [f"k{i:02d}" for i in range(0, 32, 4)]
    visited = [int(stored[order.place(p, 32, 0, shuffle_window=8).rank]) for p in range(32)]
    assert sorted(visited) == list(range(32)) and all(len({i % 4 for i in visited[b : b + 8]}) == 1 for b in range(0, 32, 8))


def test_a_constant_optical_tile_is_bad_and_a_constant_forest_is_not(tmp_path):
    for modality, bands in (("S2L2A", 12), ("LULC", 1)):
        with ShardWriter(tmp_path, "train", modality, "x", 0) as shard:
            shard.add("a", write_sample({"bands": np.full((1, bands, TILE, TILE), 2, np.uint16 if bands > 1 else np.uint8)}))
    index = open_index(tmp_path, "train")
    with pytest.raises(DataError, match="S2L2A has one value everywhere"):
        views.read_tile(index, 0, "S2L2A", SIZE)
    assert (views.read_tile(index, 0, "LULC", SIZE) == 2).all()
