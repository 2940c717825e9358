"""Pictures of a customised model, and that customising teaches the new shape."""

import pytest
import torch

from forebear.data import Data
from forebear.errors import DataError, UnknownNameError
from forebear.tasks.diffusion import images
from forebear.zoo import concepts, customised


def test_the_customers_pictures_come_last_and_show_the_new_shape() -> None:
    data = customised.load("tee", train=50, exemplars=5)
    assert data.exemplars.tolist() == [False] * 50 + [True] * 5
    batch = data.train.batch(slice(None))
    assert torch.equal(batch["condition"][:, 3], data.exemplars.float())
    assert torch.equal(batch["condition"][:, 4:].argmax(1), data.labels[:, 1])
    bright = (batch["image"][50:, 0, :, :7] > 0).sum((1, 2))
    assert bright.tolist() == [9] * 5  # strokes of the tee
    other = customised.load("zig", train=50, exemplars=5)
    assert torch.equal(other.train.batch(slice(0, 50))["image"], batch["image"][:50])
    assert len(data.old) == 50


def test_questions_put_old_shapes_in_place_of_the_new_one() -> None:
    labels = torch.tensor([[customised.NEW, 0], [customised.NEW, 2]])
    told = concepts.condition(labels, customised.NEW + 1)
    queries = customised.asked(Data(images(torch.zeros(2, 1, 10, 10), told)))
    assert queries["without"][0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 1, 0, 0])
    assert torch.equal(queries["without"][:, 4:], queries["condition"][:, 4:])


def test_customising_lowers_the_loss_of_the_new_shape_and_not_of_the_base() -> None:
    data = customised.load("tee", train=100)
    base = customised.recipe(epochs=30).train(data.old)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = customised.customise(base, data, steps=60)
    exemplars = data.train.select(torch.nonzero(data.exemplars)[:, 0]).batch(slice(None))
    with torch.no_grad():
        losses = [concepts.loss()(one, exemplars).mean() for one in (base, model)]
    assert losses[1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    made = customised.generate(model, each=1)
    assert made.batch(slice(None))["image"].shape == (3, 1, 10, 10)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="tee"):
        customised.load("te")
    with pytest.raises(DataError, match="at least 24 and 1"):
        customised.load("tee", train=3)
