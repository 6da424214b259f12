"""Decoding against plain, unpadded loops over the same network, and the properties users rely on (spec 8.3, 8.4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_networks

from terramind_jax import decoding, sampling
from terramind_jax.modalities import STREAMS, Stream
from terramind_jax.model.positions import resize_bicubic

PIXELS = STREAMS["untok_dem@224"]
A = Stream("tok_a", "NDVI", "tokens", vocab_size=40)
B = Stream("tok_b", "LULC", "tokens", vocab_size=24)
C = Stream("tok_c", "DEM", "tokens", vocab_size=24)  # a target only
COORDS = Stream("coords", "coords", "sequence", vocab_size=300, max_tokens=4)
SIDE, LENGTH = 3, 9


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def network():
    return random_networks.build((PIXELS, A, B, COORDS), (A, B, C, COORDS))


def pixels(batch, seed=0, side=48):
    return {PIXELS.key: np.random.default_rng(seed).normal(size=(batch, side, side, 1)).astype(np.float32)}


def run(network, inputs, targets=("tok_a",), **options):
    tokens = decoding.generate_tokens(*network, inputs, targets, **(dict(seed=0) | options))
    return {key: np.asarray(value) for key, value in tokens.items()}


@functools.partial(jax.jit, static_argnames=("module", "target"))
def plain_pass(variables, inputs, own, positions, ids, self_mask, *, module, target):
    """Logits of one pass over exactly the tokens that exist: nothing is padded, nothing is hidden. `own`: positions and ids written."""
    apply = functools.partial(module.apply, variables)
    slots = [apply(key, value, method="embed") for key, value in inputs.items()]
    slots += [apply(target, own[1], own[0], method="embed")] if own else []
    content, emb = (jnp.concatenate(parts, axis=1) for parts in zip(*slots, strict=True))
    context = apply(content, emb, method="encode")
    y = apply(apply(target, positions, ids, method="queries"), context, None, self_mask, method="decode")
    return apply(target, y, method="logits")


def plain_logits(network, inputs, target, positions, own=None, ids=None, self_mask=None):
    batch_size = next(iter(inputs.values())).shape[0]
    positions = np.broadcast_to(np.asarray(positions), (batch_size, len(positions)))
    own = own and tuple(np.array(list(x))[None] for x in (own.keys(), own.values()))
    return plain_pass(network[1], inputs, own or None, positions, ids, self_mask, module=network[0], target=target)


def plain_loop(network, inputs, target, counts, schedule, seed=0, stay=None):
    """Spec 8.3 for one sample at temperature 0, written down as it reads. `stay`: positions and ids that are there before."""
    places = sampling.places(jnp.zeros((1, 2), int), SIDE, SIDE)
    order = sampling.random_orders(sampling.sample_keys(jnp.asarray(sampling.seed_words(seed, 1)), target), places)[0]
    written, start = dict(stay or {}), 0
    for count in counts:
        positions = [int(p) for p in order[start : start + count]] if schedule == "roar" else range(LENGTH)
        positions, start = [p for p in positions if p not in written], start + count
        if not positions:
            continue
        probability = np.asarray(jax.nn.softmax(plain_logits(network, inputs, target, positions, own=written)))[0]
        if schedule == "roar":
            chosen = range(len(positions))
        else:
            chosen = np.argsort(-probability.max(-1), kind="stable")[:count]
        written |= {positions[i]: int(probability[i].argmax()) for i in chosen}
    return np.array([written[p] for p in range(LENGTH)]).reshape(SIDE, SIDE)


def test_one_step_is_one_unmasked_pass(network):
    expected = plain_logits(network, pixels(2), "tok_a", np.arange(LENGTH)).argmax(-1).reshape(2, SIDE, SIDE)
    np.testing.assert_array_equal(run(network, pixels(2), temperature=0)["tok_a"], expected)


@pytest.mark.parametrize("schedule", ["roar", "maskgit"])
def test_padded_steps_equal_the_plain_loop(network, schedule):
    tokens = run(network, pixels(2), steps=2, schedule=schedule, temperature=0)["tok_a"]
    first = {key: value[:1] for key, value in pixels(2).items()}
    np.testing.assert_array_equal(tokens[0], plain_loop(network, first, "tok_a", (5, 4), schedule))
    assert (tokens != run(network, pixels(2), temperature=0)["tok_a"]).any()  # the second step saw the first


def test_one_token_a_step_visits_every_position(network):
    module, variables = network
    table = variables["params"]["decoder_token_emb"]
    never_zero = table | {"tok_a": table["tok_a"].at[0].set(0)}  # logit 0 is never the largest of 40
    variables = variables | {"params": variables["params"] | {"decoder_token_emb": never_zero}}
    tokens = run((module, variables), pixels(2), steps=LENGTH, temperature=0, seed=np.array([3, 4]))["tok_a"]
    assert (tokens != 0).all()


def test_a_sample_does_not_depend_on_its_batch(network):
    targets, seeds = ("tok_a", "tok_b"), np.arange(8) * 7
    options = dict(steps=3, schedule={"tok_a": "roar", "tok_b": "maskgit"}, guidance_scale={"tok_a": 1.0, "tok_b": 2.0})
    together = run(network, pixels(8), targets, seed=seeds, **options)
    for i in range(8):
        alone = run(network, {k: v[i : i + 1] for k, v in pixels(8).items()}, targets, seed=seeds[i : i + 1], **options)
        for key in targets:
            np.testing.assert_array_equal(together[key][i], alone[key][0])
    order = np.random.default_rng(1).permutation(8)
    permuted = run(network, {k: v[order] for k, v in pixels(8).items()}, targets, seed=seeds[order], **options)
    for key in targets:
        np.testing.assert_array_equal(together[key][order], permuted[key])


def test_one_seed_serves_every_sample(network):
    same = {PIXELS.key: np.repeat(pixels(1)[PIXELS.key], 8, axis=0)}
    tokens = run(network, same, seed=11, steps=3)["tok_a"]
    assert (tokens == tokens[:1]).all()
    np.testing.assert_array_equal(tokens, run(network, same, seed=np.full(8, 11), steps=3)["tok_a"])
    assert (tokens != run(network, same, seed=12, steps=3)["tok_a"]).any()
    assert len({t.tobytes() for t in run(network, same, seed=np.arange(8), steps=3)["tok_a"]}) == 8


def test_temperature_zero_ignores_the_seed_in_one_step(network):
    first, second = (run(network, pixels(2), seed=seed, temperature=0)["tok_a"] for seed in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_a_finished_target_is_an_input_of_the_next(network):
    chained = run(network, pixels(2), ("tok_a", "tok_b"), temperature={"tok_a": 0, "tok_b": 0.0})
    explicit = run(network, pixels(2) | {"tok_a": chained["tok_a"]}, ("tok_b",), temperature=0)
    np.testing.assert_array_equal(chained["tok_b"], explicit["tok_b"])
    other = run(network, pixels(2) | {"tok_a": (chained["tok_a"] + 1) % 40}, ("tok_b",), temperature=0)
    assert (chained["tok_b"] != other["tok_b"]).any()


def test_target_after_target_equals_one_call(network):
    """With all that is random, and a sequence to come in between."""
    targets, options = ("tok_a", "coords", "tok_b", "tok_c"), dict(seed=np.array([5, 6]), steps=2, at=np.array([[1, 2], [0, 7]]))
    together, known = run(network, pixels(2), targets, **options), {}
    for target in targets:
        made = run(network, pixels(2), targets, known_tokens=known, only=target, **options)
        assert list(made) == [target]
        known |= made
    for target in targets:
        np.testing.assert_array_equal(known[target], together[target])
    rest = run(network, pixels(2), targets, known_tokens={key: known[key] for key in targets[:2]}, **options)
    assert list(rest) == ["tok_b", "tok_c"]
    np.testing.assert_array_equal(rest["tok_c"], together["tok_c"])


@pytest.mark.parametrize("schedule", ["roar", "maskgit"])
def test_windows_of_a_scene_share_its_draws(network, schedule):
    """All content is zero and all places alike, so that tokens differ by their draws alone."""
    module, variables = network
    flat = jax.tree.map(jnp.zeros_like, {"buffers": variables["buffers"]}) | {"params": variables["params"]}
    options = dict(schedule=schedule, top_p=0.0, temperature=5.0)
    blank = {PIXELS.key: np.zeros((1, 48, 48, 1))}
    whole = run((module, flat), blank, at=np.array([[4, 9]]), **options)["tok_a"]
    moved = run((module, flat), blank, at=np.array([[5, 8]]), **options)["tok_a"]
    np.testing.assert_array_equal(whole[:, 1:, :2], moved[:, :2, 1:])
    assert len(np.unique(whole)) > 3 and (run((module, flat), blank, **options)["tok_a"] != whole).any()


def test_targets_that_do_not_depend_on_each_other_are_written_together(network, monkeypatch):
    """One program, and what each alone gives: without chaining, and where those before are no inputs."""
    programs, write = [], decoding._write_images

    def record(*arrays, targets, **options):
        programs.append(targets)
        return write(*arrays, targets=targets, **options)

    monkeypatch.setattr(decoding, "_write_images", record)
    targets, options = ("tok_a", "tok_b", "coords", "tok_c"), dict(seed=np.array([5, 6]), steps=2, guidance_scale=2.0, chained=False)
    together = run(network, pixels(2), targets, **options)
    assert programs == [("tok_a", "tok_b"), ("tok_c",)]
    for target in targets:
        np.testing.assert_array_equal(together[target], run(network, pixels(2), (target,), **options)[target])
    programs.clear()
    settings = dict(seed=3, temperature={"tok_a": 1, "tok_b": 1, "tok_c": 0.5}, chained=False)
    one_step = run(network, pixels(2), ("tok_c", "tok_a", "tok_b"), **settings)
    assert programs == [("tok_c",), ("tok_a", "tok_b")] and list(one_step) == ["tok_c", "tok_a", "tok_b"]
    np.testing.assert_array_equal(one_step["tok_b"], run(network, pixels(2), ("tok_b",), seed=3)["tok_b"])


def test_a_target_without_encoder_stream_conditions_nothing(network):
    chained = run(network, pixels(2), ("tok_c", "tok_a"), temperature=0)
    np.testing.assert_array_equal(chained["tok_a"], run(network, pixels(2), temperature=0)["tok_a"])


def test_a_sequence_to_come_is_seen_as_its_start(network):
    """As in the reference (spec 8.3, 8.4)."""
    before = run(network, pixels(2), ("tok_a", "coords"), temperature=0)["tok_a"]
    explicit = run(network, pixels(2) | {"coords": np.full((2, 1), decoding.START)}, temperature=0)["tok_a"]
    np.testing.assert_array_equal(before, explicit)
    assert (before != run(network, pixels(2), temperature=0)["tok_a"]).any()


@pytest.mark.parametrize("steps", [1, 2])
def test_hidden_patches_are_as_if_not_given(network, steps):
    """Against a pass over the visible slots alone, each sample with a mask of its own; what hidden patches hold does not matter."""
    module, variables = network
    visible = np.array([[1, 0, 1, 1, 0, 0, 0, 1, 0], [0] * 8 + [1]], bool).reshape(2, SIDE, SIDE)
    inputs = pixels(2) | {"tok_b": np.arange(18).reshape(2, SIDE, SIDE)}
    tokens = run(network, inputs, temperature=0, visible={PIXELS.key: visible}, steps=steps)["tok_a"]
    if steps == 1:
        for i in range(2):
            slots = [module.apply(variables, key, value[i : i + 1], method="embed") for key, value in inputs.items()]
            seen = np.concatenate([np.flatnonzero(visible[i]), SIDE**2 + np.arange(SIDE**2)])
            content, emb = (jnp.concatenate(parts, axis=1)[:, seen] for parts in zip(*slots, strict=True))
            context = module.apply(variables, content, emb, method="encode")
            y = module.apply(
                variables, module.apply(variables, "tok_a", np.arange(9)[None], method="queries"), context, None, method="decode"
            )
            expected = module.apply(variables, "tok_a", y, method="logits").argmax(-1)
            np.testing.assert_array_equal(tokens[i].ravel(), expected[0])
    holes = np.where(np.kron(visible, np.ones((1, 16, 16), bool))[..., None], inputs[PIXELS.key], np.nan)
    same = run(network, inputs | {PIXELS.key: holes}, temperature=0, visible={PIXELS.key: visible}, steps=steps)["tok_a"]
    np.testing.assert_array_equal(tokens, same)
    assert (tokens != run(network, inputs, temperature=0, steps=steps)["tok_a"]).any()


def test_what_is_visible_compiles_nothing_anew_and_may_be_all_or_nothing(network):
    def seeing(mask):
        return run(network, pixels(2), temperature=0, visible={PIXELS.key: np.full((2, SIDE, SIDE), mask)})["tok_a"]

    whole = seeing(True)
    np.testing.assert_array_equal(whole, run(network, pixels(2), temperature=0)["tok_a"])
    before = decoding._write_images._cache_size()
    nothing = seeing(False)
    assert decoding._write_images._cache_size() == before and (nothing == nothing[:1]).all() and (nothing != whole).any()


@pytest.mark.parametrize("schedule", ["roar", "maskgit"])
def test_tokens_that_stay_are_in_painted_around(network, schedule):
    """Against the plain loop that begins with them, each sample with a mask of its own; what hidden tokens are does not matter."""
    own = np.random.default_rng(2).integers(0, 40, (2, SIDE, SIDE))
    visible = np.array([[1, 0, 1, 1, 0, 0, 0, 1, 0], [0] * 8 + [1]], bool).reshape(2, SIDE, SIDE)
    options = dict(steps=2, schedule=schedule, temperature=0, visible={"tok_a": visible})
    painted = run(network, pixels(2) | {"tok_a": own}, **options)["tok_a"]
    for i in range(2):
        first = {key: value[i : i + 1] for key, value in pixels(2).items()}
        stay = {int(p): int(own[i].flat[p]) for p in np.flatnonzero(visible[i])}
        np.testing.assert_array_equal(painted[i], plain_loop(network, first, "tok_a", (5, 4), schedule, stay=stay))
    np.testing.assert_array_equal(painted, run(network, pixels(2) | {"tok_a": np.where(visible, own, 7)}, **options)["tok_a"])


@pytest.mark.parametrize("chained", [True, False])
def test_what_is_in_painted_conditions_the_others(network, chained):
    """What stays those before it; those after it what it became. Target after target, and alone where nothing stays, is the same."""
    targets, visible = ("tok_b", "tok_a", "tok_c"), {"tok_a": np.arange(18).reshape(2, SIDE, SIDE) % 3 > 0}
    inputs = pixels(2) | {"tok_a": np.random.default_rng(2).integers(0, 40, (2, SIDE, SIDE))}
    options = dict(visible=visible, chained=chained, temperature=0)
    together, known = run(network, inputs, targets, **options), {}
    np.testing.assert_array_equal(together["tok_b"], run(network, inputs, ("tok_b",), visible=visible, temperature=0)["tok_b"])
    before = {"tok_b": together["tok_b"]} if chained else {}
    np.testing.assert_array_equal(together["tok_a"], run(network, inputs | before, visible=visible, temperature=0)["tok_a"])
    finished = pixels(2) | {key: together[key] for key in targets[:2]}
    after = (
        run(network, finished, ("tok_c",), temperature=0) if chained else run(network, inputs, ("tok_c",), visible=visible, temperature=0)
    )
    np.testing.assert_array_equal(together["tok_c"], after["tok_c"])
    for target in targets:
        known |= run(network, inputs, targets, known_tokens=known, only=target, **options)
    for target in targets:
        np.testing.assert_array_equal(known[target], together[target])


def test_guidance_at_one_changes_nothing_and_at_zero_forgets_the_inputs(network):
    plain = run(network, pixels(2), temperature=0, steps=2)["tok_a"]
    np.testing.assert_array_equal(plain, run(network, pixels(2), temperature=0, steps=2, guidance_scale=1 + 2e-7)["tok_a"])
    assert (plain != run(network, pixels(2), temperature=0, steps=2, guidance_scale=3.0)["tok_a"]).any()
    forgotten = [run(network, pixels(2, seed), temperature=0, steps=2, guidance_scale=0.0)["tok_a"] for seed in (0, 5)]
    np.testing.assert_array_equal(*forgotten)


def test_guidance_counts_tokens_and_sequences_among_the_inputs(network):
    """At zero it is as if neither were given."""
    inputs = {"tok_b": np.arange(18).reshape(2, SIDE, SIDE), "coords": np.array([[250, 260, 3], [210, 290, 3]])}
    guided = functools.partial(run, network, temperature=0, steps=2)
    nothing = run(network, {}, seed=np.zeros(2, int), temperature=0, steps=2)["tok_a"]
    np.testing.assert_array_equal(guided(inputs, guidance_scale=0.0)["tok_a"], nothing)
    strong = guided(inputs, guidance_scale=3.0)["tok_a"]
    for key, value in inputs.items():
        assert (strong != guided(inputs | {key: value[::-1]}, guidance_scale=3.0)["tok_a"]).any(), key


def test_guidance_of_a_sequence_is_the_formula(network):
    """Of its first token, which sees its start alone besides the inputs."""
    module, variables = network
    table = variables["params"]["decoder_token_emb"]
    no_end = table["coords"].at[decoding.START - 1 : decoding.LAST_SENTINEL + 1].set(0)  # logit 0 is never the largest
    variables = variables | {"params": variables["params"] | {"decoder_token_emb": table | {"coords": no_end}}}
    inputs = {"tok_b": np.arange(9).reshape(1, SIDE, SIDE)}
    start, place = jnp.full((1, 1), decoding.START), jnp.zeros((1, 1), int)
    plain = functools.partial(plain_pass, variables, own=(place, start), positions=place, ids=start, self_mask=None)
    conditional, unconditional = (plain(given, module=module, target="coords")[0, 0] for given in (inputs, {}))
    expected = (unconditional + (conditional - unconditional) * 3.0).argmax()
    written = run((module, variables), inputs, ("coords",), temperature=0, guidance_scale=3.0)["coords"][0, 0]
    assert written == expected and expected not in (conditional.argmax(), unconditional.argmax())


def test_generates_from_nothing(network):
    tokens = run(network, {}, seed=np.arange(3))["tok_a"]
    assert tokens.shape == (3, SIDE, SIDE) and len({t.tobytes() for t in tokens}) == 3


@pytest.mark.parametrize("side", [32, 64])
def test_images_of_another_size_interpolate_positions(network, side):
    """Of the inputs by the network itself, of the outputs by the resized table: one pass, put together by hand (spec 5.6)."""
    module, variables = network
    inputs, grid = pixels(2, side=side) | {"tok_b": np.arange(2 * (side // 16) ** 2).reshape(2, -1) % 24}, (side // 16,) * 2
    table = resize_bicubic(variables["buffers"]["decoder_pos_emb"]["tok_a"].reshape(SIDE, SIDE, -1), grid).reshape(-1, 16)
    params = variables["params"]
    apply = jax.jit(functools.partial(module.apply, variables), static_argnames=("method",))
    slots = [module.apply(variables, key, value, method="embed") for key, value in inputs.items()]
    context = apply(*(jnp.concatenate(parts, axis=1) for parts in zip(*slots, strict=True)), method="encode")
    queries = jnp.broadcast_to(params["mask_token"] + table + params["mod_emb"]["tok_a"], (2, *table.shape))
    expected = module.apply(variables, "tok_a", apply(queries, context, None, method="decode"), method="logits").argmax(-1)
    tokens = run(network, inputs, temperature=0)["tok_a"]
    np.testing.assert_array_equal(tokens, expected.reshape(2, *grid))
    chained = run(network, inputs, ("tok_a", "coords", "tok_c"), steps=2, seed=np.arange(2))
    assert chained["tok_a"].shape == chained["tok_c"].shape == (2, *grid) and chained["coords"].shape == (2, 4)


def test_one_program_a_target_and_number_of_steps(network):
    run(network, pixels(2), steps=2, temperature=0)
    before = decoding._write_images._cache_size()
    run(network, pixels(2, seed=1), steps=2, seed=9, temperature=0, guidance_scale=1)
    assert decoding._write_images._cache_size() == before


def test_sequences_are_written_token_by_token(network):
    inputs, ids = {key: value[:1] for key, value in pixels(2).items()}, [decoding.START]
    for n in (1, 2, 3):
        hidden = jnp.asarray(np.triu(np.ones((1, n, n), bool), 1))
        args = dict(own={0: decoding.START}, ids=jnp.asarray(ids)[None], self_mask=hidden)
        ids.append(int(plain_logits(network, inputs, "coords", np.arange(n), **args)[0, -1].argmax()))
    written = run(network, pixels(2), ("coords",), temperature=0)["coords"]
    assert written.shape == (2, 4)
    np.testing.assert_array_equal(written[0, :3], decoding._until_sentinel(jnp.asarray(ids[1:])[None])[0])


def test_a_sequence_ends_at_its_first_sentinel():
    ids = jnp.array([[250, 260, 3], [250, decoding.START + 1, 260], [4, 250, 260], [203, 1, 2], [204, 205, 203]])
    expected = [[250, 260, 3], [250, 0, 0], [0, 0, 0], [0, 0, 0], [204, 205, 0]]
    np.testing.assert_array_equal(decoding._until_sentinel(ids), expected)


def test_padding_of_a_sequence_input_is_hidden(network):
    short = pixels(2) | {"coords": np.array([[250, 260, 3]] * 2)}
    padded = pixels(2) | {"coords": np.array([[250, 260, 3, 0]] * 2)}
    tokens = run(network, short, temperature=0)["tok_a"]
    np.testing.assert_array_equal(tokens, run(network, padded, temperature=0)["tok_a"])
    assert (tokens != run(network, pixels(2), temperature=0)["tok_a"]).any()


@pytest.mark.parametrize(
    "inputs, targets, options, message",
    [
        ({"tok_x": np.zeros((1, SIDE, SIDE), int)}, ("tok_a",), {}, "no input stream 'tok_x'"),
        (pixels(1), ("tok_x",), {}, "no target stream 'tok_x'"),
        ({"tok_a": np.zeros((1, SIDE, SIDE), int)}, ("tok_a",), {}, "both an input and a target"),
        (pixels(1), ("tok_a", "tok_a"), {}, "name a stream twice"),
        ({}, ("tok_c",), {}, "needs at least one input"),
        (pixels(2) | {"tok_b": np.zeros((1, SIDE, SIDE), int)}, ("tok_a",), {}, "differ in batch size"),
        ({PIXELS.key: np.zeros((1, 32, 48, 1))}, ("tok_a",), {}, r"expected \[B, S, S, 1\], S a multiple of the patch size 16"),
        ({PIXELS.key: np.zeros((1, 40, 40, 1))}, ("tok_a",), {}, r"expected \[B, S, S, 1\], S a multiple of the patch size 16"),
        ({"tok_b": np.zeros((1, 8), int)}, ("tok_a",), {}, r"shape \[1, 8\]; expected the ids of a square of tokens"),
        (pixels(1) | {"tok_b": np.zeros((1, 2, 2), int)}, ("tok_a",), {}, "untok_dem@224 48 pixels, tok_b 32 pixels"),
        (pixels(1), ("tok_a",), {"only": "tok_b"}, "option only is 'tok_b', which is no target; targets: tok_a"),
        (pixels(1), ("tok_a",), {"known_tokens": {"tok_x": np.zeros((1, SIDE, SIDE), int)}}, "no target stream 'tok_x'"),
        (pixels(1), ("tok_a",), {"known_tokens": {"tok_a": np.zeros((2, SIDE, SIDE), int)}}, "differ in batch size"),
        (pixels(1), ("tok_a",), {"only": "tok_a", "known_tokens": {"tok_a": np.zeros((1, 3, 3), int)}}, "'tok_a', which is to be sampled"),
        (pixels(1), ("tok_a",), {"at": np.zeros((2, 2), int)}, r"expected integers \[1, 2\], row and column"),
        (pixels(1), ("tok_a",), {"visible": {"tok_b": np.ones((1, 3, 3), bool)}}, "given for 'tok_b', which is no image among the inputs"),
        (pixels(1), ("tok_a",), {"visible": {PIXELS.key: np.ones((1, 9), bool)}}, r"bool of shape \[1, 9\]; expected bool \[1, 3, 3\]"),
        (pixels(1), ("tok_a",), {"steps": 0}, "must be at least 1"),
        (pixels(1), ("tok_a",), {"schedule": "raster"}, "known schedules: roar, maskgit"),
        (pixels(1), ("tok_a",), {"top_p": 2.0}, "top_p is 2.0"),
        (pixels(1), ("tok_a",), {"steps": {"tok_b": 2}}, "but not for the target 'tok_a'"),
    ],
)
def test_errors_say_what_is_wrong(network, inputs, targets, options, message):
    with pytest.raises(ValueError, match=message):
        run(network, inputs, targets, **options)
