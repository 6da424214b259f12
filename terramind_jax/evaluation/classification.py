"""``evaluate knn`` and ``evaluate linear``: how well simple classifiers of frozen features tell the images of a data set apart.

k-nearest neighbours are those of the training split. The linear probe is a multinomial logistic regression on standardised features,
fitted to convergence, with the penalty that is best on the validation split. Both are given mean and deviation of the bands, too,
which need no model, and both are tested on the test split.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize

from terramind_jax import metrics
from terramind_jax.evaluation import features, results
from terramind_jax.evaluation.features import Features
from terramind_jax.tasks import validation
from terramind_jax.tasks.datasets import Facts

PENALTIES = tuple(10.0**i for i in range(-6, 3))  # of a mean cross-entropy
ITERATIONS = 500


def knn(
    *, weights: str | os.PathLike, out: str | os.PathLike, k: Sequence[int] = (5, 20), temperature: float = 0.07, **options: Any
) -> None:
    """Writes ``{out}/report.md``, ``scores.csv`` and ``predictions.csv`` of the first `k`; `options` are of `features.run`.

    Raises:
      FileExistsError: `out` exists. ValueError: a `k` below 1; and as `features.run`.
    """
    if not k or min(k) < 1:
        raise ValueError(f"k is {', '.join(map(str, k))}; expected numbers of neighbours, at least 1.")
    with results.folder(out) as partial:
        facts, (train, test) = features.run(weights=weights, splits=("train", "test"), **options)
        voted = {
            (name, n): metrics.knn_labels(of, train.representations()[name], train.labels, n, temperature)
            for name, of in test.representations().items()
            for n in k
        }
        said = f"Neighbours are {len(train.names)} training images; votes are weighted with exp(cosine / {temperature:g})."
        _write(partial, "knn", facts, weights, options, test, {(name, f"k {n}"): x for (name, n), x in voted.items()}, said)


def linear(*, weights: str | os.PathLike, out: str | os.PathLike, penalties: Sequence[float] = PENALTIES, **options: Any) -> None:
    """As `knn`, of a linear probe; `penalties` are those tried."""
    with results.folder(out) as partial:
        facts, (train, val, test) = features.run(weights=weights, splits=("train", "val", "test"), **options)
        found = {}
        for name, of in test.representations().items():
            x, validated = train.representations()[name], val.representations()[name]
            mean, std = x.mean(0), np.maximum(x.std(0), 1e-6)
            fitted = {p: fit((x - mean) / std, train.labels, facts.num_classes, p) for p in penalties}
            right = {p: (predict(w, (validated - mean) / std) == val.labels).mean() for p, w in fitted.items()}
            best = max(right, key=right.get)
            found[name, f"penalty {best:g}"] = predict(fitted[best], (of - mean) / std)
        said = f"Fitted to {len(train.names)} training images, with the penalty that is best on {len(val.names)} of the validation split."
        _write(partial, "linear", facts, weights, options, test, found, said)


# ---- logistic regression ----


def fit(x: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float) -> np.ndarray:
    """Weights ``[D + 1, K]``, the last row a bias, of ``[N, D]``, where the mean cross-entropy and half `penalty` times the squared weights
    are least."""
    x, shape = _with_bias(x), (x.shape[1] + 1, num_classes)
    truth = np.eye(num_classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(shape)
        logits = x @ w
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        held = w * (np.arange(len(w)) < len(w) - 1)[:, None]  # the bias is free
        gradient = x.T @ (np.exp(logits) - truth) / len(x) + penalty * held
        return -(truth * logits).sum() / len(x) + penalty / 2 * np.square(held).sum(), gradient.ravel()

    found = optimize.minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    return found.x.reshape(shape)


def predict(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The most likely class ``[N]``."""
    return (_with_bias(x) @ w).argmax(1)


def _with_bias(x: np.ndarray) -> np.ndarray:
    return np.append(np.asarray(x, np.float64), np.ones((len(x), 1)), axis=1)


# ---- what is written ----


def _write(
    out: Path,
    protocol: str,
    facts: Facts,
    weights: str | os.PathLike,
    options: Mapping[str, Any],
    test: Features,
    found: Mapping[tuple[str, str], np.ndarray],
    said: str,
) -> None:
    """`found` are labels of the test split by what they were told from, and how."""
    model, inputs = options.get("model") or str(weights), ", ".join(facts.bands)
    rows = []
    for (name, how), predicted in found.items():
        scores = metrics.class_scores(metrics.confusion_matrix(predicted, test.labels, facts.num_classes))
        numbers = {"accuracy": scores["pixel_accuracy"], "mean class accuracy": scores["accuracy"], "F1": scores["F1"]}
        rows.append({"model": model if name == "features" else name, "data set": facts.title, "input": inputs, "setting": how, **numbers})
    first = next(iter(found.values()))
    each = validation.by_class(facts, {"confusion": metrics.confusion_matrix(first, test.labels, facts.num_classes)})
    named = [
        {"sample": s, "truth": facts.class_names[t], "predicted": facts.class_names[p]}
        for s, t, p in zip(test.names, test.labels, first, strict=True)
    ]
    results.write_csv(out / "scores.csv", rows)
    results.write_csv(out / "predictions.csv", named)
    majority = np.bincount(test.labels).max() / len(test.labels)
    text = results.write_report(
        out / "report.md",
        {"knn": "k-nearest neighbours", "linear": "Linear probe"}[protocol],
        f"{facts.title}{features.told(options)}, {len(test.names)} test images, frozen features. {said} Always the most common class: "
        f"{majority:.3f}.",
        results.compared(protocol, rows),
        f"## By class, of the first row\n\n{results.table(each)}",
    )
    print("\n" + text)
