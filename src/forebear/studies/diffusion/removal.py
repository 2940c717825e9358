"""What retrained models make of the same start noise when a method's images were removed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from forebear import metrics
from forebear.metrics.counterfactual import Shift
from forebear.studies.base import fingerprint
from forebear.studies.diffusion.models import Trained
from forebear.studies.diffusion.subjects import Subject
from forebear.studies.diffusion.timing import REMOVAL, TimedPieces

SEEDS = 2
"""Retrainings of every pooled removal."""

RANDOM = "random"

Compare = Callable[[Tensor, Tensor], np.ndarray]
"""How much each image of a batch `[b, c, h, w]` differs from another, `[b]`."""


@dataclass(frozen=True)
class Changes:
    """How far regenerated images are from what they were.

    Attributes:
        targets: `[m]`, of images whose examples were removed.
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


def remove(
    trained: Trained, scores: Mapping[str, Tensor], pieces: TimedPieces, compare: Compare
) -> Removals:
    """Retrain without the strongest examples of the targets, and make all images again.

    Args:
        trained: the model and what it made.
        scores: of generated images by method, `[g, n]`; the first are the targets.
        pieces: what is there is not done again.
        compare: images before and after.
    """
    about = trained.subject.removal
    single = {}
    if about.count:
        for key, lists in _lists(trained, scores, about.count).items():
            single[key] = _one_by_one(trained, key, lists, pieces, compare)
    pooled, random, pictures = {}, {}, {}
    for key, values in scores.items():
        lists = strongest(values[: about.targets], about.pooled)
        masks = _pooled_masks(lists, len(trained.subject.train), trained.subject.seed)
        before, made = _all_at_once(trained, key, masks, pieces)
        pictures[key] = torch.stack([before[0], *made[0]])
        gone = int((~masks[0]).sum())
        mine, chance = (
            np.stack([compare(made[s, which], before[s]) for s in range(SEEDS)]) for which in (0, 1)
        )  # [seeds, targets + bystanders]
        pooled[key] = _split(mine, about.targets, gone, overlap(lists))
        random[key] = _split(chance, about.targets, gone)
    return Removals(single, pooled, random, pictures)


def _split(changes: np.ndarray, targets: int, gone: int, shared: float = float("nan")) -> Changes:
    """Changes `[seeds, targets + bystanders]` as those of either kind."""
    return Changes(changes[:, :targets].ravel(), changes[:, targets:].ravel(), gone, shared)


def _lists(trained: Trained, scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Examples to remove for each target, by method and at random, `[t, count]`."""
    about, n = trained.subject.removal, len(trained.subject.train)
    lists = {key: strongest(v[: about.targets], count) for key, v in scores.items()}
    generator = torch.Generator().manual_seed(trained.subject.seed)
    drawn = [
        torch.randperm(n, generator=generator)[:count] for _ in range(about.targets * about.draws)
    ]
    return {**lists, RANDOM: torch.stack(drawn)}


def _one_by_one(
    trained: Trained, key: str, lists: Tensor, pieces: TimedPieces, compare: Compare
) -> Changes:
    subject, about = trained.subject, trained.subject.removal
    n, first = len(subject.train), about.targets

    def make() -> dict[str, Tensor]:
        masks = torch.stack([without(each, n) for each in lists])
        models = subject.recipe.train_many(subject.train, masks, subject.seed)
        made = torch.stack([_again(subject, model) for model in models.models()])
        return {"image": made}

    # The same images in another order are the same removal.
    name = f"removed-{key}-{fingerprint(lists.sort(1).values.tolist())}"
    made = pieces.timed(REMOVAL, name, make)[0]["image"]  # [t, targets + bystanders, c, h, w]
    before = trained.generated[: made.shape[1]]
    own = torch.arange(len(made)) % first
    targets = compare(made[torch.arange(len(made)), own], before[own])
    others = [compare(each[first:], before[first:]) for each in made]
    return Changes(targets, np.concatenate(others), lists.shape[1])


def _pooled_masks(lists: Tensor, n: int, seed: int) -> Tensor:
    """Everything but the union of the lists, and everything but as many at random, `[2, n]`."""
    mine = without(lists, n)
    generator = torch.Generator().manual_seed(seed + 1)
    gone = torch.randperm(n, generator=generator)[: int((~mine).sum())]
    return torch.stack([mine, without(gone, n)])


def _all_at_once(
    trained: Trained, key: str, masks: Tensor, pieces: TimedPieces
) -> tuple[Tensor, Tensor]:
    """Images before `[seeds, g, c, h, w]`, and after, `[seeds, 2, g, c, h, w]`.

    The two are those of the method and of random removals; g are the targets, then bystanders.
    """
    subject = trained.subject
    seeds = range(subject.seed, subject.seed + SEEDS)
    before = _before(trained, seeds, pieces)

    def make() -> dict[str, Tensor]:
        pairs = [(mask, seed) for seed in seeds for mask in masks]
        models = subject.recipe.train_many(
            subject.train, torch.stack([mask for mask, _ in pairs]), [seed for _, seed in pairs]
        )
        made = torch.stack([_again(subject, model) for model in models.models()])
        return {"image": made.unflatten(0, (SEEDS, 2))}

    digest = fingerprint(masks.int().tolist())
    return before, pieces.timed(REMOVAL, f"pooled-{key}-{digest}", make)[0]["image"]


def _before(trained: Trained, seeds: Sequence[int], pieces: TimedPieces) -> Tensor:
    """What models trained on everything make, `[seeds, targets + bystanders, c, h, w]`."""
    subject = trained.subject

    def make() -> dict[str, Tensor]:
        everything = torch.ones(len(seeds), len(subject.train), dtype=torch.bool)
        models = subject.recipe.train_many(subject.train, everything, list(seeds))
        return {"image": torch.stack([_again(subject, model) for model in models.models()])}

    return pieces.timed(REMOVAL, "before", make)[0]["image"]


def _again(subject: Subject, model: torch.nn.Module) -> Tensor:
    """Targets and bystanders from their own start noise."""
    about = subject.removal
    return subject.generate(model, slice(0, about.targets + about.bystanders))
