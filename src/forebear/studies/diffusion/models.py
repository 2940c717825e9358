"""The models of the study: the one that is asked, and those retrained on halves of the images."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.studies.diffusion.subjects import Subject
from forebear.studies.diffusion.timing import TRAINING, TRUTH, TimedPieces
from forebear.training import GroundTruth

TOGETHER = 16
"""Networks that are retrained together: what an interruption can cost."""


@dataclass(frozen=True)
class Trained:
    """What is trained once and used by everything else.

    Attributes:
        subject: what it is made on.
        model: trained on all images.
        generated: images it made, `[g, c, h, w]`.
        queries: images held out, then generated ones.
        truth: what retrained models measure.
    """

    subject: Subject
    model: nn.Module
    generated: Tensor
    queries: Data
    truth: GroundTruth


def train(subject: Subject, pieces: TimedPieces) -> Trained:
    """Train the model, draw its images and collect the ground truth, or read what is there."""
    recipe, data = subject.recipe, subject.train

    def full() -> dict[str, Tensor]:
        return dict(recipe.train(data, seed=subject.seed).state_dict())

    model = recipe.build()
    model.load_state_dict(pieces.timed(TRAINING, "model", full)[0])
    model.eval()
    made, _ = pieces.timed(TRAINING, "generated", lambda: {"image": subject.generate(model)})
    queries = subject.queries(made["image"])
    return Trained(subject, model, made["image"], queries, _truth(subject, queries, pieces))


def _truth(subject: Subject, queries: Data, pieces: TimedPieces) -> GroundTruth:
    """What networks retrained on halves measure, some of them at a time."""
    firsts = range(0, len(subject.subsets), TOGETHER)
    outcomes = [
        torch.cat([_outcomes(subject, queries, pieces, seed, first) for first in firsts])
        for seed in range(subject.seeds)
    ]
    return GroundTruth(
        subsets=subject.subsets,
        outcomes=torch.stack(outcomes),
        seeds=tuple(range(subject.seeds)),
        train=subject.train.fingerprint,
        queries=queries.fingerprint,
        measure=subject.quality.name,
        recipe=subject.recipe.settings,
        recipe_hash=subject.recipe.fingerprint,
    )


def _outcomes(
    subject: Subject, queries: Data, pieces: TimedPieces, seed: int, first: int
) -> Tensor:
    """`[m, q]` under the networks of the halves from `first` on."""

    def make() -> dict[str, Tensor]:
        with warnings.catch_warnings(), torch.no_grad():
            some = GroundTruth.collect(
                subject.recipe,
                subject.train,
                queries,
                subsets=subject.subsets[first : first + TOGETHER],
                seeds=(seed,),
                measure=subject.quality,
                full=False,
            )
        return {"outcomes": some.outcomes[0]}

    return pieces.timed(TRUTH, f"truth-{seed}-{first:03d}", make)[0]["outcomes"]
