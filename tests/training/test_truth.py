from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forebear.descriptions import describe
from forebear.errors import DataError, FormatError, MismatchError, NonFiniteError, TaskError
from forebear.task import state_hash
from forebear.tasks import losses
from forebear.tasks.diffusion import images
from forebear.training import (
    GroundTruth,
    Recipe,
    half_subsets,
    leave_one_out_subsets,
    removal_outcomes,
    truth,
)
from forebear.types import Provenance, Scores
from forebear.zoo.denoisers import Denoiser


def build() -> nn.Module:
    return nn.Linear(2, 2)


RECIPE = Recipe(build, losses.cross_entropy, learning_rate=0.3, epochs=4, batch_size=8)


def points(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


TRAIN, QUERIES = points(), points(5, seed=1)
SUBSETS = half_subsets(24, 6)


def collect(**changes) -> GroundTruth:
    settings = {"recipe": RECIPE, "train": TRAIN, "queries": QUERIES, "subsets": SUBSETS, **changes}
    return GroundTruth.collect(**settings)


def test_outcomes_are_those_of_models_trained_one_by_one() -> None:
    found = collect(seeds=[3, 7])
    assert found.outcomes.shape == (2, 6, 5)
    for s, seed in enumerate((3, 7)):
        for i, mask in enumerate(SUBSETS):
            expected = -losses.cross_entropy(RECIPE.train(TRAIN, mask, seed), QUERIES).detach()
            torch.testing.assert_close(found.outcomes[s, i], expected)
        full = -losses.cross_entropy(RECIPE.train(TRAIN, seed=seed), QUERIES).detach()
        torch.testing.assert_close(found.full[s], full)
    torch.testing.assert_close(found.mean_outcomes, found.outcomes.mean(0))


def test_a_callable_may_stand_for_a_recipe() -> None:
    calls = []

    def train(subset: Tensor, seed: int) -> nn.Module:
        calls.append((int(subset.sum()), seed))
        return RECIPE.train(TRAIN, subset, seed)

    found = collect(recipe=train, loss=losses.cross_entropy, seeds=1)
    assert calls == [(12, 0)] * 6 + [(24, 0)]
    torch.testing.assert_close(found.outcomes, collect(seeds=1).outcomes)
    with pytest.raises(TaskError, match="pass loss= or measure="):
        collect(recipe=train)


def test_leave_one_out_effects_are_positive_for_examples_that_helped() -> None:
    found = collect(subsets=leave_one_out_subsets(24, [5, 2]), seeds=1)
    assert found.kind == "leave_one_out"
    assert found.left_out.tolist() == [5, 2]
    torch.testing.assert_close(found.removal_effects, (found.full - found.outcomes[0]).T)
    assert found.removal_effects.shape == (5, 2)
    with pytest.raises(DataError, match="more than one"):
        _ = collect(seeds=1).left_out
    with pytest.raises(DataError, match="full=True"):
        _ = collect(seeds=1, full=False).removal_effects


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    found = collect(model=RECIPE.train(TRAIN))
    found.save(tmp_path)
    back = GroundTruth.load(tmp_path)
    for name in GroundTruth.__dataclass_fields__:
        mine, theirs = getattr(found, name), getattr(back, name)
        same = torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
        assert same, name
    assert back.recipe_hash == RECIPE.fingerprint
    assert back.recipe["epochs"] == 4
    content = (tmp_path / "truth.safetensors").read_bytes()
    (tmp_path / "truth.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match="damaged"):
        GroundTruth.load(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        GroundTruth.load(tmp_path / "elsewhere")


def test_a_second_run_does_only_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(truth, "PIECE", 4)
    trained: list[int] = []
    train_many = Recipe.train_many

    def counted(self: Recipe, data, subsets, seeds):
        trained.append(len(subsets))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train_many(self, data, subsets, seeds)

    monkeypatch.setattr(Recipe, "train_many", counted)
    with pytest.raises(KeyboardInterrupt):
        collect(folder=tmp_path)
    assert trained == [4, 4, 4]
    found = collect(folder=tmp_path)
    assert trained[3:] == [4, 2]  # 2 seeds × (6 subsets + everything) = 14, of which 8 were there
    collect(folder=tmp_path)
    assert len(trained) == 5
    torch.testing.assert_close(found.outcomes, collect().outcomes)
    assert not list(tmp_path.glob("*.partial"))


CHANGES = {
    "train": {"train": points(24, seed=2)},
    "queries": {"queries": points(5, seed=3)},
    "recipe": {"recipe": RECIPE.with_settings(weight_decay=0.1)},
    "recipe_hash": {"recipe": RECIPE.with_settings(build=lambda: nn.Linear(2, 2, bias=False))},
    "subsets": {"subsets": half_subsets(24, 6, seed=1)},
    "seeds": {"seeds": 3},
    "full": {"full": False},
    "measure": {"measure": lambda model, batch: model(batch[0])[:, 0]},
    "model": {"model": build()},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_of_other_work_is_refused(name: str, tmp_path: Path) -> None:
    collect(folder=tmp_path)
    said = "recipe" if name == "recipe_hash" else name  # the settings name `build` already
    with pytest.raises(MismatchError, match=f"^{said} differs"):
        collect(folder=tmp_path, **CHANGES[name])


def test_scores_of_other_data_or_another_model_are_refused() -> None:
    model = RECIPE.train(TRAIN)
    found = collect(seeds=1, model=model)
    provenance = Provenance(
        method="x",
        train=found.train,
        queries=found.queries,
        model=state_hash(model.state_dict()),
    )
    scores = Scores(
        values=torch.zeros(5, 24),
        query_ids=np.arange(5),
        train_ids=np.arange(24),
        provenance=provenance,
    )
    found.require_match(scores)
    for name in ("train", "queries", "model"):
        with pytest.raises(MismatchError, match=f"^{name} differs"):
            found.require_match(scores.with_provenance(**{name: "other"}))
    replace(found, model="").require_match(scores.with_provenance(model="other"))


def test_bad_truth_is_refused() -> None:
    with pytest.raises(DataError, match="all different"):
        collect(seeds=[1, 1])
    with pytest.raises(DataError, match="all different"):
        collect(seeds=0)
    with pytest.raises(NonFiniteError, match="query 0 is NaN"):
        collect(measure=lambda model, batch: model(batch[0])[:, 0] * float("nan"))


def test_removing_what_an_example_owes_lowers_its_measurement() -> None:
    # Queries of class one owe to examples of class one: a score known without any method.
    queries = (QUERIES[0][QUERIES[1] == 1], QUERIES[1][QUERIES[1] == 1])
    scores = (TRAIN[1] == 1).float()[None].repeat(len(queries[0]), 1)
    found = removal_outcomes(RECIPE, TRAIN, queries, scores, fractions=(0.1, 0.4), seeds=2, draws=3)
    assert found.highest.shape == found.lowest.shape == found.random.shape == (2, len(queries[0]))
    assert (found.highest[1] < found.random[1]).all()
    assert (found.random[1] < found.lowest[1]).all()
    np.testing.assert_allclose(found.fractions, [2 / 24, 10 / 24])


def test_removal_outcomes_are_real_retrainings() -> None:
    scores = torch.arange(24.0).repeat(5, 1)
    found = removal_outcomes(RECIPE, TRAIN, QUERIES, scores, fractions=(0.25,), seeds=[4])
    for rows, outcome in (
        (slice(0, 18), found.highest[0]),
        (slice(6, 24), found.lowest[0]),
        (slice(0, 24), found.full),
    ):
        model = RECIPE.train(TRAIN, subset=list(range(24))[rows], seed=4)
        expected = -losses.cross_entropy(model, QUERIES).detach().numpy()
        np.testing.assert_allclose(outcome, expected, rtol=1e-5)
    with pytest.raises(DataError, match="remove none or all"):
        removal_outcomes(RECIPE, TRAIN, QUERIES, scores, fractions=(0.001,))
    with pytest.raises(DataError, match=r"\[query, train\]"):
        removal_outcomes(RECIPE, TRAIN, QUERIES, scores.T)


def test_a_folder_belongs_to_a_loss_and_a_measurement(tmp_path: Path) -> None:
    def scaled(weight: float) -> Any:
        return lambda model, batch: weight * losses.cross_entropy(model, batch)

    kept = collect(seeds=1, folder=tmp_path)
    assert torch.equal(collect(seeds=1, folder=tmp_path).outcomes, kept.outcomes)
    assert kept.measured == {"minus": describe(RECIPE.loss)}
    with pytest.raises(MismatchError, match="measure differs"):
        collect(seeds=1, folder=tmp_path, measure=scaled(1.0))
    again = tmp_path / "again"
    collect(seeds=1, folder=again, measure=scaled(1.0))
    with pytest.raises(MismatchError, match=r"measured differs: .*1\.0.*2\.0"):
        collect(seeds=1, folder=again, measure=scaled(2.0))


def test_a_folder_belongs_to_what_a_network_was_trained_to_say(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = images(torch.rand(6, 1, 2, 2, generator=generator) * 2 - 1)

    def collected(prediction: Any) -> GroundTruth:
        recipe = Recipe(
            lambda: Denoiser((1, 2, 2), 4),
            losses.Denoising(prediction=prediction).training(),
            learning_rate=0.01,
            epochs=1,
            batch_size=6,
        )
        half = torch.arange(6)[None] < 3
        asked = losses.Denoising(levels=2)
        return GroundTruth.collect(
            recipe, data, data, subsets=half, seeds=1, measure=asked, full=False, folder=tmp_path
        )

    collected("epsilon")
    collected("epsilon")
    with pytest.raises(MismatchError, match=r"recipe differs: .*'epsilon'.*'v'"):
        collected("v")
