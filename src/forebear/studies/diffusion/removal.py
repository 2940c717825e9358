"""What retrained models make of the same start noise when a method's images were removed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from forebear import metrics
from forebear.metrics.counterfactual import Shift
from forebear.studies.base import fingerprint
from forebear.studies.diffusion.models import Trained
from forebear.studies.diffusion.subjects import Subject
from forebear.studies.jobs import REMOVAL, Found, Job, TimedPieces

SEEDS = 2
"""Retrainings of every pooled removal."""

RANDOM = "random"

Compare = Callable[[Tensor, Tensor], np.ndarray]
"""How much each image of a batch `[b, c, h, w]` differs from another, `[b]`."""


@dataclass(frozen=True)
class Changes:
    """How far regenerated images are from what they were.

    Attributes:
        targets: `[m]`, of images whose examples were removed; of all seeds the mean.
        bystanders: `[b]`, of others.
        removed: number of examples removed at a time.
        overlap: mean share of examples that the lists of two targets have in common.
    """

    targets: np.ndarray
    bystanders: np.ndarray
    removed: float
    overlap: float = float("nan")


@dataclass(frozen=True)
class Removals:
    """Removals for one target at a time and for all at once.

    Attributes:
        single: changes by method, `"random"` included.
        pooled: the same, all targets' examples removed at once.
        random: of as many random examples as the pooled removal of each method.
        pictures: by method, `[3, targets + bystanders, c, h, w]`: as they were, without the
            method's images and without random ones.
    """

    single: Mapping[str, Changes]
    pooled: Mapping[str, Changes]
    random: Mapping[str, Changes]
    pictures: Mapping[str, Tensor]

    def single_shift(self, key: str) -> Shift:
        """Targets of a method against targets of random removals."""
        return metrics.removal_shift(self.single[key].targets, self.single[RANDOM].targets)

    def pooled_shift(self, key: str) -> Shift:
        """Targets of a method against those after as many random removals."""
        return metrics.removal_shift(self.pooled[key].targets, self.random[key].targets)

    def bystander_shift(self, key: str) -> Shift:
        """The same of bystanders, which should not move more."""
        return metrics.removal_shift(self.pooled[key].bystanders, self.random[key].bystanders)

    def aim(self, key: str) -> Shift:
        """What targets move beyond what random removal moves them, against bystanders.

        Images differ in how easily anything moves them, so each is held against itself first.
        """
        mine, chance = self.pooled[key], self.random[key]
        beyond = mine.targets - chance.targets
        return metrics.removal_shift(beyond, mine.bystanders - chance.bystanders)


def strongest(scores: Tensor, count: int) -> Tensor:
    """Positions `[t, count]` of the highest scores; of equal ones the earlier comes first."""
    return scores.double().argsort(dim=1, descending=True, stable=True)[:, :count]


def without(positions: Tensor, n: int) -> Tensor:
    """A mask `[n]` of everything but `positions`."""
    mask = torch.ones(n, dtype=torch.bool)
    mask[positions.flatten()] = False
    return mask


def overlap(lists: Tensor) -> float:
    """Mean share that two of the lists `[t, k]` have in common."""
    sets = [set(each.tolist()) for each in lists]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    return float(np.mean([len(a & b) / len(a) for a, b in pairs])) if pairs else float("nan")


def measures(embed: Callable[[Tensor], Tensor]) -> dict[str, Compare]:
    """Ways to compare images, by name; the first is the one that findings are about.

    Args:
        embed: gives features `[b, d]` of images.
    """

    def unlike(images: Tensor, others: Tensor) -> np.ndarray:
        return 1 - cosine_similarity(embed(images), embed(others), dim=1).double().numpy()

    return {
        "pixel distance": metrics.pixel_distance,
        "1 − SSIM": lambda images, others: 1 - metrics.ssim(images, others),
        "1 − embedding cosine": unlike,
    }


def before_jobs(trained: Trained) -> list[Job]:
    """What models trained on everything make, `[1, targets + bystanders, c, h, w]` a seed."""
    everything = torch.ones(1, len(trained.subject.train), dtype=torch.bool)
    return [_job(trained.subject, f"before-{s}", everything, s) for s in _seeds(trained.subject)]


def removal_jobs(trained: Trained, scores: Mapping[str, Tensor]) -> list[Job]:
    """All retrainings without the strongest examples of the targets.

    Args:
        trained: the model and what it made.
        scores: of generated images by method, `[g, n]`; the first are the targets.
    """
    single = [_single_job(trained, key, lists) for key, lists in _lists(trained, scores).items()]
    pooled = [
        job for key, values in scores.items() for job in _pooled_jobs(trained, key, values)[1]
    ]
    return [*single, *pooled]


def remove(
    trained: Trained, scores: Mapping[str, Tensor], pieces: TimedPieces, compare: Compare
) -> Removals:
    """Compare the images of the removals with what they were.

    Args:
        trained: the model and what it made.
        scores: as of `removal_jobs`.
        pieces: what is there is not done again.
        compare: images before and after.
    """
    about = trained.subject.removal
    single = {
        key: _one_by_one(trained, key, lists, pieces, compare)
        for key, lists in _lists(trained, scores).items()
    }
    before = torch.cat([pieces.read(job)[0]["image"] for job in before_jobs(trained)])
    pooled, random, pictures = {}, {}, {}
    for key, values in scores.items():
        lists = strongest(values[: about.targets], about.pooled)
        masks, jobs = _pooled_jobs(trained, key, values)
        made = torch.stack([pieces.read(job)[0]["image"] for job in jobs])
        pictures[key] = torch.stack([before[0], *made[0]])
        gone = int((~masks[0]).sum())
        mine, chance = (
            np.stack([compare(made[s, which], before[s]) for s in range(SEEDS)]) for which in (0, 1)
        )  # [seeds, targets + bystanders]
        pooled[key] = _split(mine, about.targets, gone, overlap(lists))
        random[key] = _split(chance, about.targets, gone)
    return Removals(single, pooled, random, pictures)


def _split(changes: np.ndarray, targets: int, gone: int, shared: float = float("nan")) -> Changes:
    """Changes `[seeds, targets + bystanders]` as those of either kind.

    Seeds are averaged: retrainings that remove the same examples are not so many more images.
    """
    mean = changes.mean(0)
    return Changes(mean[:targets], mean[targets:], gone, shared)


def _lists(trained: Trained, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Examples to remove for one target at a time, by method and at random, `[t, count]`."""
    about, n = trained.subject.removal, len(trained.subject.train)
    if not about.count:
        return {}
    lists = {key: strongest(v[: about.targets], about.count) for key, v in scores.items()}
    generator = torch.Generator().manual_seed(trained.subject.seed)
    drawn = [
        torch.randperm(n, generator=generator)[: about.count]
        for _ in range(about.targets * about.draws)
    ]
    return {**lists, RANDOM: torch.stack(drawn)}


def _single_job(trained: Trained, key: str, lists: Tensor) -> Job:
    """Images `[t, targets + bystanders, c, h, w]` without each of the lists."""
    subject = trained.subject
    masks = torch.stack([without(each, len(subject.train)) for each in lists])
    # The same images in another order are the same removal.
    name = f"removed-{key.replace(':', '-')}-{fingerprint(lists.sort(1).values.tolist())}"
    return _job(subject, name, masks, subject.seed)


def _one_by_one(
    trained: Trained, key: str, lists: Tensor, pieces: TimedPieces, compare: Compare
) -> Changes:
    first = trained.subject.removal.targets
    made = pieces.read(_single_job(trained, key, lists))[0]["image"]
    before = trained.generated[: made.shape[1]]
    own = torch.arange(len(made)) % first
    targets = compare(made[torch.arange(len(made)), own], before[own])
    others = [compare(each[first:], before[first:]) for each in made]
    return Changes(targets, np.concatenate(others), lists.shape[1])


def _pooled_jobs(trained: Trained, key: str, scores: Tensor) -> tuple[Tensor, list[Job]]:
    """What is kept without all lists of a method and without as many at random, `[2, n]`.

    And how the images `[2, targets + bystanders, c, h, w]` of each seed are made.
    """
    subject, about = trained.subject, trained.subject.removal
    lists = strongest(scores[: about.targets], about.pooled)
    mine = without(lists, len(subject.train))
    generator = torch.Generator().manual_seed(subject.seed + 1)
    gone = torch.randperm(len(mine), generator=generator)[: int((~mine).sum())]
    masks = torch.stack([mine, without(gone, len(mine))])
    name = f"pooled-{key.replace(':', '-')}-{fingerprint(masks.int().tolist())}"
    return masks, [_job(subject, f"{name}-{seed}", masks, seed) for seed in _seeds(subject)]


def _seeds(subject: Subject) -> range:
    return range(subject.seed, subject.seed + SEEDS)


def _job(subject: Subject, name: str, masks: Tensor, seed: int) -> Job:
    return Job(REMOVAL, name, partial(_made_again, subject, masks, seed))


def _made_again(subject: Subject, masks: Tensor, seed: int) -> Found:
    """Targets and bystanders from their own start noise, by a model trained on each mask."""
    models = subject.recipe.train_many(subject.train, masks, seed)
    some = slice(0, subject.removal.targets + subject.removal.bystanders)
    images = [subject.generate(model, some) for model in models.models()]
    return {"image": torch.stack(images)}, {}
