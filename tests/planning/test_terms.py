"""Samples are taken on the side of each border where the whole is."""

import pytest

import forebear as fb
from forebear.curvature import operator
from forebear.planning.terms import PASSES, SCALED, Facts, smallest_sample, terms_of

SMALL = Facts(examples=100_000, queries=10, parameters=1_000, outputs=9)
LARGE = Facts(examples=100_000, queries=10, parameters=500_000, outputs=9)


def test_an_exact_gauss_newton_matrix_is_sampled_as_a_matrix() -> None:
    method = fb.get("exact", curvature="gauss_newton")
    assert smallest_sample(method, SMALL) == 112  # 9 rows an example, 1,000 parameters
    assert terms_of("exact", method, SMALL) == PASSES
    few = Facts(examples=100, queries=10, parameters=1_000, outputs=9)
    assert smallest_sample(method, few) == 1
    assert "n3" in terms_of("exact", method, few)


def test_a_hessian_has_one_form() -> None:
    assert smallest_sample(fb.get("exact"), SMALL) == 1


@pytest.mark.parametrize("name", ["cg", "lissa", "arnoldi"])
def test_solvers_are_sampled_where_rows_do_not_fit(name: str) -> None:
    n = smallest_sample(fb.get(name), LARGE)
    held = LARGE.itemsize * LARGE.outputs * LARGE.parameters
    assert held * n > operator.KEPT_BYTES >= held * (n - 1)


def test_methods_of_gradients_are_sampled_at_any_size() -> None:
    assert smallest_sample(fb.get("ekfac"), LARGE) == smallest_sample(fb.get("trak"), LARGE) == 1


def test_limits_that_are_shared_exist() -> None:
    from importlib import import_module

    assert all(getattr(import_module(module), name) > 0 for module, name in SCALED.items())
