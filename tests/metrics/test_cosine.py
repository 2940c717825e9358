import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.stats import pearsonr, spearmanr

from forebear.errors import DataError, NonFiniteError, NumericalWarning, UnknownNameError
from forebear.metrics import cosine_similarity, split_half_reliability


def pair(q: int = 4, m: int = 9) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(q, m))
    return scores, scores + generator.normal(size=(q, m))


def test_it_is_the_cosine_of_each_query() -> None:
    scores, gold = pair()
    expected = [1 - cosine(s, g) for s, g in zip(scores, gold, strict=True)]
    np.testing.assert_allclose(cosine_similarity(scores, torch.as_tensor(gold)), expected)


def test_centred_it_is_pearsons_correlation() -> None:
    scores, gold = pair()
    expected = [pearsonr(s, g).statistic for s, g in zip(scores, gold, strict=True)]
    np.testing.assert_allclose(cosine_similarity(scores + 5, gold - 3, center=True), expected)
    assert (cosine_similarity(scores + 5, gold) < cosine_similarity(scores, gold)).any()


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e200])
def test_tiny_and_huge_vectors_have_their_cosine(scale: float) -> None:
    scores, gold = pair()
    np.testing.assert_allclose(
        cosine_similarity(scores, gold * scale), cosine_similarity(scores, gold), rtol=1e-12
    )


def test_a_zero_vector_has_none_and_is_counted() -> None:
    scores, gold = pair()
    gold[2] = 0
    with pytest.warns(NumericalWarning, match="1 of 4 queries"):
        values = cosine_similarity(scores, gold)
    assert np.isnan(values).tolist() == [False, False, True, False]
    scores[1] = 0.1
    with pytest.warns(NumericalWarning, match="2 of 4 queries"):
        cosine_similarity(scores, gold, center=True)


def test_bad_arrays_are_refused() -> None:
    scores, gold = pair()
    with pytest.raises(DataError, match="gold has shape"):
        cosine_similarity(scores, gold[:, :3])
    gold[0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=r"gold\[0, 0\]"):
        cosine_similarity(scores, gold)


@pytest.mark.parametrize("kind", ["cosine", "pearson", "spearman"])
def test_reliability_of_two_seeds_is_their_agreement_stepped_up(kind: str) -> None:
    one, other = pair(1, 9)
    agreement = {
        "cosine": lambda a, b: 1 - cosine(a, b),
        "pearson": lambda a, b: pearsonr(a, b).statistic,
        "spearman": lambda a, b: spearmanr(a, b).statistic,
    }[kind](one[0], other[0])
    found = split_half_reliability(np.stack([one, other]), kind)
    np.testing.assert_allclose(found, [2 * agreement / (1 + agreement)])


@pytest.mark.parametrize("seeds", [4, 5, 9])
def test_reliability_foresees_how_far_two_means_agree(seeds: int) -> None:
    """Known signal and noise: the correlation of two independent means of as many seeds."""
    generator = np.random.default_rng(1)
    signal = generator.normal(size=4000)
    noise = 2.0
    values = signal + noise * generator.normal(size=(seeds, 4000))
    expected = 1 / (1 + noise**2 / seeds)
    assert split_half_reliability(values, "pearson") == pytest.approx(expected, abs=0.03)


def test_reliability_keeps_the_other_axes_and_needs_two_seeds() -> None:
    values = np.random.default_rng(0).normal(size=(3, 2, 5, 8))
    values[:, 1, 4] = 0
    found = split_half_reliability(values)
    assert found.shape == (2, 5)
    assert np.isnan(found[1, 4])
    assert np.isnan(found).sum() == 1
    with pytest.raises(DataError, match="two seeds"):
        split_half_reliability(values[:1])
    with pytest.raises(UnknownNameError, match="did you mean 'spearman'"):
        split_half_reliability(values, "spearmen")  # type: ignore[arg-type]
