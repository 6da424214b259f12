"""What a generated modality must beat: the training mean, the majority class, and regressions that see one pixel at a time.

A pixel's twelve Sentinel-2 bands say much about its NDVI and little about its elevation; what a model gains over these baselines is
what it takes from context. Everything is NumPy and has one right answer, so no baseline depends on a seed or a step size.
"""

from __future__ import annotations

import dataclasses

import numpy as np

RIDGE = 1e-6  # of least squares, on standardised inputs: enough to keep collinear bands solvable
PRIOR = 1e-5  # of logistic regression, a pixel: keeps weights finite where classes separate
NEWTON_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Linear:
    """``prediction = x @ weight + bias``, pixel by pixel."""

    weight: np.ndarray  # [C, K]
    bias: np.ndarray  # [K]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``[..., C]`` -> ``[..., K]`` float64."""
        return np.asarray(x, np.float64) @ self.weight + self.bias


class LinearRegression:
    """Least squares from `inputs` bands to `outputs` bands, by normal equations summed over any number of images."""

    def __init__(self, inputs: int, outputs: int):
        self.moments = np.zeros((inputs + 1, inputs + 1))  # of [x, 1]
        self.products = np.zeros((inputs + 1, outputs))

    def add(self, x: np.ndarray, y: np.ndarray, valid: np.ndarray | None = None) -> LinearRegression:
        """Adds pixels ``[..., C]`` and their targets ``[..., K]``; `valid` ``[...]`` marks those that count. Returns self."""
        x, y = _pixels(x, y, valid)
        if (x.shape[1] + 1, y.shape[1]) != self.products.shape:
            expected = f"{self.products.shape[0] - 1} input and {self.products.shape[1]} target bands"
            raise ValueError(f"Got {x.shape[1]} input and {y.shape[1]} target bands, expected {expected}.")
        x = np.append(x, np.ones((len(x), 1)), axis=1)
        self.moments += x.T @ x
        self.products += x.T @ y
        return self

    @property
    def count(self) -> int:
        """Pixels added so far."""
        return int(round(self.moments[-1, -1]))

    def mean(self) -> np.ndarray:
        """The mean of the targets, ``[K]``: the training-mean baseline."""
        return self.products[-1] / self._counted()

    def fit(self) -> Linear:
        """The least-squares solution of what was added."""
        count = self._counted()
        mean_x, mean_y = self.moments[-1, :-1] / count, self.products[-1] / count
        covariance = self.moments[:-1, :-1] / count - np.outer(mean_x, mean_x)
        scale = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
        correlation = covariance / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
        cross = (self.products[:-1] / count - np.outer(mean_x, mean_y)) / scale[:, None]
        weight = np.linalg.solve(correlation, cross) / scale[:, None]
        return Linear(weight, mean_y - mean_x @ weight)

    def _counted(self) -> int:
        if not self.count:
            raise ValueError("No valid pixel was added to this regression.")
        return self.count


def logistic_regression(x: np.ndarray, classes: np.ndarray, num_classes: int) -> Linear:
    """Multinomial logistic regression of pixels ``[n, C]`` with classes ``[n]``; the most likely class is ``argmax(model(x))``.

    Newton's method with step halving, to convergence; a small ridge keeps the weights finite where classes separate. For ten classes
    and twelve bands 50,000 pixels are plenty, and take about 100 MB.
    """
    x, classes = np.asarray(x, np.float64), np.asarray(classes)
    if x.ndim != 2 or classes.shape != x.shape[:1] or not len(x):
        raise ValueError(f"Expected pixels [n, C] and classes [n]; got {x.shape} and {classes.shape}.")
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    features = np.append((x - mean) / scale, np.ones((len(x), 1)), axis=1)
    weight = np.zeros((features.shape[1], num_classes))
    loss = _loss(features, classes, weight)
    a, b = np.tril_indices(features.shape[1])
    squares = (features[:, a] * features[:, b]).astype(np.float32)  # of the Hessian, which only has to point downhill
    for _ in range(NEWTON_STEPS):
        step = _newton_step(features, squares, classes, weight)
        size, decrease = 1.0, 0.0
        while size > 1e-4 and (decrease := loss - _loss(features, classes, weight - size * step)) <= 0:
            size /= 2
        if decrease <= 1e-7:
            break
        weight, loss = weight - size * step, loss - decrease
    slope = weight[:-1] / scale[:, None]
    return Linear(slope, weight[-1] - mean @ slope)


def majority_class(counts: np.ndarray) -> int:
    """The most frequent class of a histogram ``[K]``, the first of equals."""
    return int(np.argmax(counts))


def sample_pixels(rng: np.random.Generator, arrays: tuple[np.ndarray, ...], count: int) -> tuple[np.ndarray, ...]:
    """The same `count` random pixels of several images ``[H, W, C]`` or ``[H, W]`` of one scene -> ``[count, C]`` or ``[count]``."""
    height, width = arrays[0].shape[:2]
    at = rng.choice(height * width, min(count, height * width), replace=False)
    return tuple(a.reshape(height * width, *a.shape[2:])[at] for a in arrays)


def _pixels(x: np.ndarray, y: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"Inputs {x.shape} and targets {y.shape} are not the same pixels.")
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return (x, y) if valid is None else (x[np.ravel(valid)], y[np.ravel(valid)])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def _loss(features: np.ndarray, classes: np.ndarray, weight: np.ndarray) -> float:
    """Mean cross-entropy plus the ridge."""
    log_likelihood = _log_softmax(features @ weight)[np.arange(len(classes)), classes]
    return -log_likelihood.mean() + PRIOR / 2 * np.square(weight).sum()


def _newton_step(features: np.ndarray, squares: np.ndarray, classes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    n, (rows, num_classes) = len(features), weight.shape
    probability = np.exp(_log_softmax(features @ weight))
    residual = probability.copy()
    residual[np.arange(n), classes] -= 1
    gradient = features.T @ residual / n + PRIOR * weight
    i, j = np.tril_indices(num_classes)
    a, b = np.tril_indices(rows)
    probability = np.ascontiguousarray(probability.T.astype(np.float32))
    curvature = probability[i] * ((i == j)[:, None].astype(np.float32) - probability[j])
    blocks = np.zeros((len(i), rows, rows))
    blocks[:, a, b] = blocks[:, b, a] = curvature @ squares / n  # one product for all pairs of classes
    hessian = np.zeros((num_classes, rows, num_classes, rows))
    hessian[i, :, j] = hessian[j, :, i] = blocks
    hessian = hessian.reshape(num_classes * rows, num_classes * rows) + PRIOR * np.eye(num_classes * rows)
    return np.linalg.solve(hessian, gradient.T.reshape(-1)).reshape(num_classes, rows).T
