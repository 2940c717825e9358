"""Conditions on columns choose the rows that numpy chooses."""

import numpy as np
import pytest

from forebear.errors import DataError, UnknownNameError
from forebear.search import ArrayRows, Between, Equals, OneOf

LABELS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
SOURCES = np.array(["web", "book", "web", "code", "book", "web", "code", "web"])
DATES = np.array([f"2024-0{i}-01" for i in range(1, 9)])
COLUMNS = {"label": LABELS, "source": SOURCES, "date": DATES}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (Equals("label", 1), LABELS == 1),
        (Equals("source", "web"), SOURCES == "web"),
        (OneOf("label", (1, 9)), (LABELS == 1) | (LABELS == 9)),
        (OneOf("source", ("book", "code")), SOURCES != "web"),
        (OneOf("source", ()), np.zeros(8, bool)),
        (Between("label", 2, 5), (LABELS >= 2) & (LABELS <= 5)),
        (Between("date", low="2024-05-01"), np.arange(8) >= 4),
        (Between("label", high=2), LABELS <= 2),
        (Equals("source", "web") & Between("label", 4), (SOURCES == "web") & (LABELS >= 4)),
        (Equals("label", 1) | Equals("label", 9), np.isin(LABELS, (1, 9))),
        (~Equals("source", "web") & ~Equals("label", 1), (SOURCES != "web") & (LABELS != 1)),
    ],
    ids=str,
)
def test_conditions_choose_the_rows_they_say(condition: object, expected: np.ndarray) -> None:
    column = COLUMNS.__getitem__
    assert condition.matches(column, slice(0, 8)).tolist() == expected.tolist()
    halves = [condition.matches(column, rows) for rows in (slice(0, 3), slice(3, 8))]
    assert np.concatenate(halves).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "condition", [Equals("label", "1"), OneOf("source", ("web", 1)), Between("date", low=2024)]
)
def test_values_of_another_kind_are_refused(condition: object) -> None:
    with pytest.raises(DataError, match="compare like with like"):
        condition.matches(COLUMNS.__getitem__, slice(0, 8))


def test_a_column_that_is_not_there_is_named() -> None:
    import torch

    with pytest.raises(UnknownNameError, match="did you mean 'source'"):
        ArrayRows(torch.ones(8, 2), columns=COLUMNS).column("sources")
