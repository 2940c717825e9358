"""Which training pictures taught a model one thing in a picture: its shape, or where its bar is.

    forebear attribute examples/generated_shapes.py -m das -m nda --out runs/shapes

Each picture shows a shape and a bright bar; no training picture shows a ring together with a bar at
the top, and yet the model makes one. About two minutes on two cores; the page is
runs/shapes/report.html.
"""

from functools import cache

import torch
from torch import nn

import forebear as fb
from forebear.methods.concept_trak import concepts as queries_of
from forebear.tasks.diffusion import images
from forebear.tasks.sampling import Guided
from forebear.zoo import concepts as zoo

PICTURES = zoo.load()
ASKED = torch.tensor([(0, 0), (0, 1), (1, 0), (2, 2)])  # shape and bar; training has no (0, 0)
KEYS = 20_000 + torch.arange(len(ASKED))
LOSS = zoo.loss()


@cache
def model() -> nn.Module:
    return zoo.recipe().train(PICTURES.train, seed=0)


def task() -> fb.Task:
    return fb.Task(model(), LOSS)


def train() -> fb.Data:
    return PICTURES.train


def queries() -> dict[str, torch.Tensor]:
    told = zoo.condition(ASKED)
    start = zoo.sampler().start(LOSS, KEYS, (1, zoo.SIDE, zoo.SIDE))
    return images(zoo.sampler().sample(Guided(model(), LOSS, told), start), told, keys=KEYS)


def concepts() -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
    """A question for each picture: what it says of its shape, and of its bar."""
    shapes = tuple(f"a {zoo.SHAPES[shape]}" for shape in ASKED[:, 0].tolist())
    bars = tuple(f"a {zoo.BARS[bar]} bar" for bar in ASKED[:, 1].tolist())
    return {
        names: queries_of(zoo.condition(ASKED), zoo.without(ASKED, concept), keys=KEYS)
        for concept, names in enumerate((shapes, bars))
    }


def examples() -> dict[str, dict[int, str]]:
    def words(labels: torch.Tensor) -> dict[int, str]:
        named = [(zoo.SHAPES[shape], zoo.BARS[bar]) for shape, bar in labels.tolist()]
        return {i: f"{shape}, bar {bar}" for i, (shape, bar) in enumerate(named)}

    return {"train": words(PICTURES.labels), "queries": words(ASKED)}
