import importlib

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import auc, roc_auc_score

from forebear import metrics
from forebear.errors import DataError, NonFiniteError, NumericalWarning, UnknownNameError


def lds_case(
    queries: int = 5, n: int = 30, m: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(queries, n))
    subsets = rng.random((m, n)) < 0.5
    outcomes = subsets @ scores.T + 3 * rng.normal(size=(m, queries))
    return scores, subsets, outcomes


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_row_of_the_table_leads_to_a_function_of_that_name(name: str) -> None:
    module = metrics.METRICS[name].partition(":")[0]
    assert getattr(metrics, name).__name__ == name
    importlib.import_module(module)
    assert callable(getattr(metrics, name))  # importing the file must not hide the function


def test_lds_equals_scipy_query_by_query() -> None:
    scores, subsets, outcomes = lds_case()
    expected = []
    for q in range(len(scores)):
        sums = [scores[q][subset].sum() for subset in subsets]
        expected.append(spearmanr(sums, outcomes[:, q]).statistic)
    assert metrics.lds(scores, subsets, outcomes) == pytest.approx(expected, abs=1e-12)


def test_lds_with_ties_equals_scipy() -> None:
    scores, subsets, outcomes = lds_case()
    scores, outcomes = np.round(scores), np.round(outcomes / 4)
    expected = [
        spearmanr(subsets @ scores[q], outcomes[:, q]).statistic for q in range(len(scores))
    ]
    assert metrics.lds(scores, subsets, outcomes) == pytest.approx(expected, abs=1e-12)


def test_perfect_scores_have_lds_one_and_their_negatives_minus_one() -> None:
    scores, subsets, _ = lds_case()
    outcomes = np.exp(subsets @ scores.T / 5)  # any rising function of the sum
    assert metrics.lds(scores, subsets, outcomes) == pytest.approx(np.ones(5))
    assert metrics.lds(-scores, subsets, outcomes) == pytest.approx(-np.ones(5))


def test_an_offset_of_the_scores_changes_no_lds_when_subsets_have_one_size() -> None:
    scores, _, _ = lds_case()
    rng = np.random.default_rng(2)
    subsets = np.stack([rng.permutation(30) < 15 for _ in range(40)])
    outcomes = subsets @ scores.T + rng.normal(size=(40, 5))
    shifted = metrics.lds(scores + 1e9, subsets, outcomes)
    assert shifted == pytest.approx(metrics.lds(scores, subsets, outcomes), abs=1e-3)


def test_lds_takes_torch_and_numpy_alike() -> None:
    scores, subsets, outcomes = lds_case()
    tensors = [torch.from_numpy(array) for array in (scores, subsets, outcomes)]
    np.testing.assert_array_equal(
        metrics.lds(*tensors), metrics.lds(scores, subsets.astype(int), outcomes)
    )


def test_a_constant_query_is_nan_and_counted() -> None:
    scores, subsets, outcomes = lds_case()
    outcomes[:, 2] = 0.1
    scores[4] = 0
    with pytest.warns(NumericalWarning, match="2 of 5 queries have no LDS"):
        values = metrics.lds(scores, subsets, outcomes)
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, False, True])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, u, o: (s.T, u, o), DataError, r"subsets has shape \(40, 30\)"),
        (lambda s, u, o: (s, u, o.T), DataError, r"outcomes has shape \(5, 40\)"),
        (lambda s, u, o: (s, 2 * u, o), DataError, "boolean"),
        (lambda s, u, o: (s, u[:2], o[:2]), DataError, "2 subsets"),
        (lambda s, u, o: (s * np.nan, u, o), NonFiniteError, r"scores\[0, 0\]"),
    ],
)
def test_lds_refuses(change, error, message) -> None:
    with pytest.raises(error, match=message):
        metrics.lds(*change(*lds_case()))


@pytest.mark.parametrize(("kind", "oracle"), [("pearson", pearsonr), ("spearman", spearmanr)])
def test_loo_correlation_equals_scipy_and_has_the_sign_of_removal(kind, oracle) -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(4, 20)) * 1e-9  # tiny effects are common
    without = 0.7 - scores.T + 1e-9 * rng.normal(size=(20, 4))
    values = metrics.loo_correlation(scores, outcomes_without=without, kind=kind)
    expected = [oracle(scores[q], 0.7 - without[:, q]).statistic for q in range(4)]
    assert values == pytest.approx(expected, abs=1e-6)
    assert (values > 0).all()
    effects = metrics.loo_correlation(scores, effects=0.7 - without.T, kind=kind)
    assert effects == pytest.approx(values, abs=1e-6)


def test_loo_correlation_refuses() -> None:
    scores = np.eye(3)
    with pytest.raises(DataError, match="either"):
        metrics.loo_correlation(scores)
    with pytest.raises(UnknownNameError, match="did you mean 'spearman'"):
        metrics.loo_correlation(scores, effects=scores, kind="spearmen")


@pytest.mark.parametrize("ties", [False, True])
def test_mislabel_auc_equals_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(4)
    flipped = rng.random(200) < 0.1
    suspicion = rng.normal(size=200) + flipped
    suspicion = np.round(suspicion) if ties else suspicion
    expected = roc_auc_score(flipped, suspicion)
    assert metrics.mislabel_auc(suspicion, flipped) == pytest.approx(expected, abs=1e-12)


def test_found_in_first_counts_ties_at_the_cut_by_chance() -> None:
    suspicion = [5, 4, 3, 3, 3, 1, 0, 0, 0, 0]
    flipped = [True, False, True, False, False, True, False, False, False, False]
    assert metrics.found_in_first(suspicion, flipped, 0.2) == pytest.approx(1 / 3)
    assert metrics.found_in_first(suspicion, flipped, 0.3) == pytest.approx((1 + 1 / 3) / 3)
    assert metrics.found_in_first(suspicion, flipped, 0.5) == pytest.approx(2 / 3)
    assert metrics.found_in_first(suspicion, flipped, 1.0) == 1


@pytest.mark.parametrize(("flipped", "message"), [([0, 0, 0], "no label"), ([1, 1, 1], "every")])
def test_mislabel_auc_needs_both_kinds_of_label(flipped, message) -> None:
    with pytest.raises(DataError, match=message):
        metrics.mislabel_auc([1.0, 2.0, 3.0], flipped)


def test_removal_curve_is_the_drop_beyond_random_over_the_mean_measurement() -> None:
    removed = np.array([[-1.5, -2.0], [-3.0, -2.0]])
    random = np.array([[-1.0, -2.0], [-1.0, -2.0]])
    result = metrics.removal_curve([0.1, 0.3], removed, random, [-0.5, -1.5])
    np.testing.assert_allclose(result.curve, [[0, 0], [0.5, 0], [2, 0]])
    np.testing.assert_allclose(result.area, [auc([0, 0.1, 0.3], [0, 0.5, 2]) / 0.3, 0])
    with pytest.raises(DataError, match="rise"):
        metrics.removal_curve([0.3, 0.1], removed, random, [-0.5, -1.5])


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_noise_ceiling_is_the_correlation_with_the_expected_outcome(seeds: int) -> None:
    rng = np.random.default_rng(5)
    expected = rng.normal(size=(1, 4000, 6))
    noise = rng.normal(size=(seeds, 4000, 6)) * 1.5
    outcomes = expected + noise
    found = metrics.noise_ceiling(outcomes)
    truth = [spearmanr(expected[0, :, q], outcomes.mean(0)[:, q]).statistic for q in range(6)]
    np.testing.assert_allclose(found.ceiling, truth, atol=0.04)


def test_agreement_of_two_seeds_is_their_rank_correlation() -> None:
    outcomes = np.random.default_rng(6).normal(size=(2, 50, 3)) + np.arange(50)[None, :, None] / 20
    found = metrics.noise_ceiling(outcomes)
    r = np.array([spearmanr(outcomes[0, :, q], outcomes[1, :, q]).statistic for q in range(3)])
    np.testing.assert_allclose(found.agreement, r)
    np.testing.assert_allclose(found.ceiling, np.sqrt(2 * r / (1 + r)))


def test_agreement_of_four_seeds_averages_the_three_splits_into_pairs() -> None:
    outcomes = np.random.default_rng(7).normal(size=(4, 30, 1))
    splits = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    each = [
        spearmanr(outcomes[list(a)].mean(0)[:, 0], outcomes[list(b)].mean(0)[:, 0]).statistic
        for a, b in splits
    ]
    assert metrics.noise_ceiling(outcomes).agreement[0] == pytest.approx(np.mean(each))


def test_retrainings_that_contradict_each_other_have_ceiling_zero() -> None:
    column = np.arange(10.0)
    outcomes = np.stack([column, -column])[:, :, None]
    found = metrics.noise_ceiling(outcomes)
    assert found.agreement[0] == pytest.approx(-1)
    assert found.ceiling[0] == 0


def test_one_seed_has_no_noise_ceiling() -> None:
    with pytest.raises(DataError, match="1 seeds"):
        metrics.noise_ceiling(np.zeros((1, 10, 2)))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    hits = 0
    for seed in range(200):
        low, high = metrics.bootstrap_interval(rng.exponential(size=100), resamples=300, seed=seed)
        hits += low <= 1 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_values() -> None:
    values = np.random.default_rng(9).normal(3, 2, size=2000)
    low, high = metrics.bootstrap_interval(values, level=0.9)
    half = 1.645 * values.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)


def test_bootstrap_interval_leaves_out_nan_and_says_so() -> None:
    values = np.random.default_rng(10).normal(size=20)
    with pytest.warns(NumericalWarning, match="2 of 22"):
        interval = metrics.bootstrap_interval([*values, np.nan, np.nan])
    assert interval == metrics.bootstrap_interval(values)


@pytest.mark.filterwarnings("ignore::forebear.errors.NumericalWarning")
def test_there_is_no_interval_of_nothing() -> None:
    with pytest.raises(DataError, match="no value"):
        metrics.bootstrap_interval([np.nan])
