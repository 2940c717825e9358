"""Trained models that the study of final-model methods is made on."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forebear.data import Data, map_tensors
from forebear.errors import DataError, FormatError, unknown_name
from forebear.studies.final_model.entrants import Further
from forebear.task import Task
from forebear.task_file import importable, imported
from forebear.tasks import losses
from forebear.training import FurtherTraining
from forebear.training.recipe import Recipe
from forebear.training.schedule import steps_per_epoch
from forebear.zoo import breast_cancer, diabetes, text
from forebear.zoo.tables import network_recipe, sklearn, split_table

LEFT_OUT, QUERIES, SEEDS = 50, 60, 3
MOST_SEEDS = 12
"""Seeds are added up to so many until the gold standard has a reliability of 0.9."""

QUICK_LEFT_OUT, QUICK_QUERIES, QUICK_SEEDS = 12, 20, 2
QUICK_EPOCHS = (1, 2, 5, 20)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model, its data, and how it is trained further.

    Attributes:
        name: of the task.
        title: for people.
        task: the model in double precision.
        train: the training set.
        queries: what is asked.
        left_out: positions of the training examples that are left out, `[m]`.
        further_training: the gold standard.
        activation: `"tanh"`, `"relu"` or `""` where it is not known.
    """

    name: str
    title: str
    task: Task
    train: Data
    queries: Data
    left_out: Tensor
    further_training: FurtherTraining
    activation: str = ""

    @property
    def epochs(self) -> tuple[int, ...]:
        """Amounts of further training."""
        return tuple(int(amount) for amount in self.further_training.amounts)

    @property
    def further(self) -> Further:
        """The same as methods may know it."""
        about = self.further_training
        return Further(
            learning_rate=about.learning_rate,
            batch_size=about.batch_size,
            steps_per_epoch=steps_per_epoch(len(self.train), about.batch_size),
        )

    def facts(self) -> dict[str, Any]:
        """Everything that decides the numbers."""
        return {
            "task": self.name,
            "model": self.task.model_hash(),
            "train": self.train.fingerprint,
            "queries": self.queries.fingerprint,
            "left out": self.left_out.tolist(),
            "further training": str(self.further_training),
            "forebear": version("forebear"),
        }


@dataclass(frozen=True)
class _Material:
    title: str
    recipe: Recipe
    train: Data
    queries: Data
    epochs: tuple[int, ...]
    activation: str = "tanh"


def subject_of(task: str, *, quick: bool, seed: int) -> Subject:
    """A subject by name, trained now, or from a Python file.

    Raises:
        UnknownNameError: the name is neither a file nor one of `SUBJECTS`.
        FormatError: the file lacks a function.
    """
    if task.endswith(".py"):
        return _from_file(Path(task), quick=quick, seed=seed)
    if task not in SUBJECTS:
        raise unknown_name("task of the study", task, SUBJECTS)
    material = SUBJECTS[task](QUICK_QUERIES if quick else QUERIES)
    model = material.recipe.train(material.train, seed=seed).double()
    further = FurtherTraining(
        learning_rate=material.recipe.learning_rate,
        batch_size=material.recipe.batch_size,
        amounts=QUICK_EPOCHS if quick else material.epochs,
        seeds=QUICK_SEEDS if quick else SEEDS,
        max_seeds=None if quick else MOST_SEEDS,
        seed=seed,
        adjustment="mean",
    )
    train = _double(material.train)
    return Subject(
        name=task,
        title=material.title,
        task=Task(model, material.recipe.loss),
        train=train,
        queries=_double(material.queries),
        left_out=_left_out(len(train), quick, seed),
        further_training=further,
        activation=material.activation,
    )


def _breast_cancer(queries: int) -> _Material:
    data = breast_cancer.load(queries=min(queries, 57))
    return _Material(
        "breast cancer",
        breast_cancer.recipe(),
        data.train,
        data.queries,
        (1, 2, 5, 10, 20, 50, 100),
    )


def _diabetes(queries: int) -> _Material:
    data = diabetes.load(queries=min(queries, 45))
    return _Material(
        "diabetes", diabetes.recipe(), data.train, data.queries, (1, 2, 5, 10, 20, 50, 100)
    )


def _digits(queries: int) -> _Material:
    found = sklearn("datasets").load_digits()
    data = split_table(
        "digits",
        found.data,
        found.target,
        features=found.feature_names,
        classes=found.target_names,
        queries=queries,
    )
    recipe = network_recipe((64, 24, 24, 10), losses.cross_entropy, epochs=60)
    return _Material("images of digits", recipe, data.train, data.queries, (1, 2, 5, 10, 20, 50))


def _text(queries: int) -> _Material:
    # Small, for each example has 16 × 60 outputs.
    data = text.load(train=300, queries=min(queries, 40), length=16)
    return _Material(
        "characters of Python's help", text.recipe(), data.train, data.queries, (1, 2, 5, 10, 20)
    )


SUBJECTS: dict[str, Callable[[int], _Material]] = {
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
    "digits": _digits,
    "text": _text,
}


def _from_file(path: Path, *, quick: bool, seed: int) -> Subject:
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    with importable(path.resolve().parent):
        module = imported(path)
        if not hasattr(module, "further_training"):
            raise FormatError(
                f"{path} does not define further_training(): return fb.FurtherTraining with the "
                "learning rate and batch size that the model was trained with"
            )
        task, further = module.task(), module.further_training()
        train = Data.of(module.train(), collate=task.collate)
        queries = Data.of(module.queries(), collate=task.collate)
    queries = queries.slice(slice(0, QUICK_QUERIES if quick else QUERIES))
    return Subject(
        name=path.stem,
        title=path.stem,
        task=task,
        train=train,
        queries=queries,
        left_out=_left_out(len(train), quick, seed),
        further_training=further,
    )


def _left_out(n: int, quick: bool, seed: int) -> Tensor:
    count = QUICK_LEFT_OUT if quick else LEFT_OUT
    if n <= count:
        raise DataError(f"the training set has {n} examples: the study leaves out {count} of them")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:count].sort().values


def _double(data: Data) -> Data:
    batch = data.batch(slice(None))
    return Data(map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch))
