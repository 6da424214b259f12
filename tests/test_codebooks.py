"""Streams of which a patch is several codes: the loss is that of a plain computation, a run learns, and what it generates is tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_networks
import tiny_run

from terramind_jax import decoding, generate_scenes, geo, modalities, model, sharding, sources, tim, tokenize, tokenizer, weights
from terramind_jax.convert import rules
from terramind_jax.model import PADDING, Backbone, BackboneConfig, TerraMind, TransformerConfig, backbone, codebooks
from terramind_jax.train import logging, pretrain
from terramind_jax.train import tokenizer as tokenizer_training

pytestmark = pytest.mark.usefixtures("compile_fast")
K, V = 4, 8
MANY = 128  # of runs: with 8 codes each, what the next TerraMind announces
STREAMS = (
    dataclasses.replace(modalities.STREAMS["tok_dem@224"], vocab_size=V, num_codebooks=K),
    dataclasses.replace(modalities.STREAMS["tok_lulc@224"], vocab_size=20),
    dataclasses.replace(modalities.STREAMS["tok_ndvi@224"], vocab_size=5, num_codebooks=2),
)
DEM, LULC, NDVI = (s.key for s in STREAMS)
SIZES = dict(dim=16, encoder_depth=1, decoder_depth=1, num_heads=2, gated_mlp=False, use_bias=True, image_size=48)
CONFIG = TransformerConfig(**SIZES, encoder=STREAMS, decoder=STREAMS)


@pytest.fixture(scope="module")
def variables():
    made = random_networks.random_variables(model.init, TerraMind(CONFIG), scale=0.3)
    rng = np.random.default_rng(1)  # biases of the codebooks too
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), made)


def slots(kind: str, size: int, seed: int) -> dict:
    """Random slots of all three streams and padding, no two samples alike."""
    rng, shape = np.random.default_rng(seed), (size, 9)
    modality = rng.choice([0, 1, 2, PADDING], shape).astype(np.uint8)
    codes = rng.integers(0, V, (*shape, K)).astype(np.uint8)
    codes[modality == 2] %= 5
    return {
        f"{kind}_modality": modality,
        f"{kind}_position": rng.permuted(np.tile(np.arange(9), (size, 1)), axis=1).astype(np.uint16),
        f"{kind}_id": np.where(modality == 1, rng.integers(0, 20, shape), 0).astype(np.int32),
        f"{kind}_codes": codes,
    }


def batch_of(size: int = 8) -> dict:
    return {**slots("input", size, 0), **slots("target", size, 1), "target_input": np.zeros((size, 9), np.int32), "patches": {}}


def plain(variables: dict, batch: dict) -> jax.Array:
    """`TerraMind.losses` with every embedding and every logit of every slot, by tables that are written out."""
    params, module = variables["params"], TerraMind(CONFIG)

    def mlp(p, x):
        return jax.nn.gelu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"], approximate=False) @ p["fc2"]["kernel"] + p["fc2"]["bias"]

    def fusion(key, codes, k, v):
        p, norm = params["encoder_codebook_emb"][key], variables["buffers"]["encoder_codebook_emb"][key]["norm"]
        tables = p["fc1"]["kernel"].reshape(k, v, -1)
        x = sum(tables[i][codes[..., i]] for i in range(k)) + p["fc1"]["bias"]
        x = jax.nn.gelu(x, approximate=False) @ p["fc2"]["kernel"] + p["fc2"]["bias"]
        return jax.nn.standardize(x, epsilon=1e-6) * p["norm"]["scale"] + norm["bias"]

    modality, target = batch["input_modality"][..., None], batch["target_modality"]
    each = [
        fusion(DEM, batch["input_codes"], K, V),
        params["encoder_token_emb"][LULC][batch["input_id"]],
        fusion(NDVI, batch["input_codes"][..., :2], 2, 5),
    ]
    content = sum(jnp.where(modality == m, x, 0) for m, x in enumerate(each))

    def rest(bound):
        emb = bound._slot_embedding(STREAMS, bound.encoder_pos_emb(), batch["input_modality"], batch["input_position"])
        padding = batch["input_modality"] == PADDING
        return bound.decode(bound._target_slots(batch), bound.encode(content, emb, padding), padding, bound._target_mask(batch))

    y, codes = module.apply(variables, method=rest), batch["target_codes"]
    heads = params["decoder_codebook_head"]

    def loss(logits, ids):  # [B, M, K, V], [B, M, K]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0].mean(-1)

    each = [
        loss(mlp(heads[DEM], y).reshape(*y.shape[:2], K, V), codes),
        loss((y @ params["decoder_token_emb"][LULC].T)[..., None, :], batch["target_id"][..., None]),
        loss(mlp(heads[NDVI], y).reshape(*y.shape[:2], 2, 5), codes[..., :2]),
    ]
    return jnp.stack([jnp.where(target == m, x, 0).sum() for m, x in enumerate(each)])


def test_losses_and_gradients_are_those_of_a_plain_computation(variables, monkeypatch):
    monkeypatch.setattr(codebooks, "BLOCK", 16)  # of a stream's slots, about 18, two blocks
    batch, weigh = jax.tree.map(jnp.asarray, batch_of()), jnp.asarray([1.0, 0.3, 2.0])

    def sums(variables):
        return TerraMind(CONFIG).apply(variables, batch, method="losses")[0]

    def both(function):
        def total(params):
            found = function({**variables, "params": params})
            return (found * weigh).sum(), found

        gradients, found = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
        return found, gradients

    (value, gradients), (expected, expected_gradients) = both(sums), both(partial(plain, batch=batch))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), gradients, expected_gradients)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients["encoder_codebook_emb"]))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_a_function_sees_its_rows_alone(mesh, monkeypatch):
    monkeypatch.setattr(codebooks, "BLOCK", 8)
    rng = np.random.default_rng(0)
    table, codes = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), jnp.asarray(rng.integers(0, 5, (80, 2)), jnp.uint8)

    def rows(table, x, codes):
        return jnp.sin(table[codes[:, 0]] * x) + table[codes[:, 1]]

    def plainly(table, x, mine):
        return jnp.where(mine[:, None], rows(table, jnp.where(mine[:, None], x, 0), codes), 0)

    def over_rows(table, x, mine):
        return codebooks.over_rows(rows, table, x, codes, mine)

    def gradients(function):
        def total(table, x, mine):
            made = function(table, x, mine)
            return (made * jnp.arange(240).reshape(80, 3)).sum(), made

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))

    mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])
    with jax.set_mesh(mesh):
        found, expected = gradients(over_rows), gradients(plainly)
        for share in (0.0, 0.2, 1.0):
            mine = rng.random(80) < share
            x = np.where(mine[:, None], rng.normal(size=(80, 3)), np.nan).astype(np.float32)
            for a, b in zip(jax.tree.leaves(found(table, x, mine)), jax.tree.leaves(expected(table, x, mine)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_what_has_one_codebook_has_no_other_variables():
    config = dataclasses.replace(CONFIG, encoder=STREAMS[1:2], decoder=STREAMS[1:2])
    made = jax.eval_shape(partial(model.init, TerraMind(config)), jax.random.key(0))
    assert not [name for group in made.values() for name in group if "codebook" in name]


# ---- generation ----


def test_all_codes_of_a_patch_are_drawn_in_range_and_by_seed(variables):
    module, lulc = TerraMind(CONFIG), np.random.default_rng(0).integers(0, 20, (2, 3, 3))
    make = partial(decoding.generate_tokens, module, variables, {LULC: lulc}, [DEM, NDVI], steps=2, schedule={DEM: "maskgit", NDVI: "roar"})
    made = make(seed=np.array([3, 4]))
    assert {key: x.shape for key, x in made.items()} == {DEM: (2, 3, 3, K), NDVI: (2, 3, 3, 2)}
    for key, size in ((DEM, V), (NDVI, 5)):
        assert made[key].min() >= 0 and made[key].max() < size and len(np.unique(made[key])) > 1
        np.testing.assert_array_equal(made[key], make(seed=np.array([3, 4]))[key])
        np.testing.assert_array_equal(made[key][1], make(seed=4)[key][1])
    assert (made[DEM] != make(seed=5)[DEM]).any()
    known = {DEM: made[DEM]}  # a finished target conditions as if it had been sampled in the same call
    np.testing.assert_array_equal(make(seed=np.array([3, 4]), known_tokens=known, only=NDVI)[NDVI], made[NDVI])
    others = [make(seed=np.array([3, 4]), known_tokens={DEM: (made[DEM] + i) % V}, only=NDVI)[NDVI] for i in range(1, V)]
    assert any((other != made[NDVI]).any() for other in others)


def test_the_most_probable_codes_are_those_of_the_logits(variables):
    module, lulc = TerraMind(CONFIG), np.random.default_rng(0).integers(0, 20, (2, 3, 3))

    def logits(bound):
        context = bound.encode(*bound.embed(LULC, lulc))
        return bound.logits(DEM, bound.decode(bound.queries(DEM, jnp.tile(jnp.arange(9), (2, 1))), context, None))

    expected = jax.jit(partial(module.apply, method=logits))(variables)
    assert expected.shape == (2, 9, K, V)
    made = decoding.generate_tokens(module, variables, {LULC: lulc}, [DEM], seed=0, temperature=0)[DEM]
    np.testing.assert_array_equal(made.reshape(2, 9, K), expected.argmax(-1))


def test_the_confidence_of_many_codes_is_not_zero():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 128, 8)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), (1, 2))
    ids, confidence = jax.jit(partial(decoding._sample, greedy=False, top_k=0, top_p=0.0))(keys, logits, 1.0)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0].sum(-1)
    np.testing.assert_allclose(confidence, expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 9, 3), (2, 3, 2, K)])
def test_ids_of_another_shape_are_refused(variables, shape):
    with pytest.raises(ValueError, match=r"Input 'tok_dem@224' has shape .*; expected the ids .*, \[B, s, s, 4\] or \[B, s \* s, 4\]"):
        decoding.generate_tokens(TerraMind(CONFIG), variables, {DEM: np.zeros(shape, int)}, [LULC], seed=0)


def test_a_feature_extractor_thinks_in_codes():
    fields = {name: value for name, value in SIZES.items() if name != "decoder_depth"}
    config = BackboneConfig(**fields, streams=STREAMS[:2])
    extractor, thinker = Backbone(config), tim.generator(config, STREAMS[:1], decoder_depth=1)
    read, thought = (random_networks.random_variables(init, m, scale=0.3) for init, m in ((_init, extractor), (model.init, thinker)))
    inputs = {LULC: np.random.default_rng(0).integers(0, 20, (2, 3, 3))}
    known = tim.think(thinker, thought, inputs, [DEM], seed=0)
    assert known[DEM].shape == (2, 3, 3, K)
    assert backbone.features(extractor, read, known)[-1].shape == (2, 9, 16)
    with pytest.raises(ValueError, match=r"expected the ids of tokens, integers \[B, h, w, 4\]"):
        backbone.features(extractor, read, {DEM: np.zeros((2, 3, 3), int)})


def _init(module: Backbone, key: jax.Array) -> dict:
    return module.init(key, method="everything")


# ---- weights ----


def test_pytorch_has_no_such_model_but_its_weights_are_a_start(variables):
    with pytest.raises(ValueError, match=r"TerraTorch's model has nothing like params/encoder_codebook_emb/tok_dem@224/fc1/kernel"):
        rules.to_torch(variables, sources.rules_of(TerraMind(CONFIG)))
    released = dataclasses.replace(CONFIG, encoder=(modalities.STREAMS[DEM], STREAMS[1]), decoder=(modalities.STREAMS[DEM],))
    one, module = TerraMind(released), TerraMind(dataclasses.replace(CONFIG, encoder=STREAMS[:2], decoder=STREAMS[:1]))
    state = rules.to_torch(random_networks.random_variables(model.init, one, scale=0.3), sources.rules_of(one))
    found = sources.StateDict(dict(state)).take("", module, part=True)
    made = weights.complete(module, found, jax.random.key(0))
    np.testing.assert_array_equal(made["params"]["mask_token"], state["mask_token"].ravel())
    assert float(jnp.std(made["params"]["encoder_codebook_emb"][DEM]["fc1"]["kernel"])) == pytest.approx(K**-0.5, rel=0.1)


# ---- runs ----


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards as of `tiny_run`, but tokens of LULC are 128 codes, all of which follow from the land cover."""
    folder = tmp_path_factory.mktemp("shards")
    for split, n in (("train", 12), ("val", 5)):
        tiny_run.write_split(folder, split, n)
        level = np.random.default_rng(n).integers(0, 10, n)
        for shard in (folder / split / "LULC_tokens").iterdir():
            shard.unlink()
        tiny_run.write_tokens(folder, split, "LULC", np.stack([(level * (i + 1)) % V for i in range(MANY)], 1))
    return folder


def pretraining(root, **options):
    config = tiny_run.pretraining(root, **options)
    with config.unlocked():
        config.model.codebooks = type(config)({**tiny_run.CODEBOOKS, "LULC": (V, MANY)})
    return config


def test_a_run_learns_codes(root, tmp_path, monkeypatch):
    tiny_run.on_one_device(monkeypatch)
    pretrain.train(pretraining(root), tmp_path)
    steps = [line["loss/LULC"] for line in logging.read(tmp_path) if "loss" in line]
    assert steps[0] == pytest.approx(np.log(V), rel=0.5) and np.nanmean(steps[-5:]) < 0.8 * steps[0]
    module, variables, config = pretrain.load(tmp_path)
    assert config.model.codebooks.LULC == (V, MANY)
    assert module.apply(variables, LULC, np.zeros((1, 2, 2, MANY), int), method="embed")[0].shape == (1, 4, 64)


def test_the_codes_of_the_shards_are_those_of_the_batch(root):
    config = pretraining(root)
    index = pretrain.open_tokenized(config, "train")
    batch = next(pretrain.batches(index, *pretrain.data_settings(config), batch_size=8, seed=3))
    level = np.random.default_rng(12).integers(0, 10, 12)[batch["sample"]]
    wanted = np.stack([(level * (i + 1)) % V for i in range(MANY)], 1)[:, None]
    encoder, decoder = pretrain.streams(config)
    for kind, streams in (("input", encoder), ("target", decoder)):
        mine = batch[f"{kind}_modality"] == [s.key for s in streams].index(LULC)
        codes = batch[f"{kind}_codes"]
        assert codes.dtype == np.uint8 and mine.any() and not codes[~mine].any()
        np.testing.assert_array_equal(codes[mine], np.broadcast_to(wanted, codes.shape)[mine])
        assert not batch[f"{kind}_id"][mine].any()


def test_tokens_of_one_codebook_are_no_tokens_of_several(root):
    config = tiny_run.pretraining(root)
    index = pretrain.open_tokenized(config, "train")
    with pytest.raises(ValueError, match=r"Tokens of LULC have shape \(10, 2, 2, 128\), expected \(10, 2, 2\)"):
        pretrain.batches(index, *pretrain.data_settings(config), batch_size=8)


@pytest.mark.slow
def test_from_tokenizers_to_a_generated_scene(root, tmp_path):
    """Tokenizers of 128 codebooks, their tokens, a transformer, and its GeoTIFF, the same twice."""
    for name in ("DEM", "LULC"):
        config = tiny_run.tokenizer_training(root, name, steps=8)
        config.model.update(levels=(V,), num_codebooks=MANY)
        tokenizer_training.train(config, tmp_path / "tokenizers" / name)
    tokenize.tokenize(root, tmp_path / "tokenizers", tmp_path / "tokens", image_size=tiny_run.SIZE)
    config = tiny_run.pretraining(root, steps=16)
    with config.unlocked():
        config.model.codebooks = type(config)()
    config.data.tokens = str(tmp_path / "tokens")
    config.run.update(eval_every=16, probe_scenes=8)
    pretrain.train(config, tmp_path / "model")
    module, _, used = pretrain.load(tmp_path / "model")
    assert used.model.codebooks.to_dict() == {"DEM": (V, MANY), "LULC": (V, MANY)}
    assert {s.num_codebooks for s in module.config.decoder} == {MANY}
    lines = logging.read(tmp_path / "model")
    steps = [line["loss"] for line in lines if "loss" in line]
    (validation,) = [line for line in lines if "val/loss" in line]
    assert np.mean(steps[-4:]) < steps[0] and validation["val/loss"] < steps[0] and 0 < validation["val/generated/LULC"] <= 1

    image = np.random.default_rng(0).integers(0, 900, (70, 48, 1)).astype(np.float32)
    place = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), 70, 48)
    geo.write(tmp_path / "a.tif", image, like=place)
    call = dict(weights=tmp_path / "model", tokenizers=tmp_path / "tokenizers", inputs={"DEM": tmp_path / "a.tif"}, to=["LULC"], seed=1)
    (first,), (second,) = (generate_scenes.run(**call, out=tmp_path / out) for out in ("one", "two"))
    assert geo.read(first, "LULC").shape == (70, 48, 1) and first.read_bytes() == second.read_bytes()
    other = tokenizer.Tokenizer(dataclasses.replace(tokenizer_training.load(tmp_path / "tokenizers" / "LULC")[0].config, num_codebooks=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_scenes.tokenizer, "load", lambda _: (other, {}))
        with pytest.raises(ValueError, match="has 8 codes, but the model was trained with 128 codebooks of 8 codes"):
            generate_scenes.run(**call, out=tmp_path / "three")
