"""Retrieval metrics against scikit-learn and against sums written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from forebear.errors import DataError, NonFiniteError
from forebear.metrics import map_at, mrr, precision_at, recall_at


def case(seed: int = 0, q: int = 5, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(q, n))
    relevant = generator.random((q, n)) < 0.2
    relevant[:, 0] = True
    return scores, relevant


def test_average_precision_is_that_of_scikit_learn() -> None:
    scores, relevant = case()
    expected = [average_precision_score(r, s) for s, r in zip(scores, relevant, strict=True)]
    np.testing.assert_allclose(map_at(torch.as_tensor(scores), relevant), expected, atol=1e-12)


@given(seed=st.integers(0, 1000), k=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_shares_of_the_first_k(seed: int, k: int) -> None:
    scores, relevant = case(seed)
    for row, (one, marks) in enumerate(zip(scores, relevant, strict=True)):
        first = sorted(range(40), key=lambda i: -one[i])[:k]
        found = sum(marks[i] for i in first)
        assert precision_at(scores, relevant, k)[row] == pytest.approx(found / k)
        assert recall_at(scores, relevant, k)[row] == pytest.approx(found / min(k, marks.sum()))
        places = [
            place + 1
            for place, i in enumerate(sorted(range(40), key=lambda i: -one[i]))
            if marks[i]
        ]
        assert mrr(scores, relevant)[row] == pytest.approx(1 / places[0])


def test_one_set_of_right_examples_serves_all_queries() -> None:
    scores, relevant = case()
    same = np.broadcast_to(relevant[0], scores.shape)
    np.testing.assert_array_equal(map_at(scores, relevant[0]), map_at(scores, same))


def test_a_perfect_order_has_one_and_ties_fall_to_the_earlier_example() -> None:
    _, relevant = case()
    for k in (1, 3, 40):
        assert (recall_at(relevant.astype(float), relevant, k) == 1).all()
        assert (map_at(relevant.astype(float), relevant, k) == 1).all()
    assert precision_at(np.zeros((1, 4)), [True, False, False, False], 1)[0] == 1


def test_queries_without_a_right_example() -> None:
    scores, relevant = case()
    relevant[2] = False
    assert np.isnan(map_at(scores, relevant)[2])
    assert np.isnan(recall_at(scores, relevant, 3)[2])
    assert mrr(scores, relevant)[2] == 0
    assert precision_at(scores, relevant, 3)[2] == 0


def test_wrong_input_is_named() -> None:
    scores, relevant = case()
    with pytest.raises(DataError, match="k is 41 and there are 40"):
        precision_at(scores, relevant, 41)
    with pytest.raises(DataError, match="relevant has shape"):
        map_at(scores, relevant[:, :3])
    with pytest.raises(DataError, match="relevant must be boolean"):
        map_at(scores, np.arange(40))
    scores[1, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"scores\[1, 2\]"):
        mrr(scores, relevant)
