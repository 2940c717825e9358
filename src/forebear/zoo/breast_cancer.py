"""Breast cancer: 569 tumours by 30 measurements, malignant or benign; comes with scikit-learn."""

from torch import nn

from forebear.tasks import losses
from forebear.training.recipe import Recipe
from forebear.zoo.tables import Activation, Tabular, network, network_recipe, sklearn, split_table

SIZES = (30, 32, 32, 2)


def load(*, queries: int = 57, seed: int = 0) -> Tabular:
    """512 tumours for training and 57 for testing.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    found = sklearn("datasets").load_breast_cancer()
    return split_table(
        "breast_cancer",
        found.data,
        found.target,
        features=found.feature_names,
        classes=found.target_names,
        queries=queries,
        seed=seed,
    )


def build() -> nn.Module:
    """An untrained network 30-32-32-2."""
    return network(SIZES)


def recipe(*, epochs: int = 100, activation: Activation = "tanh") -> Recipe:
    """How the network is trained."""
    return network_recipe(SIZES, losses.cross_entropy, epochs=epochs, activation=activation)
