"""How our variables and the reference's state dict name and lay out the same tensors (spec 10).

A table of `Rule` describes one model; the same table reads and writes. Nothing here opens a file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np

LAYER = "{i}"
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
MISSING, MISSHAPEN = "missing", "of another shape"  # kinds of problems
SHOWN = 4  # problems of one kind that an error spells out


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf of ours and the reference's names of it.

    Attributes:
      ours: path in ``{"params", "buffers"}``, joined by "/".
      torch: names in the state dict; more than one are tied; none if the reference lacks it. With ``{i}`` the leaf of ours is stacked over
        layers on its first axis.
      layout: ``same``; ``ones``, equal up to axes of length one or flattened ones, `shape` is torch's, with at most one -1;
        ``linear``, [out, in] <-> [*in, *out] with `inputs` leading axes of ours contracted; ``conv``, OIHW <-> HWIO;
        ``conv1d``, [O, I, 1] <-> [I, O]; ``conv1x1``, [O, I, 1, 1] <-> [I, O]; ``chw``, [1, D, h, w] <-> [h, w, D];
        ``upscale``, a transposed convolution's, [I, O, f, f] <-> [I, f, f, O]; ``count``, the same, an integer: int64 <-> int32.
    """

    ours: str
    torch: tuple[str, ...]
    layout: str = "same"
    inputs: int = 1
    shape: tuple[int, ...] = ()

    @property
    def is_stacked(self) -> bool:
        return any(LAYER in name for name in self.torch)

    @property
    def is_count(self) -> bool:
        return self.layout == "count"


def to_torch_layout(rule: Rule, x):
    """One layer of a leaf of ours, NumPy or traced, as the reference lays it out."""
    match rule.layout:
        case "same" | "count":
            return x
        case "ones":
            return x.reshape(rule.shape)
        case "linear":
            return x.reshape(math.prod(x.shape[: rule.inputs]), -1).T
        case "conv":
            return x.transpose(3, 2, 0, 1)
        case "conv1d":
            return x.T[..., None]
        case "conv1x1":
            return x.T[..., None, None]
        case "chw":
            return x.transpose(2, 0, 1)[None]
        case "upscale":
            return x.transpose(0, 3, 1, 2)
    raise ValueError(f"Unknown layout {rule.layout!r} of {rule.ours}.")


def to_our_layout(rule: Rule, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `to_torch_layout`; `shape` is ours."""
    match rule.layout:
        case "linear":
            x = x.T
        case "conv":
            x = x.transpose(2, 3, 1, 0)
        case "conv1d" | "conv1x1":
            x = x.reshape(x.shape[:2]).T
        case "chw":
            x = x[0].transpose(1, 2, 0)
        case "upscale":
            x = x.transpose(0, 2, 3, 1)
    return x.reshape(shape)


# ---- variables as flat paths ----


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """``{"params": {"a": {"b": x}}}`` -> ``{"params/a/b": x}``."""
    return {"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_flatten_with_path(dict(variables))[0]}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`; both collections exist even if one is empty."""
    tree: dict[str, Any] = {"params": {}, "buffers": {}}
    for path, x in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = x
    return tree


# ---- both directions ----


def to_torch(variables: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Variables as a flat state dict of float32 NumPy arrays (counts int64), tied names included; tied names share one array."""
    return flat_to_torch(flatten(variables), rules)


def flat_to_torch(flat: MutableMapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """`to_torch` of flat variables, which are emptied meanwhile, so that memory never holds everything twice."""
    _check_covered(flat, rules)
    state: dict[str, np.ndarray] = {}
    for rule in rules:
        if not rule.torch:
            raise ValueError(f"TerraTorch's model has nothing like {rule.ours}, so PyTorch cannot take this one; save it as a directory.")
        leaf = np.asarray(flat.pop(rule.ours), np.int64 if rule.is_count else np.float32)
        for i, part in enumerate(leaf) if rule.is_stacked else [(0, leaf)]:
            array = np.asarray(to_torch_layout(rule, part), order="C")
            state |= {name.replace(LAYER, str(i)): array for name in rule.torch}
    return state


def shapes(abstract: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict that belongs to variables of these (abstract) shapes."""
    flat = flatten(abstract)
    _check_covered(flat, rules)
    return {name: shape for rule in rules for names, shape in _layers(rule, flat[rule.ours]) for name in names}


def from_torch(
    state: MutableMapping[str, np.ndarray],
    rules: Sequence[Rule],
    abstract: Mapping[str, Any],
    *,
    optional: Callable[[str], bool] = lambda path: False,
    resizable: Callable[[str], bool] = lambda path: False,
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """A state dict as variables, float32 NumPy arrays.

    Args:
      state: is emptied while it is read, so that memory never holds everything twice. Nothing is taken out if there is a problem.
      rules: of the model.
      abstract: variables of shapes, as `jax.eval_shape` of the initialisation gives them.
      optional: of paths of ours that the file may lack; the result lacks them then.
      resizable: of paths of ours that the file may have in another shape; the result lacks them then.
      ignore: patterns of names that need not be used.

    Raises:
      ValueError: with all missing, superfluous, misshapen, non-floating and untied names at once.
    """
    flat = flatten(abstract)
    _check_covered(flat, rules)
    problems: dict[str, list[str]] = {}
    found: list[Rule] = []
    used: set[str] = set()
    for rule in rules:
        wanted = list(_layers(rule, flat[rule.ours]))
        used |= {name for names, _ in wanted for name in names}
        wrong = list(_problems(rule, wanted, state))
        kinds = {kind for kind, _ in wrong}
        if kinds == {MISSING} and optional(rule.ours) or kinds == {MISSHAPEN} and resizable(rule.ours):
            continue
        found.append(rule)
        for kind, text in wrong:
            problems.setdefault(kind, []).append(text)
    extra = [name for name in state if name not in used and not any(fnmatchcase(name, pattern) for pattern in ignore)]
    if extra:
        problems["unexpected"] = extra
    if problems:
        raise ValueError(_sentence(problems))
    return unflatten({rule.ours: _leaf(rule, flat[rule.ours].shape, state) for rule in found})


def _check_covered(flat: Mapping[str, Any], rules: Sequence[Rule]) -> None:
    ours = [rule.ours for rule in rules]
    if sorted(ours) != sorted(flat):
        raise AssertionError(f"The rules and the model's variables differ in {sorted(set(ours) ^ set(flat))[:SHOWN]}.")


def _layers(rule: Rule, leaf: Any) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """For every layer the reference's names and shape."""
    count, shape = (leaf.shape[0], leaf.shape[1:]) if rule.is_stacked else (1, leaf.shape)
    torch_shape = jax.eval_shape(partial(to_torch_layout, rule), jax.ShapeDtypeStruct(shape, np.float32)).shape
    for i in range(count):
        yield [name.replace(LAYER, str(i)) for name in rule.torch], torch_shape


def _problems(rule: Rule, wanted, state: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    for names, shape in wanted:
        there = [name for name in names if name in state]
        if not there:
            yield MISSING, (*names, rule.ours)[0]
        for name in there:
            array = state[name]
            if tuple(array.shape) != shape:
                yield MISSHAPEN, f"{name} {tuple(array.shape)} instead of {shape}"
            elif rule.is_count and not np.issubdtype(array.dtype, np.integer):
                yield "no integer", f"{name} {array.dtype}"
            elif not rule.is_count and array.dtype not in HALVES and not np.issubdtype(array.dtype, np.floating):
                yield "not floating-point", f"{name} {array.dtype}"
            elif name != there[0] and not _same(array, state[there[0]]):
                yield "not tied", f"{name} differs from {there[0]}"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.shape == b.shape and np.array_equal(np.asarray(a), np.asarray(b)))


def _leaf(rule: Rule, shape: tuple[int, ...], state: MutableMapping[str, np.ndarray]) -> np.ndarray:
    """One leaf of ours, taken out of the state dict."""
    if not rule.is_stacked:
        return _take(rule, 0, shape, state)
    leaf = np.empty(shape, np.float32)
    for i in range(shape[0]):
        leaf[i] = _take(rule, i, shape[1:], state)
    return leaf


def _take(rule: Rule, i: int, shape: Sequence[int], state: MutableMapping[str, np.ndarray]) -> np.ndarray:
    names = [name.replace(LAYER, str(i)) for name in rule.torch]
    arrays = [state.pop(name) for name in names if name in state]
    array = np.asarray(arrays[0], np.int32 if rule.is_count else np.float32)
    return np.asarray(to_our_layout(rule, array, shape), order="C")  # `ascontiguousarray` makes a number an array [1]


def _sentence(problems: Mapping[str, list[str]]) -> str:
    def one(kind: str, names: list[str]) -> str:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{more})"

    return f"The weights do not fit this model: {'; '.join(one(*item) for item in problems.items())}."
