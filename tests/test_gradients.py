import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import written_out

from forebear import gradients
from forebear.blocks import Block
from forebear.gradients import (
    QuerySide,
    add_products,
    materialise,
    prefers_matrix,
    query_side,
    rows_of,
    squared_norms,
)
from forebear.layers import Factors


def block(rows: int, cols: int) -> Block:
    return Block("block", rows, cols, ("weight",), (torch.Size((rows, cols)),))


def draw_terms(kinds: str, examples: int, rows: int, cols: int, t: int) -> list[Factors]:
    """Terms of float (`f`) and one-hot (`i`) kind."""
    made: list[Factors] = []
    for kind in kinds:
        left = (
            torch.randn(examples, t, rows).double()
            if kind == "f"
            else torch.randint(0, rows, (examples, t))
        )
        made.append(Factors(left, torch.randn(examples, t, cols).double()))
    return made


def dense(terms: list[Factors], rows: int) -> torch.Tensor:
    return sum(written_out(left, right, rows) for left, right in terms)  # type: ignore[return-value]


def forced(terms: list[Factors], block: Block, matrix: bool) -> QuerySide:
    """The query's half by one route, whatever is cheaper."""
    return QuerySide(matrix=materialise(terms, block)) if matrix else QuerySide(terms)


kinds = st.sampled_from(["f", "i", "fi", "if", "ff"])
sizes = st.tuples(*[st.integers(1, 4)] * 5)
positions = st.integers(0, 3)


@settings(max_examples=25, deadline=None)
@given(kind=kinds, sizes=sizes, t=positions)
def test_materialise_and_squared_norms(kind: str, sizes: tuple[int, ...], t: int) -> None:
    b, _, rows, cols, _ = sizes
    terms = draw_terms(kind, b, rows, cols, t)
    expected = dense(terms, rows)
    torch.testing.assert_close(materialise(terms, block(rows, cols)), expected)
    torch.testing.assert_close(
        squared_norms(terms, block(rows, cols)), expected.square().sum((1, 2))
    )


@settings(max_examples=10, deadline=None)
@given(kind=kinds, t=st.integers(1, 3))
def test_squared_norms_by_both_routes(kind: str, t: int) -> None:
    for rows, cols in ((2, 2), (40, 50)):  # written out; by Gram matrices
        terms = draw_terms(kind, 3, rows, cols, t)
        expected = dense(terms, rows).square().sum((1, 2))
        torch.testing.assert_close(squared_norms(terms, block(rows, cols)), expected)


@settings(max_examples=40, deadline=None)
@given(one=kinds, other=kinds, sizes=sizes, tq=positions, tb=positions, matrix=st.booleans())
def test_products(
    one: str, other: str, sizes: tuple[int, ...], tq: int, tb: int, matrix: bool
) -> None:
    q, b, rows, cols, _ = sizes
    queries = draw_terms(one, q, rows, cols, tq)
    train = draw_terms(other, b, rows, cols, tb)
    side = forced(queries, block(rows, cols), matrix)
    out = torch.ones(q, b).double()  # products are added to what is there
    add_products(out, side, train, block(rows, cols))
    expected = torch.einsum("qrc,brc->qb", dense(queries, rows), dense(train, rows))
    torch.testing.assert_close(out - 1, expected)


@pytest.mark.parametrize("t", [1, 9])
def test_the_chosen_route_gives_the_same_products(t: int) -> None:
    rows, cols = 5, 4
    queries = draw_terms("f", 6, rows, cols, t)
    train = draw_terms("f", 7, rows, cols, t)
    side = query_side(queries, block(rows, cols))
    assert (side.matrix is not None) == prefers_matrix(block(rows, cols), t, 6)
    out = torch.zeros(6, 7).double()
    add_products(out, side, train, block(rows, cols))
    expected = torch.einsum("qrc,brc->qb", dense(queries, rows), dense(train, rows))
    torch.testing.assert_close(out, expected)


def test_many_positions_in_a_small_block_are_written_out_and_few_are_not() -> None:
    assert prefers_matrix(block(8, 9), positions=64, queries=100)
    assert not prefers_matrix(block(512, 785), positions=1, queries=100)


@pytest.mark.parametrize("matrix", [False, True])
def test_a_small_workspace_changes_nothing(matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "WORKSPACE", 16)
    rows, cols = 3, 4
    queries, train = draw_terms("fi", 5, rows, cols, 3), draw_terms("if", 7, rows, cols, 2)
    side = forced(queries, block(rows, cols), matrix)
    out = torch.zeros(5, 7).double()
    add_products(out, side, train, block(rows, cols))
    torch.testing.assert_close(
        out, torch.einsum("qrc,brc->qb", dense(queries, rows), dense(train, rows))
    )
    torch.testing.assert_close(
        squared_norms(train, block(rows, cols)), dense(train, rows).square().sum((1, 2))
    )


def test_a_column_whose_right_factor_is_not_one() -> None:
    # A linear layer with one input and no bias has one column too.
    queries, train = draw_terms("f", 3, 4, 1, 1), draw_terms("f", 5, 4, 1, 1)
    out = torch.zeros(3, 5).double()
    add_products(out, query_side(queries, block(4, 1)), train, block(4, 1))
    torch.testing.assert_close(out, torch.einsum("qrc,brc->qb", dense(queries, 4), dense(train, 4)))


def test_rows_of_takes_examples() -> None:
    terms = draw_terms("fi", 5, 3, 4, 2)
    torch.testing.assert_close(dense(rows_of(terms, slice(1, 3)), 3), dense(terms, 3)[1:3])


def test_sum_by_row_finds_the_rows_that_are_not_zero() -> None:
    (term,) = draw_terms("i", 4, 6, 3, 5)
    example, row, gradient = gradients.sum_by_row([term], 6)
    found = torch.zeros(4, 6, 3).double()
    found[example, row] = gradient
    torch.testing.assert_close(found, dense([term], 6))
    assert len({*zip(example.tolist(), row.tolist(), strict=True)}) == len(example)


def test_no_terms_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="block 'block' has no gradient"):
        materialise([], block(2, 2))
