"""Masks: budgets, disjointness, availability, sequences that can be put together again."""

import numpy as np
import pytest

from terramind_jax import coordinates
from terramind_jax.data import masks, order
from terramind_jax.modalities import DECODER_STREAMS, ENCODER_STREAMS, STREAMS

DRAWS = 60
IDS = np.array([4500, 5500, coordinates.EOS])


def availability(*absent):
    return tuple(np.array([not any(a in s.key for a in absent) for s in streams]) for streams in (ENCODER_STREAMS, DECODER_STREAMS))


def draws(config, *absent, encoder=ENCODER_STREAMS, decoder=DECODER_STREAMS, count=DRAWS, seed=0):
    plan = masks.plan_masks(encoder, decoder, config)
    has = availability(*absent) if encoder is ENCODER_STREAMS else (np.ones(len(encoder), bool), np.ones(len(decoder), bool))
    return [masks.draw(plan, *has, order.generator("mask", seed, 0, i)) for i in range(count)]


def slots(stream, position, streams):
    return {(streams[s].key, p) for s, p in zip(stream.tolist(), position.tolist(), strict=True)}


@pytest.mark.parametrize("alpha", [0.01, 0.5, 10.0])
def test_budgets_are_kept_and_inputs_and_targets_of_a_stream_are_disjoint(alpha):
    config = masks.MaskConfig(input_tokens=128, target_tokens=96, input_alphas=(alpha,), target_alphas=(alpha,))
    images = {s.key for s in ENCODER_STREAMS if s.kind != "sequence"}
    for m in draws(config, "sen1grd"):
        assert 0 < len(m.input_stream) <= 128 and 0 < len(m.target_stream) <= 96
        inputs, targets = (
            slots(m.input_stream, m.input_position, ENCODER_STREAMS),
            slots(m.target_stream, m.target_position, DECODER_STREAMS),
        )
        assert len(inputs) == len(m.input_stream) and len(targets) == len(m.target_stream)  # no slot twice
        assert not {x for x in inputs & targets if x[0] in images}
        for stream, position in ((m.input_stream, m.input_position), (m.target_stream, m.target_position)):
            keys = stream.astype(int) * 1000 + position
            assert (np.diff(keys) > 0).all() and position.max() < 196


def test_two_image_streams_fill_both_budgets_and_a_large_target_takes_what_inputs_leave():
    streams = (STREAMS["tok_dem@224"], STREAMS["tok_lulc@224"])
    for m in draws(masks.MaskConfig(input_tokens=150, target_tokens=392), encoder=streams, decoder=streams):
        assert len(m.input_stream) == 150 and len(m.target_stream) <= 392 - 150
        for e in (0, 1):
            assert (m.input_stream == e).sum() + (m.target_stream == e).sum() <= 196


def test_absent_streams_are_never_drawn():
    for m in draws(masks.MaskConfig(input_alphas=(0.01, 5.0)), "sen1grd", "tok_ndvi"):
        drawn = {ENCODER_STREAMS[e].key for e in m.input_stream} | {DECODER_STREAMS[t].key for t in m.target_stream}
        assert not {k for k in drawn if "sen1grd" in k or k == "tok_ndvi@224"}


def test_mixtures_name_streams_and_fall_back_when_a_sample_lacks_them():
    config = masks.MaskConfig(
        input_alphas=({"S2RGB": 1000.0}, 0.5), target_alphas=({"default": 0.5, "LULC": 0.0},), mixture_weights=(0.5, 0.5)
    )
    rgb = [s.key for s in ENCODER_STREAMS].index("untok_sen2rgb@224")
    only = [set(m.input_stream.tolist()) == {rgb} for m in draws(config)]
    assert 0.3 < np.mean(only) < 0.7
    assert all(len(set(m.input_stream.tolist())) > 1 for m in draws(config, "rgb"))
    lulc = [s.key for s in DECODER_STREAMS].index("tok_lulc@224")
    assert not any((m.target_stream == lulc).any() for m in draws(config))


def test_nothing_to_show_or_to_predict_gives_an_empty_mask():
    plan = masks.plan_masks(ENCODER_STREAMS, DECODER_STREAMS, masks.MaskConfig())
    everything, nothing = np.ones(len(ENCODER_STREAMS), bool), np.zeros(len(DECODER_STREAMS), bool)
    m = masks.draw(plan, everything, nothing, order.generator("mask", 0))
    assert len(m.input_stream) == len(m.target_stream) == 0


def test_mean_budgets_follow_the_alphas_and_the_stated_moments():
    config = masks.MaskConfig(input_alphas=({"tok_dem@224": 3.0, "untok_dem@224": 1.0},))
    has = availability()
    plan = masks.plan_masks(ENCODER_STREAMS, DECODER_STREAMS, config)
    counts = np.array([np.bincount(m.input_stream, minlength=len(ENCODER_STREAMS)) for m in draws(config, count=600)])
    mean, square = masks.budget_moments(plan, *has)
    np.testing.assert_allclose(counts.mean(0), mean, atol=3.0)
    np.testing.assert_allclose(counts.std(0), np.sqrt(square - mean**2), atol=3.0)
    assert mean[[s.key for s in ENCODER_STREAMS].index("tok_dem@224")] == pytest.approx(96)


def test_draws_depend_on_seed_sample_epoch_and_view_and_on_nothing_else():
    plan, has = masks.plan_masks(ENCODER_STREAMS, DECODER_STREAMS, masks.MaskConfig()), availability("sen1grd")
    drawn = {
        key: masks.draw(plan, *has, order.generator("mask", *key))
        for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    }
    again = masks.draw(plan, *has, order.generator("mask", 0, 0, 0, 0))
    np.testing.assert_array_equal(again.input_position, drawn[0, 0, 0, 0].input_position)
    np.testing.assert_array_equal(again.target_source, drawn[0, 0, 0, 0].target_source)
    texts = {(m.input_stream.tobytes(), m.input_position.tobytes()) for m in drawn.values()}
    assert len(texts) == len(drawn)


def rebuild(inputs, targets):
    """Puts the spans of the target back where the input has their sentinels."""
    first = coordinates.SENTINEL
    spans, current = {}, None
    for token in targets:
        if first < token < first + 200:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    return [t for token in inputs for t in (spans[int(token)] if int(token) in spans else [int(token)])], list(spans)


@pytest.mark.parametrize("length, keep", [(3, "random"), (3, "binary"), (12, "random"), (12, "all")])
def test_spans_of_the_target_restore_the_sequence(length, keep):
    ids = 1000 + np.arange(length)
    seen = set()
    for i in range(DRAWS):
        inputs, targets = masks.span_mask(length, length, length + 9, keep, order.generator("mask", 0, 0, i))
        inputs, targets = masks.resolve(np.array(inputs, int), ids), masks.resolve(np.array(targets, int), ids)
        restored, sentinels = rebuild(inputs, targets)
        assert restored == ids.tolist()
        assert sentinels == [coordinates.SENTINEL + 1 + j for j in range(len(sentinels))] and targets[-1] == sentinels[-1]
        seen.add(len(inputs))
    assert len(seen) == (1 if keep == "all" else len(seen)) and (keep != "random" or len(seen) > 1)


def test_sequence_budgets_shorten_inputs_and_targets():
    for i in range(DRAWS):
        rng = order.generator("mask", 0, 1, i)
        inputs, targets = masks.span_mask(12, 5, 4, "all", rng)
        assert 1 <= len(inputs) <= 5 and len(targets) <= 5 and targets[0] < 0
        inputs, targets = masks.span_mask(3, 0, 4, "random", rng)
        assert inputs == [] and targets == [-1, 0, 1, 2, -2]
        assert masks.span_mask(3, 4, 0, "random", rng)[1] == []


def test_coordinates_are_predicted_one_id_after_the_other():
    coords = (STREAMS["coords"],)
    for m in draws(masks.MaskConfig(), encoder=coords, decoder=coords):
        given, wanted = masks.resolve(m.target_previous, IDS), masks.resolve(m.target_source, IDS)
        assert (given[1:] == wanted[:-1]).all() and m.target_position.tolist() == list(range(len(wanted)))
        assert len(wanted) == 0 or given[0] > coordinates.SENTINEL
        ids = np.concatenate([given[:1], wanted]) if len(wanted) else np.array([coordinates.SENTINEL + 1])
        assert rebuild(masks.resolve(m.input_source, IDS), ids)[0] == IDS.tolist()


def test_one_mixture_need_not_stand_in_a_tuple():
    for bare, listed in ((0.25, (0.25,)), ({"S2L2A": 1.0, "pixels": 0.5}, ({"S2L2A": 1.0, "pixels": 0.5},))):
        a, b = (masks.plan_masks(ENCODER_STREAMS, DECODER_STREAMS, masks.MaskConfig(input_alphas=x)) for x in (bare, listed))
        np.testing.assert_array_equal(a.input_alphas, b.input_alphas)
    by_key = {s.key: alpha for s, alpha in zip(ENCODER_STREAMS, a.input_alphas[0], strict=True)}
    assert (by_key["tok_sen2l2a@224"], by_key["untok_sen2l2a@224"], by_key["untok_dem@224"], by_key["tok_dem@224"]) == (1.0, 1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_tokens": 0}, "both must be at least 1"),
        ({"input_alphas": ({"S2": 1.0},)}, "names 'S2', which is no stream"),
        ({"target_alphas": ({"S2RGB": 1.0},)}, "without a positive alpha"),
        ({"input_alphas": (0.1, 0.2), "target_alphas": (1.0, 1.0, 1.0)}, "input_alphas has 2 entries; expected 1 or one for each of the 3"),
        ({"mixture_weights": (-1.0,)}, "expected none negative"),
        ({"sequence_keep": "some"}, "expected one of random, all, binary"),
    ],
)
def test_a_config_that_cannot_work_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        masks.plan_masks(ENCODER_STREAMS, DECODER_STREAMS, masks.MaskConfig(**change))
