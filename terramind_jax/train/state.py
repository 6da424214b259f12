"""What a training run carries from step to step, and the one update both loops share."""

from __future__ import annotations

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

    It counts past 2**32, hence two uint32 words, high and low. `skipped` counts steps whose loss or gradient was not finite;
    they consume samples and change nothing else.
    """

    step: jax.Array  # int32 []
    samples: jax.Array  # uint32 [2]
    skipped: jax.Array  # int32 []
    params: Params
    opt_state: optimizer.AdamWState
    ema: Params | None = None


def create(params: Params, tx: optax.GradientTransformation, ema: bool = False) -> State:
    """A state at step 0."""
    return State(
        step=jnp.zeros((), jnp.int32),
        samples=jnp.zeros((2,), jnp.uint32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def shardings(params: Params, replicated: jax.sharding.Sharding, ema: bool) -> State:
    """Shardings of a state: moments and averages lie as the parameters do, counters on every device."""
    return State(
        step=replicated,
        samples=replicated,
        skipped=replicated,
        params=params,
        opt_state=optimizer.AdamWState(replicated, params, params),
        ema=params if ema else None,
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
) -> tuple[State, dict[str, jax.Array]]:
    """The state after one step, and its metrics. A loss or gradient that is not finite only moves the counters.

    Args:
      config: the ``optimizer`` group.
      total: samples of the whole run; `warmup` the fraction of it that warms up.
    """
    grad_norm = optimizer.global_norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    rate = optimizer.learning_rate(progress(state.samples, total), warmup, config)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, learning_rate=rate, grad_norm=grad_norm, ok=ok)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: jnp.where(ok, ema_decay * e + (1 - ema_decay) * p, e), ema, params)
    skipped = state.skipped + ~ok
    state = State(state.step + 1, advance(state.samples, batch_size), skipped, params, opt_state, ema)
    return state, {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "skipped": skipped}


def size(params: Params) -> str:
    """How many parameters: ``"52.1M"``."""
    return count(sum(x.size for x in jax.tree.leaves(params)))


def compute_dtype(name: str) -> str:
    """A configuration's dtype: ``auto`` is bfloat16 on accelerators and float32 on a CPU."""
    if name == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return name


# ---- where a run starts ----


def start(
    init: Callable[[jax.Array], Any],
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    seed: int,
    checkpoints: Checkpoints,
    ema: bool = False,
) -> tuple[State, Params, State, dict[str, int]]:
    """The newest checkpoint's state, or a fresh one, laid out on `mesh`.

    Args:
      init: key -> boxed variables ``{"params", "buffers"}``.

    Returns:
      (state, buffers, shardings of the state, totals that the loop counts besides).
    """
    key = jax.random.key(seed)
    variables = sharding.param_shardings(mesh, jax.eval_shape(init, key))
    variables = {"params": variables["params"], "buffers": variables.get("buffers", {})}
    layout = shardings(variables["params"], sharding.replicated(mesh), ema)

    def fresh(key: jax.Array) -> tuple[State, Params]:
        made = meta.unbox(init(key))
        return create(made["params"], tx, ema), made.get("buffers", {})

    if checkpoints.latest() is None:
        # Runs once, so on a CPU, whose compiler is the slow part, half the optimization is the faster whole.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        state, buffers = jax.jit(fresh, out_shardings=(layout, variables["buffers"]), compiler_options=options)(key)
        return state, buffers, layout, {}
    shapes = _trees(*jax.eval_shape(fresh, key))
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, _trees(layout, variables["buffers"]))
    trees, counters = checkpoints.restore(placed)
    buffers = trees.pop("buffers")
    place = partial(jax.device_put, device=sharding.replicated(mesh))
    return (
        State(
            step=place(np.int32(counters.pop("step"))),
            samples=place(np.array(divmod(counters.pop("samples"), 2**32), np.uint32)),
            skipped=place(np.int32(counters.pop("skipped"))),
            **{"ema": None, **trees},
        ),
        buffers,
        layout,
        counters,
    )


def _trees(state: State, buffers: Params) -> dict[str, Any]:
    trees = {"params": state.params, "buffers": buffers, "opt_state": state.opt_state}
    return trees if state.ema is None else {**trees, "ema": state.ema}


def save(checkpoints: Checkpoints, state: State, buffers: Params, totals: Mapping[str, int]) -> None:
    """Starts writing a checkpoint of `state` and of the loop's `totals`, unless that step has one."""
    counters = {"step": int(state.step), "samples": consumed(state.samples), "skipped": int(state.skipped), **totals}
    if checkpoints.latest() != counters["step"]:
        checkpoints.save(counters["step"], _trees(state, buffers), counters)
