"""Generation against plain, unpadded loops over the same network, and the properties users rely on (spec 8.3-8.5)."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terramind_jax import coordinates, generate, modalities, model, sampling, tokenizer
from terramind_jax.modalities import STREAMS, Stream

PIXELS = STREAMS["untok_dem@224"]
A = Stream("tok_a", "NDVI", "tokens", vocab_size=40)
B = Stream("tok_b", "LULC", "tokens", vocab_size=24)
C = Stream("tok_c", "DEM", "tokens", vocab_size=24)  # a target only
COORDS = Stream("coords", "coords", "sequence", vocab_size=300, max_tokens=4)
SIDE, LENGTH = 3, 9


def build(encoder, decoder, seed=0):
    config = model.TransformerConfig(
        dim=16, encoder_depth=1, decoder_depth=1, num_heads=2, gated_mlp=False, use_bias=True, encoder=encoder, decoder=decoder, image_size=16 * SIDE
    )
    module = model.TerraMind(config)
    variables = flax.core.meta.unbox(jax.jit(model.init, static_argnums=0)(module, jax.random.key(seed)))
    # A fresh network says nearly the same everywhere; larger weights make its answers depend on what it reads.
    params = jax.tree.map(lambda x: x * 4, variables["params"])
    return module, variables | {"params": params}


@pytest.fixture(scope="module")
def network():
    return build((PIXELS, A, B, COORDS), (A, B, C, COORDS))


def pixels(batch, seed=0):
    return {PIXELS.key: np.random.default_rng(seed).normal(size=(batch, 48, 48, 1)).astype(np.float32)}


def run(network, inputs, targets=("tok_a",), **options):
    tokens = generate.generate_tokens(*network, inputs, targets, **(dict(seed=0) | options))
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


def plain_loop(network, inputs, target, counts, schedule, seed=0):
    """Spec 8.3 for one sample at temperature 0, written down as it reads."""
    order = sampling.random_orders(sampling.sample_keys(jnp.asarray(sampling.seed_words(seed, 1)), target), LENGTH)[0]
    written = {}
    for count in counts:
        if schedule == "roar":
            positions = [int(p) for p in order[len(written) : len(written) + count]]
        else:
            positions = [p for p in range(LENGTH) if p not in written]
        probability = np.asarray(jax.nn.softmax(plain_logits(network, inputs, target, positions, own=written)))[0]
        if schedule == "roar":
            chosen = range(count)
        else:
            chosen = np.argsort(-probability.max(-1), kind="stable")[:count]
        written |= {positions[i]: int(probability[i].argmax()) for i in chosen}
    return np.array([written[p] for p in range(LENGTH)]).reshape(SIDE, SIDE)


def test_one_step_is_one_unmasked_pass(network):
    inputs = pixels(2) | {"tok_b": np.arange(18).reshape(2, SIDE, SIDE) % 24}
    expected = plain_logits(network, inputs, "tok_a", np.arange(LENGTH)).argmax(-1).reshape(2, SIDE, SIDE)
    np.testing.assert_array_equal(run(network, inputs, temperature=0)["tok_a"], expected)
    np.testing.assert_array_equal(run(network, inputs, temperature=0, schedule="maskgit")["tok_a"], expected)


@pytest.mark.parametrize("schedule", ["roar", "maskgit"])
@pytest.mark.parametrize("token_schedule, counts", [("linear", (3, 2, 2, 2)), ("cosine", (1, 3, 3, 2))])
def test_padded_steps_equal_the_plain_loop(network, schedule, token_schedule, counts):
    assert sampling.token_schedule(token_schedule, 4, LENGTH) == counts
    inputs = pixels(1)
    tokens = run(network, inputs, steps=4, schedule=schedule, token_schedule=token_schedule, temperature=0)["tok_a"]
    np.testing.assert_array_equal(tokens[0], plain_loop(network, inputs, "tok_a", counts, schedule))


def test_steps_see_the_tokens_already_written(network):
    tokens = [run(network, pixels(1), steps=steps, temperature=0)["tok_a"] for steps in (1, 4, LENGTH)]
    assert (tokens[0] != tokens[1]).any() and (tokens[1] != tokens[2]).any()


def test_one_token_a_step_visits_every_position_once(network):
    inputs = pixels(1)
    tokens = run(network, inputs, steps=LENGTH, temperature=0)["tok_a"]
    np.testing.assert_array_equal(tokens[0], plain_loop(network, inputs, "tok_a", (1,) * LENGTH, "roar"))


@pytest.mark.parametrize("options", [dict(), dict(steps=3), dict(steps=3, schedule="maskgit", guidance_scale=2.0)])
def test_a_sample_does_not_depend_on_its_batch(network, options):
    inputs, targets, seeds = pixels(8), ("tok_a", "coords"), np.arange(8) * 7
    together = run(network, inputs, targets, seed=seeds, **options)
    for i in range(8):
        alone = run(network, {k: v[i : i + 1] for k, v in inputs.items()}, targets, seed=seeds[i : i + 1], **options)
        for key in targets:
            np.testing.assert_array_equal(together[key][i], alone[key][0])
    order = np.random.default_rng(1).permutation(8)
    permuted = run(network, {k: v[order] for k, v in inputs.items()}, targets, seed=seeds[order], **options)
    for key in targets:
        np.testing.assert_array_equal(together[key][order], permuted[key])


def test_one_seed_serves_every_sample(network):
    same = {PIXELS.key: np.repeat(pixels(1)[PIXELS.key], 3, axis=0)}
    tokens = run(network, same, seed=11, steps=2)["tok_a"]
    assert (tokens == tokens[:1]).all()
    np.testing.assert_array_equal(tokens[:1], run(network, pixels(1), seed=np.array([11]), steps=2)["tok_a"])
    assert (tokens[0] != run(network, same, seed=12, steps=2)["tok_a"][0]).any()


def test_temperature_zero_ignores_the_seed_in_one_step(network):
    first, second = (run(network, pixels(2), seed=seed, temperature=0)["tok_a"] for seed in (1, 2))
    np.testing.assert_array_equal(first, second)
    warm = [run(network, pixels(2), seed=seed)["tok_a"] for seed in (1, 2)]
    assert (warm[0] != warm[1]).any()


def test_a_finished_target_is_an_input_of_the_next(network):
    chained = run(network, pixels(2), ("tok_a", "tok_b"))
    explicit = run(network, pixels(2) | {"tok_a": chained["tok_a"]}, ("tok_b",))
    np.testing.assert_array_equal(chained["tok_b"], explicit["tok_b"])
    other = run(network, pixels(2) | {"tok_a": (chained["tok_a"] + 1) % 40}, ("tok_b",))
    assert (chained["tok_b"] != other["tok_b"]).any()


def test_a_target_without_encoder_stream_conditions_nothing(network):
    chained = run(network, pixels(2), ("tok_c", "tok_b"), steps=2)
    np.testing.assert_array_equal(chained["tok_b"], run(network, pixels(2), ("tok_b",), steps=2)["tok_b"])


def test_guidance_at_one_changes_nothing_and_at_zero_forgets_the_inputs(network):
    plain = run(network, pixels(2), temperature=0, steps=2)["tok_a"]
    np.testing.assert_array_equal(plain, run(network, pixels(2), temperature=0, steps=2, guidance_scale=1 + 2e-7)["tok_a"])
    assert (plain != run(network, pixels(2), temperature=0, steps=2, guidance_scale=3.0)["tok_a"]).any()
    forgotten = [run(network, pixels(2, seed), temperature=0, steps=2, guidance_scale=0.0)["tok_a"] for seed in (0, 5)]
    np.testing.assert_array_equal(*forgotten)


def test_generates_from_nothing(network):
    tokens = run(network, {}, ("tok_a", "tok_c"), seed=np.arange(3), steps=2)
    assert tokens["tok_a"].shape == tokens["tok_c"].shape == (3, SIDE, SIDE)
    assert len({t.tobytes() for t in tokens["tok_a"]}) == 3


def test_settings_can_differ_by_target(network):
    both = run(network, pixels(1), ("tok_a", "tok_b"), steps={"tok_a": 2, "tok_b": 1}, temperature={"tok_a": 1.0, "tok_b": 0})
    first = run(network, pixels(1), ("tok_a",), steps=2)
    np.testing.assert_array_equal(both["tok_a"], first["tok_a"])
    second = run(network, pixels(1) | {"tok_a": first["tok_a"]}, ("tok_b",), temperature=0)
    np.testing.assert_array_equal(both["tok_b"], second["tok_b"])


def test_one_program_a_target_and_number_of_steps(network):
    run(network, pixels(2), steps=7)
    before = generate._write_image._cache_size()
    run(network, pixels(2, seed=1), steps=7, seed=9, temperature=0.5, guidance_scale=1)
    assert generate._write_image._cache_size() == before
    run(network, pixels(2), steps=6)
    assert generate._write_image._cache_size() == before + 1


def test_sequences_are_written_token_by_token(network):
    inputs = pixels(1)
    ids = [generate.START]
    for n in (1, 2, 3):
        hidden = jnp.asarray(np.triu(np.ones((1, n, n), bool), 1))
        args = dict(own={0: generate.START}, ids=jnp.asarray(ids)[None], self_mask=hidden)
        ids.append(int(plain_logits(network, inputs, "coords", np.arange(n), **args)[0, -1].argmax()))
    written = run(network, inputs, ("coords",), temperature=0)["coords"]
    assert written.shape == (1, 4)
    np.testing.assert_array_equal(written[0, :3], generate._until_sentinel(jnp.asarray(ids[1:])[None])[0])


def test_a_sequence_ends_at_its_first_sentinel():
    ids = jnp.array([[250, 260, 3], [250, generate.START + 1, 260], [4, 250, 260], [203, 1, 2], [204, 205, 203]])
    expected = [[250, 260, 3], [250, 0, 0], [0, 0, 0], [0, 0, 0], [204, 205, 0]]
    np.testing.assert_array_equal(generate._until_sentinel(ids), expected)


def test_padding_of_a_sequence_input_is_hidden(network):
    short = pixels(1) | {"coords": np.array([[250, 260, 3]])}
    padded = pixels(1) | {"coords": np.array([[250, 260, 3, 0]])}
    np.testing.assert_array_equal(run(network, short)["tok_a"], run(network, padded)["tok_a"])
    assert (run(network, short, temperature=0)["tok_a"] != run(network, pixels(1), temperature=0)["tok_a"]).any()


@pytest.mark.parametrize(
    "inputs, targets, options, message",
    [
        ({"tok_x": np.zeros((1, SIDE, SIDE), int)}, ("tok_a",), {}, "no input stream 'tok_x'"),
        (pixels(1), ("tok_x",), {}, "no target stream 'tok_x'"),
        ({"tok_a": np.zeros((1, SIDE, SIDE), int)}, ("tok_a",), {}, "both an input and a target"),
        (pixels(1), ("tok_a", "tok_a"), {}, "name a stream twice"),
        ({}, ("tok_c",), {}, "needs at least one input"),
        (pixels(2) | {"tok_b": np.zeros((1, SIDE, SIDE), int)}, ("tok_a",), {}, "differ in batch size"),
        ({PIXELS.key: np.zeros((1, 32, 32, 1))}, ("tok_a",), {}, r"generates from \[B, 48, 48, 1\]"),
        ({"tok_b": np.zeros((1, 2, 2), int)}, ("tok_a",), {}, r"generates from \[B, 3, 3\] tokens"),
        (pixels(1), ("tok_a",), {"steps": 0}, "must be at least 1"),
        (pixels(1), ("tok_a",), {"schedule": "raster"}, "known schedules: roar, maskgit"),
        (pixels(1), ("tok_a",), {"top_p": 2.0}, "top_p is 2.0"),
        (pixels(1), ("tok_a",), {"steps": {"tok_b": 2}}, "but not for the target 'tok_a'"),
    ],
)
def test_errors_say_what_is_wrong(network, inputs, targets, options, message):
    with pytest.raises(ValueError, match=message):
        run(network, inputs, targets, **options)


# ---- in physical units ----


@pytest.fixture(scope="module")
def system():
    names = ("untok_dem@224", "tok_lulc@224", "tok_ndvi@224", "coords")
    streams = tuple(STREAMS[name] for name in names)
    tokenizers = {}
    for name in ("DEM", "LULC", "NDVI"):
        facts = modalities.get(name)
        config = tokenizer.TokenizerConfig(name, facts.channels, facts.levels, dim=16, depth=1, num_heads=2, image_size=48)
        module = tokenizer.Tokenizer(config)
        tokenizers[name] = module, flax.core.meta.unbox(jax.jit(tokenizer.init, static_argnums=0)(module, jax.random.key(1)))
    return *build(streams, (*streams[1:], STREAMS["tok_dem@224"])), tokenizers


def scene(batch=2):
    rng = np.random.default_rng(0)
    return {"DEM": rng.integers(0, 3000, (batch, 48, 48, 1)).astype(np.int16)}


def test_generates_every_modality_in_its_unit(system):
    result = generate.generate(*system, scene(), ["LULC", "NDVI", "coords"], seed=0)
    assert {name: x.shape for name, x in result.items()} == {"LULC": (2, 48, 48, 10), "NDVI": (2, 48, 48, 1), "coords": (2, 2)}
    standardized = generate.generate(*system, {"DEM": modalities.standardize("DEM", scene()["DEM"])}, ["NDVI"], seed=0, standardize=False)
    first = generate.generate(*system, scene(), ["NDVI"], seed=0)
    np.testing.assert_allclose(modalities.destandardize("NDVI", standardized["NDVI"]), first["NDVI"], rtol=1e-5)


def test_tokenised_inputs_and_coordinates_condition(system):
    lulc = np.random.default_rng(3).integers(0, 10, (2, 48, 48))
    where = np.array([[11.5, 48.25], [-70.0, -33.5]])
    flat = generate.generate(*system, {"LULC": lulc, "coords": where}, ["NDVI"], seed=0, temperature=0)["NDVI"]
    square = generate.generate(*system, {"coords": where, "LULC": lulc[..., None]}, ["NDVI"], seed=0, temperature=0)["NDVI"]
    np.testing.assert_array_equal(flat, square)
    elsewhere = generate.generate(*system, {"LULC": lulc, "coords": where[::-1]}, ["NDVI"], seed=0, temperature=0)["NDVI"]
    assert (flat != elsewhere).any()


def test_unwritten_coordinates_are_nan(system):
    ids = np.array([[coordinates.EOS, 0, 0, 0], [*coordinates.encode(11.5, 48.25), 0]])
    decoded = generate.decode_output(STREAMS["coords"], jnp.asarray(ids), {})
    np.testing.assert_array_equal(decoded, [[np.nan, np.nan], [11.5, 48.25]])


@pytest.mark.parametrize(
    "inputs, outputs, options, message",
    [
        ({"S3": np.zeros((1, 48, 48, 1))}, ["NDVI"], {}, "Unknown input modality 'S3'"),
        (scene(), ["S3"], {}, "Unknown output modality 'S3'"),
        ({"S2L2A": np.zeros((1, 48, 48, 12))}, ["NDVI"], {}, "takes no S2L2A; it takes DEM, LULC, NDVI, coords"),
        (scene(), ["S1GRD"], {}, "makes no S1GRD; it makes LULC, NDVI, coords, DEM"),
        ({"LULC": np.zeros((1, 48, 48), int)}, ["LULC"], {}, "LULC is both an input and an output"),
        ({"DEM": np.zeros((1, 1, 48, 48))}, ["NDVI"], {}, "channels-first"),
        ({"DEM": np.full((1, 48, 48, 1), np.nan)}, ["NDVI"], {}, "NaN"),
        ({"LULC": np.full((1, 48, 48), 10)}, ["NDVI"], {}, "from 10 to 10; expected integer classes 0-9"),
        (scene(), ["NDVI"], {"steps": {"S1GRD": 2}}, "S1GRD, which is no output; outputs: NDVI"),
    ],
)
def test_errors_name_the_users_modalities(system, inputs, outputs, options, message):
    with pytest.raises(ValueError, match=message):
        generate.generate(*system, inputs, outputs, seed=0, **options)


def test_a_missing_tokenizer_is_named(system):
    module, variables, tokenizers = system
    with pytest.raises(ValueError, match="output LULC needs a tokenizer of LULC; given: NDVI"):
        generate.generate(module, variables, {"NDVI": tokenizers["NDVI"]}, scene(), ["LULC"], seed=0)
    with pytest.raises(ValueError, match="input NDVI needs a tokenizer of NDVI; given: none"):
        generate.generate(module, variables, {}, {"NDVI": np.zeros((1, 48, 48, 1))}, ["coords"], seed=0)
