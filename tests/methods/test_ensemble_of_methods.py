"""Several methods' scores as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor

import forebear as fb
from forebear.types import UNSIGNED, Provenance, Scores


def zscore(rows: np.ndarray) -> np.ndarray:
    return np.stack([(row - np.mean(row)) / np.std(row) for row in rows])


def made(values: Tensor, method: str = "one", **facts: Any) -> Scores:
    about = Provenance(method=method, **{"train": "t", "queries": "q", "model": "m", **facts})
    queries, n = values.shape
    return Scores(
        values=values, query_ids=np.arange(queries), train_ids=np.arange(n), provenance=about
    )


@pytest.fixture
def two() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 20, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_z_scores_are_averaged(two: tuple[Tensor, Tensor]) -> None:
    found = fb.combine([made(two[0]), made(two[1])], weights=[3, 1]).values
    expected = 0.75 * zscore(two[0].numpy()) + 0.25 * zscore(two[1].numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_ranks_are_averaged(two: tuple[Tensor, Tensor]) -> None:
    found = fb.combine([made(two[0].round()), made(two[1])], how="rank").values
    ranks = [zscore(rankdata(v.numpy(), axis=1)) for v in (two[0].round(), two[1])]
    np.testing.assert_allclose(found.numpy(), (ranks[0] + ranks[1]) / 2, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", ["z", "rank"])
def test_scale_and_offset_of_members_play_no_part(two: tuple[Tensor, Tensor], how: Any) -> None:
    plain = fb.combine([made(two[0]), made(two[1])], how=how).values
    moved = fb.combine([made(1e4 * two[0] - 7), made(two[1] / 300 + 2)], how=how).values
    torch.testing.assert_close(plain, moved, rtol=1e-9, atol=1e-12)


def test_a_member_that_says_nothing_warns_and_has_no_part(two: tuple[Tensor, Tensor]) -> None:
    silent = made(torch.full((3, 20), 0.1, dtype=torch.float64), "silent")
    with pytest.warns(fb.errors.NumericalWarning, match="silent gives all examples the same"):
        found = fb.combine([made(two[0]), silent]).values
    np.testing.assert_allclose(found.numpy(), zscore(two[0].numpy()) / 2, rtol=1e-10)


def test_it_says_what_it_is_made_of(two: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    other = made(two[1], "two", settings={"damping": 0.1}, coverage=0.5)
    found = fb.combine([made(two[0], coverage=1.0), other])
    about = found.provenance
    assert (about.method, about.units, about.model) == ("combine", "ranking", "m")
    assert about.coverage == 0.5
    assert [part["method"] for part in about.settings["members"]] == ["one", "two"]
    assert about.settings["members"][1]["settings"] == {"damping": 0.1}
    found.save(tmp_path)
    assert Scores.load(tmp_path).provenance == about
    with_squares = fb.combine([made(two[0]), made(two[1], sign=UNSIGNED)])
    with pytest.raises(fb.errors.TaskError, match="squares its scores"):
        with_squares.top(3, opponents=True)


def test_members_must_be_about_the_same(two: tuple[Tensor, Tensor]) -> None:
    one, other = made(two[0]), made(two[1], "other")
    with pytest.raises(fb.errors.MismatchError, match="another training set"):
        fb.combine([one, other.with_provenance(train="else")])
    with pytest.raises(fb.errors.MismatchError, match="another set of queries"):
        fb.combine([one, other.with_provenance(queries="else")])
    with pytest.raises(fb.errors.MismatchError, match="train_ids of one and other differ"):
        fb.combine([one, made(two[1][:, :9], "other")])
    with pytest.raises(fb.errors.MismatchError, match="query_ids of one and other differ"):
        fb.combine([one, made(two[1][:2], "other")])
    # Methods without a model, or with another one, may be members.
    assert fb.combine([one, other.with_provenance(model="")]).provenance.model == "m"
    assert fb.combine([one, other.with_provenance(model="else")]).provenance.model == ""


def test_bad_input_is_refused(two: tuple[Tensor, Tensor]) -> None:
    pair = [made(two[0]), made(two[1])]
    with pytest.raises(fb.errors.DataError, match="combine two or more"):
        fb.combine(pair[:1])
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'rank'"):
        fb.combine(pair, how="ranks")  # type: ignore[arg-type]
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(fb.errors.DataError, match="weights"):
            fb.combine(pair, weights=weights)
