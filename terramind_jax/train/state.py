"""What a training run carries from step to step, and the one update both loops share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import sharding
from terramind_jax.checkpoint import Checkpoints
from terramind_jax.train import optimizer
from terramind_jax.train.logging import count

Params = Any


@flax.struct.dataclass
class State:
    """`samples` is the position in the data: the one integer that resuming, another batch size or skipping ahead sets.

    It counts past 2**32, hence two uint32 words, high and low. `skipped` counts steps whose loss or gradient was not finite, or whose
    gradient was far above `norm`, its running norm; they consume samples and leave parameters, moments and average as they are.
    """

    step: jax.Array  # int32 []
    samples: jax.Array  # uint32 [2]
    skipped: jax.Array  # int32 []
    norm: jax.Array  # float32 []; 0 before the first step
    params: Params
    opt_state: optimizer.AdamWState
    ema: Params | None = None
    batch_stats: Any = None  # running statistics of networks with BatchNorm


def create(params: Params, tx: optax.GradientTransformation, ema: bool = False, batch_stats: Any = None) -> State:
    """A state at step 0."""
    return State(
        step=jnp.zeros((), jnp.int32),
        samples=jnp.zeros((2,), jnp.uint32),
        skipped=jnp.zeros((), jnp.int32),
        norm=jnp.zeros((), jnp.float32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        batch_stats=batch_stats,
    )


def shardings(params: Params, replicated: jax.sharding.Sharding, ema: bool, batch_stats: Any = None) -> State:
    """Shardings of a state: moments and averages lie as the parameters do, counters on every device."""
    return State(
        step=replicated,
        samples=replicated,
        skipped=replicated,
        norm=replicated,
        params=params,
        opt_state=optimizer.AdamWState(replicated, params, params),
        ema=params if ema else None,
        batch_stats=batch_stats,
    )


def consumed(samples: Any) -> int:
    """The two words as one Python integer."""
    high, low = np.asarray(samples).tolist()
    return high * 2**32 + low


def advance(samples: jax.Array, n: int) -> jax.Array:
    """The two words after `n` more samples."""
    low = samples[1] + jnp.uint32(n)
    return jnp.stack([samples[0] + (low < samples[1]).astype(jnp.uint32), low])


def progress(samples: jax.Array, total: float) -> jax.Array:
    """Fraction of `total` samples consumed, float32."""
    total = float(total)  # more than 2**31 samples are no int32
    return samples[0].astype(jnp.float32) * (2**32 / total) + samples[1].astype(jnp.float32) / total


def apply(
    state: State,
    tx: optax.GradientTransformationExtraArgs,
    config: ConfigDict,
    loss: jax.Array,
    grads: Params,
    *,
    batch_size: int,
    total: float,
    warmup: float,
    ema_decay: float = 0.0,
    batch_stats: Any = None,
    scale: jax.Array | float = 1.0,
) -> tuple[State, dict[str, jax.Array]]:
    """The state after one step, and its metrics. A step that is skipped only moves the counters.

    Args:
      config: the ``optimizer`` group.
      total: samples of the whole run; `warmup` the fraction of it that warms up.
      batch_stats: the running statistics after the step, of networks that have such.
      scale: of the learning rate.
    """
    norms = {part: optimizer.global_norm(some) for part, some in parts(grads).items()}
    grad_norm = optimizer.global_norm(norms)
    limit = config.spike_factor * state.norm if config.spike_factor else jnp.zeros(())
    spike = (limit > 0) & (grad_norm > limit)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~spike
    rate = optimizer.learning_rate(progress(state.samples, total), warmup, config) * scale
    updates, opt_state = tx.update(grads, state.opt_state, state.params, learning_rate=rate, grad_norm=grad_norm, ok=ok)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: jnp.where(ok, ema_decay * e + (1 - ema_decay) * p, e), ema, params)
    if batch_stats is not None:
        batch_stats = jax.tree.map(lambda new, old: jnp.where(ok, new, old), batch_stats, state.batch_stats)
    skipped = state.skipped + ~ok
    norm = jnp.where(spike, state.norm, running(state.norm, grad_norm))  # else a lasting spike would soon be none
    state = State(state.step + 1, advance(state.samples, batch_size), skipped, norm, params, opt_state, ema, batch_stats)
    metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "skipped": skipped}
    return state, {**metrics, **{f"grad_norm/{part}": value for part, value in norms.items()}}


def parts(tree: Params) -> dict[str, dict[str, Any]]:
    """The top-level entries of parameters or gradients as embeddings, encoder, decoder and others, those that there are."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in tree.items():
        found.setdefault(optimizer.part_of(name), {})[name] = value
    return found


def running(mean: jax.Array, value: jax.Array) -> jax.Array:
    """The mean over about the last 100 steps, after one more; a value that is not finite does not enter."""
    moved = jnp.where(mean > 0, mean + (value - mean) / 100, value)
    return jnp.where(jnp.isfinite(value), moved, mean)


def size(params: Params) -> str:
    """How many parameters: ``"52.1M"``."""
    return count(sum(x.size for x in jax.tree.leaves(params)))


# ---- where a run starts ----


def abstract(
    init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, ema: bool = False
) -> tuple[State, Params]:
    """State and buffers as shapes, each with its place on `mesh`; nothing is allocated, and the mesh need not be there."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    places = sharding.param_shardings(mesh, jax.eval_shape(init, key))
    layout = shardings(places["params"], sharding.replicated(mesh), ema, places.get("batch_stats")), places.get("buffers", {})
    shapes = jax.eval_shape(partial(_fresh, init, tx, ema), key)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


def _fresh(init, tx: optax.GradientTransformation, ema: bool, key: jax.Array) -> tuple[State, Params]:
    made = meta.unbox(init(key))
    return create(made["params"], tx, ema, made.get("batch_stats")), made.get("buffers", {})


def start(
    init: Callable[[jax.Array], Any],
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    seed: int,
    checkpoints: Checkpoints,
    ema: bool = False,
    initial: Params | None = None,
) -> tuple[State, Params, State, dict[str, float]]:
    """The newest checkpoint's state, or a fresh one, laid out on `mesh`.

    Args:
      init: key -> boxed variables ``{"params", "buffers"}``, and ``batch_stats`` of networks that have such.
      initial: variables of the host, unboxed and equal on all processes, that a fresh state begins with in place of `init`'s.

    Returns:
      (state, buffers, shardings of the state, totals that the loop counts besides).
    """
    shapes = abstract(init, tx, mesh, ema)
    layout, places = jax.tree.map(lambda x: x.sharding, shapes)
    if checkpoints.latest() is None:
        placed = _drawn(init, tx, seed, ema, layout, places) if initial is None else _placed(initial, tx, ema, layout, places)
        return *placed, layout, {}
    trees, counters = checkpoints.restore(_trees(*shapes))
    buffers = trees.pop("buffers")
    place = partial(jax.device_put, device=sharding.replicated(mesh))
    return (
        State(
            step=place(np.int32(counters.pop("step"))),
            samples=place(np.array(divmod(counters.pop("samples"), 2**32), np.uint32)),
            skipped=place(np.int32(counters.pop("skipped"))),
            norm=place(np.float32(counters.pop("norm", 0.0))),
            **trees,
        ),
        buffers,
        layout,
        counters,
    )


def _drawn(init, tx: optax.GradientTransformation, seed: int, ema: bool, layout: State, places: Params) -> tuple[State, Params]:
    """A fresh state and its buffers."""
    return jit_once(partial(_fresh, init, tx, ema), out_shardings=(layout, places))(jax.random.key(seed))


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` of what runs once: on a CPU, whose compiler is the slow part, half the optimization is the faster whole.

    ``XLA_FLAGS`` that name a level have theirs.
    """
    level = "xla_backend_optimization_level"
    less = {level: 1} if jax.default_backend() == "cpu" and level not in os.environ.get("XLA_FLAGS", "") else None
    return jax.jit(function, compiler_options=less, **options)


def _placed(variables: Params, tx: optax.GradientTransformation, ema: bool, layout: State, places: Params) -> tuple[State, Params]:
    """The state that begins with these variables of the host, and its buffers."""

    def place(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    found = jax.tree.map(np.asarray, dict(variables))
    params = jax.tree.map(place, found["params"], layout.params)
    statistics = jax.tree.map(place, found.get("batch_stats"), layout.batch_stats)
    state = jax.jit(partial(create, tx=tx, ema=ema), out_shardings=layout)(params, batch_stats=statistics)
    return state, jax.tree.map(place, found.get("buffers", {}), places)


def _trees(state: State, buffers: Params) -> dict[str, Any]:
    trees = {"params": state.params, "buffers": buffers, "opt_state": state.opt_state, "ema": state.ema, "batch_stats": state.batch_stats}
    return {name: tree for name, tree in trees.items() if tree is not None}


def save(checkpoints: Checkpoints, state: State, buffers: Params, totals: Mapping[str, float]) -> None:
    """Starts writing a checkpoint of `state` and of the loop's `totals`, unless that step has one."""
    step = int(state.step)
    if checkpoints.latest() != step:
        own = {"step": step, "samples": consumed(state.samples), "skipped": int(state.skipped), "norm": float(state.norm)}
        checkpoints.save(step, _trees(state, buffers), {**own, **totals})


def rewind(checkpoints: Checkpoints, state: State, buffers: Params) -> State:
    """`state`, which is used up, with the newest checkpoint's parameters, moments and average.

    Its counters run on: what follows is other data, at the learning rate of where the run is.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _trees(state, buffers))
    held = (state.params, state.opt_state, state.ema, state.batch_stats)
    jax.tree.map(lambda x: x.delete(), held)  # there may be no room for both
    trees, _ = checkpoints.restore({name: tree for name, tree in shapes.items() if name != "buffers"})
    return state.replace(**trees)
