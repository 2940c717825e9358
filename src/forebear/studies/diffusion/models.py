"""The models of the study: the one that is asked, and those retrained on halves of the images."""

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.studies.diffusion.subjects import Subject
from forebear.studies.jobs import TRAINING, TRUTH, Found, Job, TimedPieces
from forebear.training import GroundTruth

TOGETHER = 8
"""Networks that are retrained together: what an interruption can cost."""


@dataclass(frozen=True)
class Trained:
    """What is trained once and used by everything else.

    Attributes:
        subject: what it is made on.
        model: trained on all images.
        generated: images it made, `[g, c, h, w]`.
        queries: images held out, then generated ones.
    """

    subject: Subject
    model: nn.Module
    generated: Tensor
    queries: Data


def train(subject: Subject, pieces: TimedPieces) -> Trained:
    """Train the model and draw its images, or read what is there."""
    model = subject.recipe.build()
    model.load_state_dict(pieces.read(Job(TRAINING, "model", partial(_full, subject)))[0])
    model.eval()
    drawn = Job(TRAINING, "generated", partial(_drawn, subject, model))
    made = pieces.read(drawn)[0]["image"]
    return Trained(subject, model, made, subject.queries(made))


def truth_jobs(subject: Subject, queries: Data) -> list[Job]:
    """Retraining on halves of the images, some of them at a time, one seed after the other."""
    firsts = range(0, len(subject.subsets), TOGETHER)
    return [
        Job(TRUTH, f"truth-{seed}-{first:03d}", partial(_outcomes, subject, queries, seed, masks))
        for seed in range(subject.seeds)
        for first, masks in zip(firsts, subject.subsets.split(TOGETHER), strict=True)
    ]


def ground_truth(subject: Subject, queries: Data, pieces: TimedPieces) -> GroundTruth:
    """What networks retrained on halves measure."""
    outcomes = [pieces.read(job)[0]["outcomes"] for job in truth_jobs(subject, queries)]
    return GroundTruth(
        subsets=subject.subsets,
        outcomes=torch.cat(outcomes).unflatten(0, (subject.seeds, -1)),
        seeds=tuple(range(subject.seeds)),
        train=subject.train.fingerprint,
        queries=queries.fingerprint,
        measure=subject.quality.name,
        recipe=subject.recipe.settings,
        recipe_hash=subject.recipe.fingerprint,
    )


def _full(subject: Subject) -> Found:
    return dict(subject.recipe.train(subject.train, seed=subject.seed).state_dict()), {}


def _drawn(subject: Subject, model: nn.Module) -> Found:
    return {"image": subject.generate(model)}, {}


def _outcomes(subject: Subject, queries: Data, seed: int, masks: Tensor) -> Found:
    """`[m, q]` under the networks of some halves."""
    with warnings.catch_warnings(), torch.no_grad():
        some = GroundTruth.collect(
            subject.recipe,
            subject.train,
            queries,
            subsets=masks,
            seeds=(seed,),
            measure=subject.quality,
            full=False,
        )
    return {"outcomes": some.outcomes[0]}, {}
