"""The pretraining model against TerraTorch's: losses, logits, gradients, training (spec 4, 9.3)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import batches
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer
import pytest
import torch
from ml_collections import ConfigDict

from terramind_jax import modalities
from terramind_jax.convert import rules
from terramind_jax.modalities import STREAMS
from terramind_jax.model import layers, loss
from terramind_jax.train import optimizer, pretrain

# One of each kind on both sides, so that a wide model stays small.
FEW = dict(
    encoder=tuple(STREAMS[k] for k in ("coords", "tok_lulc@224", "untok_dem@224", "untok_sen1grd@224", "untok_sen2l2a@224")),
    decoder=tuple(STREAMS[k] for k in ("coords", "tok_lulc@224", "tok_ndvi@224")),
)
TWO_LAYERS = dict(encoder_depth=2, decoder_depth=2)
INPUTS, TARGETS = 96, 64


@pytest.fixture(scope="module")
def tiny():
    model = peer.encdec("tiny", seed=3)
    return model, *peer.converted(model, "tiny")


def reference_loss(model, batch, kind: str, streams: dict | None = None, dtype=torch.float32):
    """The reference's total and per-modality losses of one batch of slots."""
    mods = peer.tensors(batches.to_reference(batch, **(streams or {})))
    for mod in mods.values():
        mod["tensor"] = mod["tensor"].to(dtype) if mod["tensor"].is_floating_point() else mod["tensor"]
    n, m = batch["input_modality"].shape[1], batch["target_modality"].shape[1]
    return model(mods, num_encoder_tokens=n, num_decoder_tokens=m, loss_type=kind)


@pytest.mark.parametrize("seed, budgets, empty", [(0, (INPUTS, TARGETS), 0), (1, (INPUTS, TARGETS), 60), (2, (17, 5), 3)])
def test_losses(tiny, seed, budgets, empty):
    model, module, variables, _ = tiny
    batch = batches.draw(3, *budgets, seed, empty=empty)
    assert empty == 0 or (batch["target_modality"] == batches.PADDING).any()
    sums, counts = jax.jit(partial(module.apply, method="losses"))(variables, batch)
    for kind in ("mod", "token"):
        with torch.no_grad():
            total, each = reference_loss(model, batch, kind)
        ours = loss.combine(sums, counts, [s.vocab_size for s in module.config.decoder], kind)
        assert peer.difference(ours, total) <= 1e-5, kind
        for stream, mean in zip(module.config.decoder, sums / jnp.maximum(counts, 1), strict=True):
            # A modality without targets has the loss 0 on both sides.
            assert peer.difference(mean, each[stream.key]) <= 1e-5 if each[stream.key] else mean == 0, stream.key


def test_logits_of_every_target(tiny):
    model, module, variables, _ = tiny
    batch = batches.draw(2, INPUTS, TARGETS, seed=5, empty=20)
    in_order = mock.patch("random.sample", lambda items, n: list(items))  # of the modalities, as ours has them
    with torch.no_grad(), in_order:
        mods = peer.tensors(batches.to_reference(batch))
        theirs = model(mods, num_encoder_tokens=INPUTS, num_decoder_tokens=TARGETS, return_logits=True)
    y = jax.jit(partial(module.apply, method=_decoded))(variables, batch)
    valid = batch["target_modality"] != batches.PADDING
    for stream in module.config.decoder:
        ours = module.apply(variables, stream.key, y, method="logits")
        assert peer.relative_error(ours[valid], theirs[stream.key][torch.from_numpy(valid)]) < 1e-4, stream.key


def _decoded(module, batch):
    """``[B, M, D]`` decoder outputs: `losses` without its last step."""
    padding = batch["input_modality"] == batches.PADDING
    context = module.encode(*module._input_slots(batch), padding)
    return module.decode(module._target_slots(batch), context, padding, module._target_mask(batch))


# ---- gradients ----


def pairs(grads: Any, model, table) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every gradient of ours, laid out as the reference's, beside the reference's: tensor by tensor."""
    theirs = {name: p.grad for name, p in model.named_parameters()}  # a tied tensor under its first name
    flat = rules.flatten({"params": grads})
    for rule in table:
        if rule.ours.startswith("buffers"):
            continue
        leaf = np.asarray(flat.pop(rule.ours))
        for i, part in enumerate(leaf) if rule.is_stacked else [(0, leaf)]:
            name = next(n for n in (n.replace(rules.LAYER, str(i)) for n in rule.torch) if n in theirs)
            theirs_of = theirs.pop(name)
            yield name, rules.to_torch_layout(rule, part), np.zeros_like(part) if theirs_of is None else theirs_of.numpy()
    assert not flat and not theirs


def worst_gradient(grads, model, table) -> tuple[float, str]:
    """The largest relative L2 error of a gradient, and whose it is. A gradient that is zero must be zero on both sides."""
    errors = []
    for name, ours, theirs in pairs(grads, model, table):
        norm = np.linalg.norm(theirs)
        errors.append((np.linalg.norm(ours - theirs.reshape(ours.shape)) / norm if norm else np.abs(ours).max(), name))
    print(f"largest gradient error {max(errors)[0]:.1e} (relative L2 a leaf)")
    return max(errors)


def both_gradients(model, module, variables, streams, seed=7, dtype=torch.float32, batch=None):
    batch = batch or batches.draw(2, INPUTS, TARGETS, seed, empty=20, **streams)
    model.zero_grad(set_to_none=True)
    total, _ = reference_loss(model, batch, "mod", streams, dtype)
    total.backward()

    ours, grads = jax.jit(partial(loss_and_gradients, module, variables["buffers"]))(variables["params"], batch)
    return float(ours), float(total.detach()), grads


def loss_and_gradients(module, buffers, params, batch):
    return jax.value_and_grad(lambda p: pretrain.loss(module, "mod", p, buffers, batch)[0])(params)


def test_every_gradient_of_tiny(tiny):
    model, module, variables, table = tiny
    ours, theirs, grads = both_gradients(model, module, variables, {})
    assert peer.difference(ours, theirs) <= 1e-5
    error, name = worst_gradient(grads, model, table)
    assert error < 1e-4, name


def test_every_gradient_of_two_layers_of_base():
    model = peer.encdec("base", **FEW, **TWO_LAYERS, seed=4)
    module, variables, table = peer.converted(model, "base", **FEW, **TWO_LAYERS)
    ours, theirs, grads = both_gradients(model, module, variables, FEW)
    assert peer.difference(ours, theirs) <= 1e-5
    error, name = worst_gradient(grads, model, table)
    assert error < 1e-4, name


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_two_layers_in_float64(size, monkeypatch):
    """What is left in float32 is rounding and not another model: in float64 the difference falls by eight orders."""
    narrow = dict(TWO_LAYERS, dim=128, num_heads=2)
    model = peer.encdec(size, **FEW, **narrow, seed=6).double()
    monkeypatch.setattr(layers, "attend", attend)
    monkeypatch.setattr(modalities, "standardize", lambda name, x: x)  # which is in float32: the pixels drawn are standardised
    batch = batches.draw(2, INPUTS, TARGETS, 8, empty=20, **FEW)
    rng = np.random.default_rng(0)
    batch["patches"] = {key: rng.standard_normal(x.shape) for key, x in batch["patches"].items()}
    with jax.enable_x64(True):
        module, variables, table = peer.converted(model, size, **FEW, **narrow)
        module = module.clone(config=module.config.__class__(**{**vars(module.config), "dtype": "float64"}))
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        ours, theirs, grads = both_gradients(model, module, variables, FEW, dtype=torch.float64, batch=batch)
    assert peer.difference(ours, theirs) <= 1e-9
    error, name = worst_gradient(grads, model, table)
    assert error < 1e-9, name


def attend(q, k, v, mask, implementation):
    """`layers.attend` with a softmax in float64; JAX's own is always in float32."""
    logits = jnp.einsum("bmhd,bnhd->bhmn", q, k) / q.shape[-1] ** 0.5
    logits = logits if mask is None else jnp.where(mask, -1e30, logits)
    return jnp.einsum("bhmn,bnhd->bmhd", jax.nn.softmax(logits), v)


# ---- training ----


def test_twenty_steps_of_adamw():
    depths = dict(encoder_depth=4, decoder_depth=2)
    model = peer.encdec("tiny", **FEW, **depths, seed=9)
    module, variables, _ = peer.converted(model, "tiny", **FEW, **depths)
    settings = ConfigDict(dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, clip_norm=0.0))
    rate = 1e-3
    drawn = [batches.draw(2, 48, 32, step % 4, empty=8, **FEW) for step in range(20)]  # four batches, so that there is something to learn
    theirs = reference_training(model, drawn, rate, settings)
    tx = optimizer.adamw(settings)

    @jax.jit
    def step(params, state, batch):
        value, grads = loss_and_gradients(module, variables["buffers"], params, batch)
        updates, state = tx.update(grads, state, params, learning_rate=rate, grad_norm=jnp.ones(()), ok=jnp.array(True))
        return optax.apply_updates(params, updates), state, value

    params, state, ours = variables["params"], tx.init(variables["params"]), []
    for batch in drawn:
        params, state, value = step(params, state, batch)
        ours.append(float(value))
    assert peer.difference(ours, theirs) <= 1e-4
    assert theirs[-1] < 0.8 * theirs[0]


def reference_training(model, drawn, rate: float, settings: ConfigDict) -> list[float]:
    """Losses of PyTorch's AdamW with 4M's rule of what is not decayed (spec 9.3)."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["norm." not in name and ".norm" not in name and not name.endswith((".bias", ".lookup_table_weight", ".gamma"))].append(
            parameter
        )
    assert groups[True] and groups[False]
    decays = [{"params": p, "weight_decay": settings.weight_decay if decayed else 0.0} for decayed, p in groups.items()]
    adamw = torch.optim.AdamW(decays, lr=rate, betas=settings.betas, eps=settings.eps)
    losses = []
    for batch in drawn:
        adamw.zero_grad(set_to_none=True)
        total, _ = reference_loss(model, batch, "mod", FEW)
        total.backward()
        adamw.step()
        losses.append(float(total.detach()))
    return losses
