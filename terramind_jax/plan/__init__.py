"""``plan``: what a run will need and cost, from its training step compiled for chips that need not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax.data.index import Index
from terramind_jax.plan import report, search, step
from terramind_jax.plan.topology import Topology, parse
from terramind_jax.train import pretrain

__all__ = ["Topology", "parse", "run", "ranked"]


def run(config: ConfigDict, where: Topology, price: float | None = None) -> dict[str, Any]:
    """The plan of `config` on `where` as `report.plan` describes it, with ``advice`` if it does not fit.

    With ``config.data.root`` set, shapes and sizes are those of its samples; else every sample is taken to have every modality.

    Raises:
      ValueError: the configuration cannot run there.
      ImportError: the compiler for TPUs is missing.
    """
    index = _index(config)
    one = step.prepare(config, where, index)
    text, memory = step.compile(one)
    facts = report.plan(one, text, memory, price, index)
    return facts if memory.fits else {**facts, "advice": search.advice(one, memory, index)}


def ranked(
    config: ConfigDict, where: Topology, limit: int, price: float | None = None, progress: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Plans of other settings, the fastest first; `limit` are compiled, with a line of progress each."""
    return search.search(config, where, limit, price, _index(config), progress)


def _index(config: ConfigDict) -> Index | None:
    configuration.check(config, "pretrain")
    return pretrain.open_tokenized(config, config.data.train_split) if config.data.root else None
