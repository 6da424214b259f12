"""``evaluate fewshot``: images of a few classes told apart by one example of each, as TerraMind's few-shot results are made.

Features are the mean over the tokens of the last layer, with the statistics of the pretraining. A run draws some classes and one example
of each from the training split; every test image of these classes is given the class of the nearest prototype, which with several
examples is their mean. The accuracy is a mean over many runs. What is near is not told where the protocol is published; here distances
are Euclidean.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from terramind_jax.evaluation import features, results
from terramind_jax.evaluation.features import Features


def run(
    *,
    weights: str | os.PathLike,
    out: str | os.PathLike,
    shots: int = 1,
    ways: int = 5,
    runs: int = 200,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Writes ``{out}/report.md`` and ``scores.csv`` of every run, and returns the accuracies ``[runs]`` of the model's features.

    Args:
      shots: examples of a class. ways: classes of a run; at most all.
      seed: of which classes and examples are drawn.
      **options: of `features.run`.

    Raises:
      FileExistsError: `out` exists. ValueError: more ways than classes, or more shots than a class has images; and as `features.run`.
    """
    with results.folder(out) as partial:
        facts, (train, test) = features.run(weights=weights, splits=("train", "test"), seed=seed, **options)
        _check(train, test, shots, ways, runs, facts.title)
        found = {
            name: accuracies(of, train.labels, test.representations()[name], test.labels, shots=shots, ways=ways, runs=runs, seed=seed)
            for name, of in train.representations().items()
        }
        model, inputs = options.get("model") or str(weights), ", ".join(facts.bands)
        rows = [
            {
                "model": model if name == "features" else name,
                "input": inputs,
                facts.title: 100 * float(x.mean()),
                "deviation": 100 * x.std(),
            }
            for name, x in found.items()
        ]
        results.write_csv(partial / "scores.csv", [{"run": i, "accuracy": float(x)} for i, x in enumerate(found["features"])])
        text = results.write_report(
            partial / "report.md",
            f"{shots}-shot {ways}-way classification",
            f"Accuracy in per cent on the test images of {facts.title}{features.told(options)}, mean and standard deviation of {runs} "
            f"runs; the mean is known to ±{rows[0]['deviation'] / math.sqrt(runs):.1f}. Chance is {100 / ways:.0f}.",
            results.compared("fewshot", rows),
        )
    print("\n" + text)
    return found["features"]


def accuracies(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    shots: int = 1,
    ways: int = 5,
    runs: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """The share of right test images of each run, ``[runs]``; features are ``[N, D]``. Runs differ in their classes and examples."""
    known = np.unique(train_labels)
    found = []
    for i in range(runs):
        rng = np.random.default_rng((seed, i))
        classes = np.sort(rng.choice(known, ways, replace=False))
        examples = [rng.choice(np.flatnonzero(train_labels == c), shots, replace=False) for c in classes]
        prototypes = np.stack([train[of].mean(0) for of in examples])
        among = np.isin(test_labels, classes)
        nearer = test[among] @ prototypes.T - np.square(prototypes).sum(1) / 2  # the distance less what all have alike
        nearest = classes[nearer.argmax(1)]
        found.append((nearest == test_labels[among]).mean())
    return np.array(found)


def _check(train: Features, test: Features, shots: int, ways: int, runs: int, title: str) -> None:
    counts = np.bincount(train.labels)
    known = counts[counts > 0]
    if not 2 <= ways <= len(known):
        raise ValueError(f"ways is {ways}; the training images of {title} have {len(known)} classes, and 2 are the least.")
    if not 1 <= shots <= known.min() or runs < 1:
        raise ValueError(f"shots is {shots} and runs {runs}; both must be at least 1, and a class of {title} has {known.min()} images.")
    if len(set(test.labels)) < len(set(train.labels)):
        raise ValueError(f"The test images of {title} lack a class that its training images have; take more with --limit.")
