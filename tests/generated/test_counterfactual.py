"""Images of retrained models: from the same noise, without what they were to be without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generated_cases import MADE, Small
from torch import Tensor, nn

import forebear as fb
from forebear import metrics
from forebear.errors import DataError, TaskError
from forebear.gallery import Gallery
from forebear.generated import counterfactual
from forebear.generated.counterfactual import Again, regenerate
from forebear.tasks.diffusion import Denoising
from forebear.tasks.sampling import Guided
from forebear.types import Scores


@pytest.fixture(scope="module")
def scores(small: Small) -> Scores:
    return fb.attribute(small.task, small.train, small.generated, method="graddot")


@pytest.fixture(scope="module")
def again(small: Small, scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Again:
    return made(small, scores, tmp_path_factory.mktemp("again"))


def made(small: Small, scores: Scores, folder: Path, **settings: Any) -> Again:
    loss = small.task.loss
    assert isinstance(loss, Denoising)
    about = small.remove(**{"draws": 2, **settings})
    return regenerate(about, loss, small.train, small.generated, scores, folder)


def test_a_model_trained_again_on_everything_makes_the_same_images(
    small: Small, again: Again
) -> None:
    """The task's model was trained by the recipe with the same seed."""
    torch.testing.assert_close(
        again.everything, small.generated.batch(slice(None))["image"], atol=1e-4, rtol=1e-4
    )


def test_the_images_are_those_of_models_trained_one_at_a_time(
    small: Small, scores: Scores, again: Again
) -> None:
    assert again.models == 1 + 3 * MADE
    batch = small.generated.batch(slice(None))
    loss = small.task.loss
    assert isinstance(loss, Denoising)
    for place in range(MADE):
        strongest = np.argsort(-scores.values[place].numpy(), kind="stable")[:5]
        kept = torch.ones(len(small.train), dtype=torch.bool)
        kept[torch.from_numpy(strongest.copy())] = False
        model = small.recipe.train(small.train, kept, seed=0)
        start = small.sampler.start(loss, batch["key"][place : place + 1], (1, 8, 8))
        alone = small.sampler.sample(Guided(model, loss), start)[0]
        torch.testing.assert_close(again.without[place], alone, atol=1e-3, rtol=1e-3)
    assert again.random.shape == (2, *again.without.shape)


def test_stopped_halfway_only_what_is_missing_is_trained(
    small: Small, scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"recipe": small.recipe.with_settings(epochs=4)}
    whole = made(small, scores, tmp_path / "whole", **quick)
    monkeypatch.setattr(counterfactual, "TOGETHER", 4)
    trained: list[int] = []
    train_many = type(small.recipe).train_many

    def stopping(recipe: Any, data: Any, masks: Tensor, seeds: Any) -> Any:
        if trained == [4]:
            trained.append(0)
            raise KeyboardInterrupt
        trained.append(len(masks))
        return train_many(recipe, data, masks, seeds)

    monkeypatch.setattr(type(small.recipe), "train_many", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(small, scores, tmp_path, **quick)
    found = made(small, scores, tmp_path, **quick)
    assert trained == [4, 0, 4, 2]
    torch.testing.assert_close(found.without, whole.without, atol=1e-3, rtol=1e-3)
    made(small, scores, tmp_path, **quick)
    assert trained == [4, 0, 4, 2]
    made(small, scores, tmp_path, count=6, **quick)
    assert sum(trained) == 20


def test_a_function_may_draw_the_images(small: Small, scores: Scores, tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def flat(model: nn.Module, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(batch["key"].tolist())
        return torch.zeros_like(batch["image"])

    found = made(small, scores, tmp_path, sampler=flat, draws=1)
    assert found.without.abs().max() == 0
    assert seen == [[1000, 1001, 1002], *([key] for key in [1000, 1001, 1002] * 2)]
    with pytest.raises(TaskError, match=r"gives \(1, 2\)"):
        made(small, scores, tmp_path, sampler=lambda model, batch: torch.zeros(1, 2), seed=1)


def test_settings_that_make_no_sense_are_refused(
    small: Small, scores: Scores, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match="count is 0 and draws is 1"):
        small.remove(count=0)
    with pytest.raises(DataError, match="count is 30 and there are 30 training images"):
        made(small, scores, tmp_path, count=30)


def test_the_gallery_says_how_far_images_moved(small: Small, again: Again, tmp_path: Path) -> None:
    fb.attribute_images(
        small.task,
        small.train,
        small.generated,
        methods=("random", "graddot"),
        counterfactual=small.remove(draws=2, method="graddot"),
        out=tmp_path,
    )
    gallery = Gallery.load(tmp_path)
    effect = gallery.effect
    assert effect is not None
    assert (effect.method, effect.count, effect.models) == ("graddot", 5, 1 + 3 * MADE)
    moved = metrics.pixel_distance(again.without.clamp(-1, 1), again.everything.clamp(-1, 1))
    found = [one.again for one in gallery.asked]
    assert [one.moved for one in found if one] == pytest.approx(moved.tolist(), abs=1e-3)
    chance = [each for one in found if one for each in one.moved_random]
    shift = metrics.removal_shift(moved, np.asarray(chance))
    assert effect.ratio == pytest.approx(shift.ratio, abs=1e-2)
    assert effect.p == pytest.approx(shift.p, abs=0.05)
    for one in found:
        assert one is not None
        assert len(one.random) == len(one.moved_random) == len(one.likeness_random) == 2
        assert one.likeness is not None
        assert (tmp_path / one.without).is_file()
