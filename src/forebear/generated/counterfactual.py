"""The same start noise in models that were retrained without an image's strongest examples."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.descriptions import describe
from forebear.errors import DataError, TaskError
from forebear.executors import Pieces
from forebear.methods.settings import settings_of
from forebear.progress import track
from forebear.tasks.diffusion import Denoising
from forebear.tasks.sampling import Guided, Sampler
from forebear.training.recipe import Recipe
from forebear.types import Scores

Generate = Callable[[nn.Module, Any], Tensor]
"""`generate(model, batch)`: images `[b, ...]` of the start noise and conditions of queries."""

TOGETHER = 16
"""Models trained at a time, and kept together."""


@dataclass(frozen=True)
class Counterfactual:
    """Retraining without the strongest training images of each generated image.

    Attributes:
        recipe: how the model was trained.
        sampler: how images are drawn: a `Sampler`, which begins with the noise of each image's key
            and keeps its condition; or a function `(model, batch) -> images`, for guidance and
            everything else, where the batch is that of the generated images.
        method: whose list decides, by name; the first when None.
        count: training images removed for each generated image.
        draws: random sets of as many that each is compared with.
        seed: of training, the same for all models, and of the random sets.
    """

    recipe: Recipe
    sampler: Sampler | Generate
    method: str | None = None
    count: int = 50
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.draws < 1:
            raise TaskError(
                f"count is {self.count} and draws is {self.draws}: both must be at least 1"
            )

    def generate(self, model: nn.Module, loss: Denoising, batch: Any) -> Tensor:
        """Images of a model from the start noise of the batch's keys."""
        if not isinstance(self.sampler, Sampler):
            with torch.no_grad():
                return self.sampler(model, batch)
        shape = tuple(batch["image"].shape[1:])
        start = self.sampler.start(loss, batch["key"], shape).to(batch["image"])
        guided = Guided(model, loss, batch.get("condition"))
        return self.sampler.sample(guided, start, batch["key"])

    def facts(self) -> dict[str, Any]:
        """What decides the images, beside data, the task's loss and what is removed."""
        return {
            "recipe": self.recipe.fingerprint,
            "sampler": settings_of(self.sampler),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Again:
    """What retrained models made.

    Attributes:
        everything: `[q, ...]`, trained on all images.
        without: `[q, ...]`, without the strongest of each.
        random: `[draws, q, ...]`, without as many random ones.
        models: how many were trained.
    """

    everything: Tensor
    without: Tensor
    random: Tensor
    models: int


def regenerate(
    about: Counterfactual, loss: Denoising, train: Data, queries: Data, scores: Scores, folder: Path
) -> Again:
    """Retrain and make the images again; what is in the folder is not done twice.

    Args:
        about: what is removed, and how models are trained.
        loss: of the task.
        train: the training images.
        queries: the generated images.
        scores: of the method that decides.
        folder: keeps images, a file for each group of models in a folder of its own.

    Raises:
        DataError: as many images are removed as there are.
    """
    if about.count >= len(train):
        raise DataError(
            f"count is {about.count} and there are {len(train)} training images: remove fewer"
        )
    masks, owners = _masks(about, scores)
    batch = queries.batch(slice(None))
    facts = _facts(about, train, queries, masks) | {"loss": describe(loss)}
    pieces = Pieces(folder / digest(facts), facts, "images of retrained models")
    groups = range(0, len(masks), TOGETHER)
    made: list[Tensor] = []
    for start in track(groups, f"retraining {len(masks)} models"):
        rows = slice(start, start + TOGETHER)
        name = f"models-{start:04d}"
        kept = pieces.read(name)
        if kept is None:
            images = list(_made(about, loss, train, batch, masks[rows], owners[rows]))
            kept = {f"{i:04d}": image.contiguous() for i, image in enumerate(images)}
            pieces.write(name, kept)
        made += [kept[key] for key in sorted(kept)]
    one = torch.cat(made[1:]).unflatten(0, (1 + about.draws, len(queries)))
    return Again(made[0], one[0], one[1:], len(masks))


def digest(facts: dict[str, Any]) -> str:
    """A short name for facts, the same in every process."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _masks(about: Counterfactual, scores: Scores) -> tuple[Tensor, list[int | None]]:
    """What each model is trained on, bool `[m, n]`, and which query it is asked for; all if None.

    The first is trained on everything; then one a query without its strongest, then random ones.
    """
    count, (q, n) = about.count, scores.values.shape
    strongest = scores.values.double().argsort(dim=1, descending=True, stable=True)[:, :count]
    generator = torch.Generator().manual_seed(about.seed)
    drawn = [torch.randperm(n, generator=generator)[:count] for _ in range(q * about.draws)]
    masks = torch.ones(1 + q * (1 + about.draws), n, dtype=torch.bool)
    for mask, gone in zip(masks[1:], [*strongest, *drawn], strict=True):
        mask[gone] = False
    return masks, [None, *(list(range(q)) * (1 + about.draws))]


def _made(
    about: Counterfactual,
    loss: Denoising,
    train: Data,
    batch: dict[str, Tensor],
    masks: Tensor,
    owners: list[int | None],
) -> Iterator[Tensor]:
    """Images of models trained on subsets, of their own query only where there is one."""
    models = about.recipe.train_many(train, masks, about.seed).models()
    for model, owner in zip(models, owners, strict=True):
        rows = slice(None) if owner is None else slice(owner, owner + 1)
        asked = {name: column[rows] for name, column in batch.items()}
        images = about.generate(model, loss, asked)
        if images.shape != asked["image"].shape:
            raise TaskError(
                f"the sampler of the counterfactual gives {tuple(images.shape)} and the generated "
                f"images are {tuple(asked['image'].shape)}: make them in the same way"
            )
        yield images.cpu()


def _facts(about: Counterfactual, train: Data, queries: Data, masks: Tensor) -> dict[str, Any]:
    removed = hashlib.sha256(masks.numpy().tobytes()).hexdigest()[:16]
    return {
        **about.facts(),
        "train": train.fingerprint,
        "queries": queries.fingerprint,
        "removed": removed,
    }
