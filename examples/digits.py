"""Which handwritten digits taught a small network to read the ones it is asked about.

    forebear attribute examples/digits.py --method ekfac --out runs/digits
    forebear top runs/digits --query 3
    forebear report runs/digits --open

Needs scikit-learn, which the digits come with.
"""

import forebear as fb
from forebear.zoo import digits

IMAGES = digits.load()
RECIPE = digits.recipe()


def task() -> fb.Task:
    """What was trained (a network 64-64-32-10) and what is asked: minus the loss of a query."""
    return fb.Task(RECIPE.train(IMAGES.train, seed=0), RECIPE.loss)


def train() -> fb.Data:
    """1,297 images with their labels."""
    return IMAGES.train


def queries() -> fb.Data:
    """100 images that the network has not seen."""
    return IMAGES.queries


def examples() -> dict[str, dict[int, str]]:
    """Words for people, by id: `forebear top` and the page show them."""

    def texts(data: fb.Data) -> dict[int, str]:
        _, labels = data.batch(slice(None))
        return {i: f"a {label}" for i, label in enumerate(labels.tolist())}

    return {"train": texts(IMAGES.train), "queries": texts(IMAGES.queries)}
