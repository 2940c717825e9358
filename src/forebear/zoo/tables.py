"""Tables of numbers: split, standardised, and the small networks that are trained on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import DataError, MissingDependencyError, unknown_name
from forebear.task import Loss
from forebear.tasks import losses
from forebear.training.recipe import Recipe

Activation = Literal["tanh", "relu"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class Tabular:
    """A classification or regression task on a table.

    Columns are standardised with mean and spread of the training rows, a numeric target too.
    Queries are the first test rows.

    Attributes:
        train: `(x [n, p], y [n])`; y is int64 for classes and float32 for numbers.
        queries: `(x [q, p], y [q])`.
        test: `(x, y)`, of which the queries are the beginning.
        features: name of each column.
        classes: name of each class; empty for a numeric target.
    """

    name: str
    train: Data
    queries: Data
    test: Data
    features: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @property
    def loss(self) -> Loss:
        """Cross-entropy for classes, squared error for numbers."""
        return losses.cross_entropy if self.classes else losses.squared_error


def split_table(
    name: str,
    rows: Any,
    target: Any,
    *,
    features: Sequence[str],
    classes: Sequence[str] = (),
    queries: int = 60,
    test: float = 0.1,
    seed: int = 0,
) -> Tabular:
    """Split a table as `sklearn.model_selection.train_test_split` does, and standardise it.

    Args:
        name: of the task.
        rows: `[n, p]`.
        target: `[n]`, class numbers or values.
        features: name of each column.
        classes: name of each class; none for a numeric target.
        queries: test rows to ask about.
        test: share of the rows that is kept for testing.
        seed: `random_state` of the split.

    Raises:
        DataError: there are fewer test rows than queries.
        MissingDependencyError: scikit-learn is not installed.
    """
    parts = sklearn("model_selection").train_test_split(
        np.asarray(rows, np.float64), np.asarray(target), test_size=test, random_state=seed
    )
    x_train, x_test, y_train, y_test = parts
    if not 0 < queries <= len(x_test):
        raise DataError(f"{queries} queries were asked for: {name} has {len(x_test)} test rows")
    scale = _scaling(x_train)
    if not len(classes):
        of_target = _scaling(y_train)
        y_train, y_test = of_target(y_train), of_target(y_test)
    kind = torch.int64 if len(classes) else torch.float32

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(scale(x)).float(), torch.from_numpy(y).to(kind)

    held_out = tensors(x_test, y_test)
    return Tabular(
        name=name,
        train=Data(tensors(x_train, y_train)),
        queries=Data((held_out[0][:queries], held_out[1][:queries])),
        test=Data(held_out),
        features=tuple(map(str, features)),
        classes=tuple(map(str, classes)),
    )


def network(sizes: Sequence[int], activation: Activation = "tanh") -> nn.Module:
    """An untrained multilayer perceptron of these sizes.

    Raises:
        UnknownNameError: the activation is none of `ACTIVATIONS`.
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def network_recipe(
    sizes: Sequence[int], loss: Loss, *, epochs: int, activation: Activation = "tanh"
) -> Recipe:
    """Plain SGD at a constant rate of 0.1 in batches of 64."""
    build = partial(network, tuple(sizes), activation)
    return Recipe(build, loss, learning_rate=0.1, epochs=epochs, batch_size=64)


def sklearn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        MissingDependencyError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            "this table comes with scikit-learn: pip install scikit-learn"
        ) from error


def _scaling(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    mean, spread = values.mean(0), values.std(0)
    spread = np.where(spread > 0, spread, 1.0)  # a constant column stays what it is: zero
    return lambda rows: (rows - mean) / spread
