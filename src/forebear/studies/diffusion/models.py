"""The models of the study: the one that is asked, and those retrained on halves of the images."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.studies.base import Pieces
from forebear.studies.diffusion.subjects import Subject
from forebear.training import GroundTruth


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


def train(subject: Subject, pieces: Pieces) -> Trained:
    """Train the model, draw its images and collect the ground truth, or read what is there."""
    recipe, data = subject.recipe, subject.train

    def full() -> dict[str, Tensor]:
        return dict(recipe.train(data, seed=subject.seed).state_dict())

    model = recipe.build()
    model.load_state_dict(pieces.tensors("model", full))
    model.eval()
    made = pieces.tensors("generated", lambda: {"image": subject.generate(model)})
    queries = subject.queries(made["image"])
    return Trained(subject, model, made["image"], queries, _truth(subject, queries, pieces.folder))


def _truth(subject: Subject, queries: Data, folder: Path) -> GroundTruth:
    with warnings.catch_warnings(), torch.no_grad():
        return GroundTruth.collect(
            subject.recipe,
            subject.train,
            queries,
            subsets=subject.subsets,
            seeds=subject.seeds,
            measure=subject.quality,
            full=False,
            folder=folder / "truth",
        )
