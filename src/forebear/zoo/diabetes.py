"""Diabetes: 442 patients by 10 measurements and how the illness went; comes with scikit-learn."""

from torch import nn

from forebear.tasks import losses
from forebear.training.recipe import Recipe
from forebear.zoo.tables import Activation, Tabular, network, network_recipe, sklearn, split_table

SIZES = (10, 32, 32, 1)


def load(*, queries: int = 45, seed: int = 0) -> Tabular:
    """397 patients for training and 45 for testing; the target is standardised.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    found = sklearn("datasets").load_diabetes()
    return split_table(
        "diabetes",
        found.data,
        found.target,
        features=found.feature_names,
        queries=queries,
        seed=seed,
    )


def build() -> nn.Module:
    """An untrained network 10-32-32-1."""
    return network(SIZES)


def recipe(*, epochs: int = 300, activation: Activation = "tanh") -> Recipe:
    """How the network is trained."""
    return network_recipe(SIZES, losses.squared_error, epochs=epochs, activation=activation)
