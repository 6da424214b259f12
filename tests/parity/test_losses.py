"""Losses and metrics of downstream tasks against TerraTorch's and torchmetrics', and L-TAE against its description in PyTorch's layers."""

import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peer
import pytest
import torch
import torchmetrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from terratorch.tasks import classification_tasks, regression_tasks, segmentation_tasks

from terramind_jax import metrics
from terramind_jax.tasks import losses, plateau, temporal, validation
from terramind_jax.tasks.datasets import Facts

CLASSES, IGNORE = 5, -1


def maps(seed: int = 0, ignored: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Logits and classes, of which the last does not occur."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, CLASSES - 1, (3, 9, 8))
    return rng.normal(0, 2, (3, 9, 8, CLASSES)).astype(np.float32), np.where(rng.random(target.shape) < ignored, IGNORE, target)


def assert_same(ours, theirs, outputs: np.ndarray, target: np.ndarray, ignore: int | None, turned: torch.Tensor) -> None:
    """Values and gradients."""
    value, gradient = jax.value_and_grad(lambda x: ours(x, jnp.asarray(target), losses.valid(jnp.asarray(target), ignore)))(outputs)
    turned = turned.clone().requires_grad_()
    loss = theirs(turned, torch.from_numpy(target))
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    expected = peer.nhwc(turned.grad) if turned.ndim == 4 else turned.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["ce", "dice", "focal"])
def test_losses_of_classes(name):
    logits, target = maps()
    theirs = segmentation_tasks.init_loss(name, ignore_index=IGNORE)
    assert_same(losses.LOSSES[name], theirs, logits, target, IGNORE, peer.nchw(logits))
    whole = maps(1, ignored=0)
    none = -100 if name == "ce" else None
    assert_same(losses.LOSSES[name], segmentation_tasks.init_loss(name, ignore_index=none), *whole, None, peer.nchw(whole[0]))


def test_weighted_cross_entropy():
    logits, target = maps()
    weights = (0.5, 1.0, 2.0, 3.0, 1.0)
    theirs = segmentation_tasks.init_loss("ce", ignore_index=IGNORE, class_weights=torch.tensor(weights))
    assert_same(lambda *args: losses.cross_entropy(*args, weights=weights), theirs, logits, target, IGNORE, peer.nchw(logits))


@pytest.mark.parametrize("name", ["mse", "mae"])
@pytest.mark.parametrize("ignore", [None, -9999])
def test_losses_of_values(name, ignore):
    rng = np.random.default_rng(2)
    values, target = rng.normal(size=(2, 3, 7, 6)).astype(np.float32)
    target = target if ignore is None else np.where(rng.random(target.shape) < 0.4, np.float32(ignore), target)
    assert_same(
        losses.LOSSES[name], regression_tasks.init_loss(name, ignore_index=ignore), values, target, ignore, torch.from_numpy(values)
    )


def test_loss_of_several_labels():
    rng = np.random.default_rng(3)
    logits, target = rng.normal(size=(4, CLASSES)).astype(np.float32), rng.integers(0, 2, (4, CLASSES)).astype(np.float32)
    assert_same(losses.binary_cross_entropy, classification_tasks.init_loss("bce"), logits, target, None, torch.from_numpy(logits))


@pytest.mark.parametrize("ignore", [IGNORE, CLASSES - 1])
def test_scores_of_classes(ignore):
    logits, target = maps()
    target = np.where(target == IGNORE, ignore, target)
    predicted = logits.argmax(-1)
    matrix = sum(metrics.confusion_matrix(p, t, CLASSES, ignore) for p, t in zip(predicted, target, strict=True))
    ours = metrics.class_scores(matrix, ignore)
    options, tensors = dict(num_classes=CLASSES, ignore_index=ignore), (torch.from_numpy(predicted), torch.from_numpy(target))
    theirs = {
        "mIoU": torchmetrics.classification.MulticlassJaccardIndex(average="macro", **options),
        "pixel_accuracy": torchmetrics.classification.MulticlassAccuracy(average="micro", **options),
    }
    theirs["F1"] = torchmetrics.classification.MulticlassF1Score(average="macro", **options)
    theirs["accuracy"] = torchmetrics.classification.MulticlassAccuracy(average="macro", **options)
    for name, metric in theirs.items():
        # of an ignored class that is predicted torchmetrics still takes an F1 and an accuracy of 0, but no IoU
        more = CLASSES / (CLASSES - 1) if ignore != IGNORE and name in ("F1", "accuracy") else 1
        assert ours[name] == pytest.approx(more * metric(*tensors).item(), rel=1e-5), name


class Given:
    """In the place of a network: its outputs are what it is given."""

    @staticmethod
    def apply(variables, features, **_):
        return features


def validated(task: str, outputs: np.ndarray, target: np.ndarray, ignore: int | None, criterion: losses.Loss) -> dict[str, float]:
    """What fine-tuning logs of outputs ``[N, ...]`` in two batches, of which the second is filled up with what is not valid."""
    names = tuple(map(str, range(CLASSES))) if "regression" not in task else ()
    facts, valid = Facts("the data set", task, {}, names, ignore), np.asarray(losses.valid(jnp.asarray(target), ignore))
    batch = {"features": outputs, "target": np.where(valid, target, 0), "valid": valid}
    first, rest = ({name: x[rows] for name, x in batch.items()} for rows in (slice(2), slice(2, None)))
    filled = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in rest.items()}
    measure = jax.jit(partial(validation.measure, Given, criterion, facts, {}))
    return validation.summarize(facts, validation.add_up(map(measure, (first, filled))))


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_logged_scores_of_classes(task):
    logits, target = maps(8) if task == "segmentation" else (x[0].reshape(72, -1).squeeze() for x in maps(8))
    ours = validated(task, logits, target, IGNORE, losses.cross_entropy)
    tensors = peer.nchw(logits) if task == "segmentation" else torch.from_numpy(logits), torch.from_numpy(target)
    options = dict(num_classes=CLASSES, ignore_index=IGNORE)
    theirs = {
        "mIoU": torchmetrics.classification.MulticlassJaccardIndex(average="macro", **options),
        "F1": torchmetrics.classification.MulticlassF1Score(average="macro", **options),
        "accuracy": torchmetrics.classification.MulticlassAccuracy(average="macro", **options),
        "pixel_accuracy": torchmetrics.classification.MulticlassAccuracy(average="micro", **options),
        "loss": segmentation_tasks.init_loss("ce", ignore_index=IGNORE),
    }
    assert ours == pytest.approx({name: metric(*tensors).item() for name, metric in theirs.items()}, rel=1e-5)


def test_the_logged_scores_of_several_labels():
    rng = np.random.default_rng(9)
    logits, target = rng.normal(size=(9, CLASSES)).astype(np.float32), rng.integers(0, 2, (9, CLASSES))
    logits[:, 0], target[:, 0] = -1, 0  # a label that is nowhere
    ours = validated("multilabel", logits, target, None, losses.binary_cross_entropy)
    tensors = torch.from_numpy(logits), torch.from_numpy(target)
    theirs = {
        "F1": torchmetrics.classification.MultilabelF1Score(CLASSES, average="macro")(*tensors),
        "accuracy": torchmetrics.classification.MultilabelAccuracy(CLASSES, average="macro")(*tensors),
        "loss": classification_tasks.init_loss("bce")(tensors[0], tensors[1].float()),
    }
    assert ours == pytest.approx({name: x.item() for name, x in theirs.items()}, rel=1e-5)


@pytest.mark.parametrize("task", ["regression", "scalar_regression"])
def test_the_logged_errors_of_values(task):
    values, target = np.random.default_rng(10).normal(size=(2, 3, 7, 6) if task == "regression" else (2, 9)).astype(np.float32)
    target = np.where(target < -0.5, np.float32(-9999), target)
    ours = validated(task, values, target, -9999, losses.mse)
    theirs = {"rmse": torchmetrics.MeanSquaredError(squared=False), "mae": torchmetrics.MeanAbsoluteError()}
    for name, metric in theirs.items():
        wrapped = regression_tasks.IgnoreIndexMetricWrapper(metric, ignore_index=-9999)
        wrapped.update(torch.from_numpy(values), torch.from_numpy(target))
        assert ours[name] == pytest.approx(wrapped.compute().item(), rel=1e-5)


def test_root_mean_squared_error():
    values, target = np.random.default_rng(4).normal(size=(2, 3, 7, 6)).astype(np.float32)
    valid = target > -0.5
    theirs = regression_tasks.IgnoreIndexMetricWrapper(torchmetrics.MeanSquaredError(squared=False), ignore_index=-9999)
    theirs.update(torch.from_numpy(values), torch.from_numpy(np.where(valid, target, np.float32(-9999))))
    assert metrics.rmse(values[..., None], target[..., None], valid) == pytest.approx(theirs.compute().item(), rel=1e-5)


class TheirLTAE(torch.nn.Module):
    """The encoder of arXiv 2007.00586, one series a row."""

    def __init__(self, dim: int, heads: int, key: int) -> None:
        super().__init__()
        self.heads, self.key_channels = heads, key
        self.in_norm, self.out_norm = torch.nn.GroupNorm(heads, dim), torch.nn.GroupNorm(heads, dim)
        self.inconv, self.key, self.mlp = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, heads * key), torch.nn.Linear(dim, dim)
        self.norm, self.query = torch.nn.BatchNorm1d(dim), torch.nn.Parameter(torch.randn(heads, key))

    def forward(self, x: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
        (b, t, d), h = x.shape, self.heads
        x = self.inconv(self.in_norm(x.transpose(1, 2)).transpose(1, 2))
        rows = [
            [f(day / 1000 ** (2 * i / (d // h))) for i in range(d // h // 2) for f in (np.sin, np.cos)] * h for day in days.ravel().tolist()
        ]
        x = x + torch.tensor(rows, dtype=torch.float32).reshape(b, t, d)
        split = lambda y, width: y.reshape(b, t, h, width).transpose(1, 2)  # noqa: E731
        query = self.query[None, :, None].expand(b, -1, -1, -1)
        out = torch.nn.functional.scaled_dot_product_attention(query, split(self.key(x), self.key_channels), split(x, d // h))
        return self.out_norm(torch.relu(self.norm(self.mlp(out.reshape(b, d)))))


def test_ltae():
    torch.manual_seed(0)
    theirs, ours = TheirLTAE(32, 4, 3), temporal.LTAE(heads=4, key_channels=3)
    peer.randomize(theirs, seed=5)
    x, days = np.random.default_rng(6).normal(size=(2, 5, 7, 32)).astype(np.float32), np.array([[0, 9, 31, 200, 360], [3, 4, 70, 71, 300]])
    params = {"query": theirs.query.detach().numpy()}
    for name in ("inconv", "key", "mlp"):
        layer = getattr(theirs, name)
        params[name] = {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}
    for name in ("in_norm", "out_norm", "norm"):
        layer = getattr(theirs, name)
        params[name] = {"scale": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}
    variables = {**ours.init(jax.random.key(0), x, days), "params": params}
    series = torch.from_numpy(x.swapaxes(1, 2).reshape(14, 5, 32))
    with torch.no_grad():
        expected = theirs.eval()(series, torch.from_numpy(days.repeat(7, 0))).numpy().reshape(2, 7, 32)
    assert np.linalg.norm(ours.apply(variables, x, days) - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("larger", [False, True])
def test_the_plateau_schedule_is_pytorchs(larger):
    values = np.random.default_rng(7).normal(3, 1, 60).cumsum().tolist() + [math.nan, 1.0, 300.0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max" if larger else "min", factor=0.5, patience=3)
    for i, value in enumerate(values):
        theirs.step(value)
        assert plateau.scale(values[: i + 1], larger, 0.5, 3) == pytest.approx(max(optimizer.param_groups[0]["lr"], 0))
