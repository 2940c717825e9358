"""Diffusion models that the study is made on, and how retrained ones are measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import unknown_name
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.sampling import Guided, Sampler
from forebear.tasks.schedules import Continuous
from forebear.training.recipe import Recipe
from forebear.zoo import digits_diffusion, fashion_diffusion
from forebear.zoo.pictures import Pictures, half_subsets

GENERATED_KEYS = 20_000
"""Start noise and loss noise of the first generated image belong to this key."""


@dataclass(frozen=True)
class Quality:
    """Minus the loss, one noise level at a time: what retrained models are measured by.

    Attributes:
        loss: averaged over levels and draws.
        name: in the record.
    """

    loss: Denoising
    name: str

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Minus the loss of each image, `[b]`."""
        total: Any = 0.0
        for point, _, noise, said in self.loss.terms(model, batch):
            target = self.loss.target(batch["image"], noise, point.level)
            error = (said - target).square().flatten(1).mean(1)
            total = total + self.loss.schedule.weight(point.level) * error
        return -total / len(self.loss.points)


REMOVED = (
    *("pixels", "embedding", "nda", "gradcos", "trak", "das", "abu", "mucs"),
    *("das+abu:z", "das+pixels:z"),
)
"""Entrants whose strongest examples are removed."""


@dataclass(frozen=True)
class Removal:
    """How images are removed and others made again.

    Attributes:
        targets: generated images whose strongest examples are removed.
        bystanders: generated images that nothing is removed for.
        count: examples removed for one target at a time; 0 leaves that part out.
        pooled: examples removed for a target where all targets' are removed at once.
        draws: random sets that a target's are compared with.
        methods: entrants whose strongest examples are removed.
    """

    targets: int = 10
    bystanders: int = 10
    count: int = 50
    pooled: int = 50
    draws: int = 1
    methods: tuple[str, ...] = field(default=REMOVED, repr=False)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A diffusion model, its data and how it is judged.

    Attributes:
        name: of the task.
        title: for people.
        pictures: training and held-out images.
        recipe: how models are trained.
        loss: what methods attribute.
        quality: what retrained models are measured by.
        sampler: how images are drawn.
        subsets: bool `[m, n]`, halves that models are retrained on.
        seeds: of retraining each.
        generated: number of generated images that are asked about, beside those held out.
        removal: of the counterfactual part.
        seed: of the model.
        few: queries of each group for methods that pay for every one.
    """

    name: str
    title: str
    pictures: Pictures
    recipe: Recipe
    loss: Denoising
    quality: Quality
    sampler: Sampler
    subsets: Tensor
    seeds: int
    generated: int
    removal: Removal
    seed: int
    few: int

    @property
    def train(self) -> Data:
        """The training images."""
        return self.pictures.train

    @property
    def groups(self) -> dict[str, slice]:
        """Positions of the queries of each kind."""
        held_out = len(self.pictures.queries)
        return {
            "validation": slice(0, held_out),
            "generated": slice(held_out, held_out + self.generated),
        }

    def keys(self) -> Tensor:
        """Of the generated images."""
        return GENERATED_KEYS + torch.arange(self.generated)

    def condition(self) -> Tensor | None:
        """What generated images are of: each class in turn."""
        if "condition" not in self.train.batch(slice(0, 1)):
            return None
        return torch.arange(self.generated) % len(self.pictures.classes)

    def generate(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        """Generated images; each has start noise of its own, the same for every model."""
        keys, told = self.keys()[rows], self.condition()
        guided = Guided(model, self.loss, None if told is None else told[rows])
        start = self.sampler.start(self.loss, keys, self.pictures.shape)
        return self.sampler.sample(guided, start, keys)

    def queries(self, generated: Tensor) -> Data:
        """Images held out, then generated ones."""
        batch = self.pictures.queries.batch(slice(None))
        both = torch.cat([batch["image"], generated])
        told = self.condition()
        label = None if told is None else torch.cat([batch["condition"], told])
        return Data(images(both, label, keys=torch.cat([batch["key"], self.keys()])))

    def facts(self) -> dict[str, Any]:
        """Everything that decides the numbers."""
        return {
            "task": self.name,
            "recipe": self.recipe.fingerprint,
            "train": self.train.fingerprint,
            "queries": self.pictures.queries.fingerprint,
            "generated": self.generated,
            "sampler": str(self.sampler),
            "outcome": self.quality.name,
            "levels of the loss": list(self.loss.levels),
            "subsets": list(self.subsets.shape),
            "seeds": self.seeds,
            "removal": str(self.removal),
            "seed": self.seed,
            "forebear": version("forebear"),
        }


def subject_of(task: str, *, quick: bool, seed: int) -> Subject:
    """A subject by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if task not in SUBJECTS:
        raise unknown_name("task of the study", task, (*SUBJECTS, "concepts", "customised"))
    return SUBJECTS[task](quick, seed)


def _digits_eps(quick: bool, seed: int) -> Subject:
    many = 12 if quick else 200
    pictures = digits_diffusion.load(train=200 if quick else 1000, queries=many)
    levels, draws = (5, 1) if quick else (50, 2)
    return Subject(
        name="digits-eps",
        title="digits, a network that says the noise",
        pictures=pictures,
        recipe=digits_diffusion.recipe("epsilon", epochs=10 if quick else None),
        loss=digits_diffusion.loss("epsilon"),
        quality=Quality(
            digits_diffusion.loss("epsilon", levels=levels, draws=draws),
            f"minus the mean loss at {levels} timesteps, {draws} draws each",
        ),
        sampler=digits_diffusion.sampler("epsilon"),
        subsets=half_subsets(len(pictures.train), 8 if quick else 32),
        seeds=2,
        generated=many,
        removal=Removal(3, 3, 10, 10) if quick else Removal(20, 20, 0, 20),
        seed=seed,
        few=4 if quick else 40,
    )


def noise_bank(schedule: Continuous, count: int = 100, keep: float = 0.7) -> tuple[float, ...]:
    """The noisiest `count` scales of a grid of `count / keep`, from little noise to much."""
    return schedule.levels(int(count / keep))[-count:]


def _digits_edm(quick: bool, seed: int) -> Subject:
    many = 4 if quick else 16
    pictures = digits_diffusion.load(train=200 if quick else 1000, queries=many)
    loss = digits_diffusion.loss("x0")
    count = 10 if quick else 100
    bank = noise_bank(Continuous(digits_diffusion.DEVIATION, most=digits_diffusion.MOST), count)
    shared = Denoising(loss.schedule, "x0", levels=bank, noise="shared")
    return Subject(
        name="digits-edm",
        title="digits, a network that says the clean image",
        pictures=pictures,
        recipe=digits_diffusion.recipe("x0", epochs=10 if quick else None),
        loss=loss.at(bank[len(bank) // 20 :: max(1, len(bank) // 10)]),
        quality=Quality(shared, f"minus the mean loss over a bank of {count} noises"),
        sampler=digits_diffusion.sampler("x0"),
        subsets=half_subsets(len(pictures.train), 8 if quick else 32),
        seeds=2,
        generated=many,
        removal=Removal(3, 1, 10, 10) if quick else Removal(10, 6, 50, 50),
        seed=seed,
        few=2 if quick else 16,
    )


SOME = ("pixels", "trak", "abu", "das+abu:z")
"""Entrants whose strongest examples are removed where training is dear."""


def _fashion(quick: bool, seed: int) -> Subject:
    many = 4 if quick else 100
    pictures = fashion_diffusion.load(train=100 if quick else 1000, queries=many)
    loss = fashion_diffusion.loss()
    count = 10 if quick else 50
    bank = noise_bank(Continuous(fashion_diffusion.DEVIATION, most=fashion_diffusion.MOST), count)
    return Subject(
        name="fashion",
        title="clothes, a conditional transformer",
        pictures=pictures,
        recipe=fashion_diffusion.recipe(**({"epochs": 2} if quick else {})),
        loss=loss.at(bank[len(bank) // 20 :: max(1, len(bank) // 10)]),
        quality=Quality(loss.at(bank), f"minus the mean loss over {count} noise scales"),
        sampler=fashion_diffusion.sampler(),
        subsets=half_subsets(len(pictures.train), 4 if quick else 32),
        seeds=1 if quick else 2,
        generated=many,
        removal=Removal(2, 2, 5, 5) if quick else Removal(20, 20, 0, 20, methods=SOME),
        seed=seed,
        few=2 if quick else 10,
    )


SUBJECTS: dict[str, Callable[[bool, int], Subject]] = {
    "digits-eps": _digits_eps,
    "digits-edm": _digits_edm,
    "fashion": _fashion,
}
