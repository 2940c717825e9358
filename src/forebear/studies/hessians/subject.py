"""The controlled classifier of the Hessian study: small enough for every matrix, trained to rest.

Digits with a tenth of the labels changed, a network of some thousand parameters, all examples in
every step, and L-BFGS at the end, so that the model is at a minimum of
`J(θ) = mean loss + (weight decay / 2) ‖θ‖²` and nothing in training is random but the start.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from forebear.curvature.solved import flat
from forebear.data import Data
from forebear.differentiation import Function
from forebear.plan import make_plan
from forebear.stream import Stream
from forebear.studies.base import Pieces
from forebear.task import Task
from forebear.tasks import losses
from forebear.training.recipe import Recipe
from forebear.training.subsets import half_subsets
from forebear.zoo import digits
from forebear.zoo.images import flip_labels

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier of digits and how it is trained.

    Attributes:
        widths: of the layers, from the 64 pixels to the 10 classes.
        activation: a name of `ACTIVATIONS`.
        examples: in the training set.
        changed: share of the labels that are set to another class.
        weight_decay: of all parameters; it is part of J, not of the curvature of the mean loss.
        steps: of Adam, with all examples in each.
        learning_rate: of Adam.
        polish: steps of L-BFGS after it at most; zero for none.
    """

    widths: tuple[int, ...] = (64, 12, 10)
    activation: str = "tanh"
    examples: int = 500
    changed: float = 0.1
    weight_decay: float = 1e-3
    steps: int = 500
    learning_rate: float = 0.01
    polish: int = 2000

    @property
    def title(self) -> str:
        """Widths and activation."""
        return f"{'-'.join(map(str, self.widths))} {self.activation}"

    def build(self) -> nn.Module:
        """An untrained network in double precision."""
        layers: list[nn.Module] = []
        for i, o in pairwise(self.widths):
            layers += [nn.Linear(i, o), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers[:-1]).double()

    def recipe(self) -> Recipe:
        """Adam on all examples at once, from scratch."""
        return Recipe(
            self.build,
            losses.cross_entropy,
            optimizer="adam",
            learning_rate=self.learning_rate,
            epochs=self.steps,
            batch_size=self.examples,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True, kw_only=True)
class Gold:
    """Models that are really retrained on parts of the training set.

    Attributes:
        subsets: how many, each with half of the examples.
        queries: test examples whose margin is recorded.
        steps: of Adam from the trained weights, with all examples of the subset in each.
        learning_rate: of these.
        cold_seeds: retrainings of each subset from scratch besides; nothing is random but these
            initial weights.
    """

    subsets: int = 40
    queries: int = 40
    steps: int = 400
    learning_rate: float = 0.005
    cold_seeds: int = 4


@dataclass(frozen=True)
class Subject:
    """A trained network with its data and gradients.

    Attributes:
        task: model, loss and the margin as measurement.
        train: `(x, y)`.
        queries: `(x, y)`.
        flipped: bool `[n]`, the labels that were changed.
        slope: `‖∇J‖` where training ended.
        accuracy: on the test set.
    """

    network: Network
    task: Task
    train: Data
    queries: Data
    flipped: np.ndarray
    slope: float
    accuracy: float

    @property
    def stream(self) -> Stream:
        """Gradients of the training set."""
        return Stream(self.task, make_plan(self.task, self.train), self.train)

    def gradients(self, data: Data, function: Function) -> np.ndarray:
        """Per-example gradients written out, `[n, P]`."""
        stream = replace(self.stream, data=data)
        rows = [torch.cat(list(flat(g, stream.plan))) for _, _, g in stream.gradients(function, "")]
        return torch.cat(rows).numpy()


def subject_of(network: Network, queries: int, seed: int, pieces: Pieces) -> Subject:
    """Train a network on digits and bring it to rest."""
    images = digits.load(train=network.examples, queries=queries, seed=seed)
    labels = images.train.batch(slice(None))[1]
    wrong, flipped = flip_labels(labels, network.changed, seed, classes=10)
    train = Data((_pixels(images.train_images), wrong))
    asked = Data((_pixels(images.query_images), images.queries.batch(slice(None))[1]))
    test_x, test_y = images.test.batch(slice(None))
    name = f"model-{network.title.replace(' ', '-')}-{network.examples}-{seed}"
    with one_thread():
        state = pieces.tensors(name, lambda: trained(network, train, seed))
    slope = state.pop("slope").item()
    model = network.build().eval()
    model.load_state_dict(state)
    task = Task(model, losses.cross_entropy, measure=margin)
    mean, spread = float(images.train_images.mean()), float(images.train_images.std())
    with torch.no_grad():
        guess = model((test_x.double() * spread + mean) / 256 - 0.5).argmax(1)
    accuracy = float((guess == test_y).double().mean())
    return Subject(network, task, train, asked, flipped.numpy(), slope, accuracy)


@contextmanager
def one_thread() -> Iterator[None]:
    """Steps this small are slower with threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained(network: Network, train: Data, seed: int) -> dict[str, Tensor]:
    """Weights after Adam and L-BFGS, and the slope that is left."""
    model = network.recipe().train(train, seed=seed)
    batch, parameters = train.batch(slice(None)), list(model.parameters())

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        vector_to_parameters(torch.from_numpy(vector), parameters)
        squares = torch.stack([p.square().sum() for p in parameters]).sum()
        value = losses.cross_entropy(model, batch).mean() + network.weight_decay / 2 * squares
        slope = torch.autograd.grad(value, parameters)
        return value.item(), parameters_to_vector(slope).numpy()

    start = parameters_to_vector(parameters).detach().numpy()
    most, point = network.polish, start
    if most:
        options = {"maxiter": most, "maxfun": 2 * most, "maxcor": 50, "ftol": 0, "gtol": 1e-8}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        point = found.x
    slope = torch.tensor(np.linalg.norm(objective(point)[1]))
    return dict(model.state_dict()) | {"slope": slope}


@dataclass(frozen=True)
class Outcomes:
    """Margins of the queries under retrained models.

    Attributes:
        masks: bool `[m, n]`, what each model was trained on.
        warm: `[m, q]`, trained on from the trained weights; nothing in it is random.
        cold: `[seeds, m, q]`, from scratch.
    """

    masks: np.ndarray
    warm: np.ndarray
    cold: np.ndarray


def outcomes_of(subject: Subject, gold: Gold, seed: int, pieces: Pieces) -> Outcomes:
    """Retrain on every subset, all at once."""
    masks = half_subsets(len(subject.train), gold.subsets, seed=seed)

    def margins(recipe: Recipe, seeds: int) -> dict[str, Tensor]:
        each = [s for s in range(seeds) for _ in masks]
        ensemble = recipe.train_many(subject.train, masks.repeat(seeds, 1), each)
        values = ensemble.evaluate(margin, subject.queries)
        return {"margins": values.detach().view(seeds, len(masks), -1)}

    scratch = subject.network.recipe()
    onward = scratch.with_settings(
        build=lambda: copy.deepcopy(subject.task.model),
        epochs=gold.steps,
        learning_rate=gold.learning_rate,
    )
    warm = pieces.tensors(f"warm-{seed}", lambda: margins(onward, 1))["margins"]
    cold = pieces.tensors(f"cold-{seed}", lambda: margins(scratch, gold.cold_seeds))["margins"]
    return Outcomes(masks.numpy(), warm[0].numpy(), cold.numpy())


def margin(model: nn.Module, batch: Any) -> Tensor:
    """`z_y − log Σ_{c ≠ y} e^{z_c}` of each query, `[b]`."""
    logits, labels = model(batch[0]), batch[1]
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def _pixels(images: np.ndarray) -> Tensor:
    """Pixels from −½ to ½, `[n, 64]`; they are stored as sixteenths of 256."""
    flat_images = torch.from_numpy(images.reshape(len(images), -1)).double()
    return (flat_images / 16).round() / 16 - 0.5
