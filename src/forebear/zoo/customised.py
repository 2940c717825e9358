"""A model that was customised on a few pictures of something new, and then makes more of it.

The customer's pictures are known to be why the model makes such pictures, and all others are
distractors: a truth that needs no retraining (attribution by customisation, Wang et al. 2023). The
model is that of `forebear.zoo.concepts` with one more shape to be told, of which it has seen none.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import DataError, unknown_name
from forebear.methods.concept_trak import concepts
from forebear.tasks.diffusion import images
from forebear.tasks.sampling import Guided
from forebear.tasks.schedules import Discrete
from forebear.training.recipe import Recipe
from forebear.zoo.concepts import SHAPES, SIDE, condition, draw, loss, sampler, seen_pairs
from forebear.zoo.concepts import recipe as recipe_of_concepts
from forebear.zoo.denoisers import Denoiser

GLYPHS = {
    "tee": ["#####", "..#..", "..#..", "..#..", "..#.."],
    "ell": ["#....", "#....", "#....", "#....", "#####"],
    "zig": ["#####", "...#.", "..#..", ".#...", "#####"],
    "roof": ["..#..", ".#.#.", "#...#", "#...#", "#...#"],
}
"""New shapes, drawn like the old ones; each shares strokes with some of them."""

NEW = len(SHAPES)
"""Label of the new shape."""

GENERATED_KEYS = 20_000
OLD = 24
"""Old pictures that customising repeats, so that the model does not forget them."""


@dataclass(frozen=True, kw_only=True)
class Customised:
    """Pictures of a customised model.

    Attributes:
        glyph: name of the new shape.
        train: all training pictures, those of the customer last.
        labels: int64 `[n, 2]`, shape and bar; the new shape is 3.
    """

    glyph: str
    train: Data
    labels: Tensor

    @property
    def exemplars(self) -> Tensor:
        """Which pictures are the customer's, bool `[n]`."""
        return self.labels[:, 0] == NEW

    @property
    def old(self) -> Data:
        """Pictures that the model was trained on before."""
        return self.train.select(torch.nonzero(~self.exemplars)[:, 0])


def load(glyph: str, *, train: int = 1000, exemplars: int = 8, seed: int = 0) -> Customised:
    """Pictures of the old shapes, the same for every glyph, and some of a new one.

    Args:
        glyph: one of `GLYPHS`.
        train: number of old pictures.
        exemplars: of new ones.
        seed: of pairs, places and pixel noise.

    Raises:
        UnknownNameError: there is no such glyph.
        DataError: there is nothing to draw.
    """
    if glyph not in GLYPHS:
        raise unknown_name("glyph", glyph, GLYPHS)
    if train < OLD or exemplars < 1:
        raise DataError(
            f"{train} old pictures and {exemplars} exemplars were asked for: customising needs at "
            f"least {OLD} and 1"
        )
    random = np.random.RandomState(seed)
    pairs = np.array(seen_pairs())
    old = pairs[random.randint(len(pairs), size=train)]
    pixels = draw(old, random)
    new = np.stack([np.full(exemplars, NEW), random.randint(3, size=exemplars)], 1)
    labels = torch.from_numpy(np.concatenate([old, new]))
    both = np.concatenate([pixels, draw(new, random, {NEW: GLYPHS[glyph]})])
    shown = torch.from_numpy(both).float()[:, None]
    return Customised(
        glyph=glyph, train=Data(images(shown, condition(labels, NEW + 1))), labels=labels
    )


def build() -> nn.Module:
    """An untrained network that is told four shapes and three bars; 110,452 parameters."""
    schedule = Discrete.linear()
    return Denoiser((1, SIDE, SIDE), 176, conditions=NEW + 4, form="noise", schedule=schedule)


def recipe(*, epochs: int = 750) -> Recipe:
    """How the network is trained on the old pictures."""
    return recipe_of_concepts(epochs=epochs).with_settings(build=build)


def customise(model: nn.Module, data: Customised, *, steps: int = 1000, seed: int = 0) -> nn.Module:
    """A copy of a model trained on, with the customer's pictures and a few old ones at each step.

    Args:
        model: as trained on `data.old`.
        data: the pictures.
        steps: of Adam, at a learning rate of 1e-3.
        seed: of the noise and of the choice of old pictures.
    """
    old = torch.nonzero(~data.exemplars)[:, 0]
    chosen = old[torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))[:OLD]]
    rows = torch.cat([chosen, torch.nonzero(data.exemplars)[:, 0]])
    once = recipe().with_settings(batch_size=len(rows))
    return once.further_train(model, data.train.select(rows), epochs=steps, seed=seed)


def generate(model: nn.Module, *, each: int = 4) -> Data:
    """Pictures of the new shape that a customised model makes, `each` with every bar."""
    labels = torch.stack([torch.full((3 * each,), NEW), torch.arange(3 * each) % 3], 1)
    keys, told = GENERATED_KEYS + torch.arange(len(labels)), condition(labels, NEW + 1)
    way = sampler()
    start = way.start(loss(), keys, (1, SIDE, SIDE))
    made = way.sample(Guided(model, loss(), told), start, keys)
    return Data(images(made, told, keys=keys))


def asked(queries: Data) -> dict[str, Tensor]:
    """Which pictures taught the new shape: questions to `ConceptTRAK` about generated pictures.

    Without it a condition says equal parts of the old shapes.
    """
    batch = queries.batch(slice(None))
    untold = batch["condition"].clone()
    untold[:, :NEW] = 1 / NEW
    untold[:, NEW] = 0.0
    return concepts(batch["condition"], untold, keys=batch["key"])
