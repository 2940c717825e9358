import numpy as np
import pytest
import torch

from forebear.errors import DataError
from forebear.training import half_subsets, leave_group_out, leave_one_out_subsets
from forebear.training.subsets import subset_mask, subset_masks


def test_half_subsets_have_one_size_differ_and_follow_the_seed() -> None:
    masks = half_subsets(11, 30, fraction=0.4, seed=3)
    assert masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [4] * 30
    assert len({tuple(row) for row in masks.tolist()}) == 30
    assert torch.equal(masks, half_subsets(11, 30, fraction=0.4, seed=3))
    assert not torch.equal(masks, half_subsets(11, 30, fraction=0.4, seed=4))


def test_each_example_is_in_a_half_of_many_subsets() -> None:
    share = half_subsets(20, 2000).float().mean(0)
    assert share.sub(0.5).abs().max() < 0.06  # five standard deviations


def test_all_subsets_are_found_and_one_more_is_refused() -> None:
    assert len(half_subsets(4, 6)) == 6
    with pytest.raises(DataError, match="only 6 distinct"):
        half_subsets(4, 7)


def test_paired_subsets_are_complements() -> None:
    masks = half_subsets(10, 8, paired=True)
    assert torch.equal(masks[0::2], ~masks[1::2])
    assert len({tuple(row) for row in masks.tolist()}) == 8


@pytest.mark.parametrize(
    ("n", "count", "options", "message"),
    [
        (10, 0, {}, "count is 0"),
        (10, 3, {"fraction": 1.0}, "fraction 1.0 of 10 examples is 10"),
        (10, 3, {"paired": True}, "even count"),
        (9, 4, {"paired": True}, "exactly half"),
    ],
)
def test_half_subsets_refuse(n, count, options, message) -> None:
    with pytest.raises(DataError, match=message):
        half_subsets(n, count, **options)


def test_leave_one_out_lacks_each_row_once() -> None:
    masks = leave_one_out_subsets(5, [3, 0])
    assert masks.tolist() == [[True, True, True, False, True], [False, True, True, True, True]]


def test_leave_group_out_lacks_each_group() -> None:
    assert (~leave_group_out(4, [[0, 1], [3]])).int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no group"),
        ([[]], "non-empty"),
        ([[0, 4]], "position 4 is out of range"),
        ([[-1]], "position -1"),
        ([[1, 1]], "position 1 stands more than once"),
        ([[0], [0, 1, 2, 3]], "group 1 removes all 4"),
    ],
)
def test_leave_group_out_refuses(groups, message) -> None:
    with pytest.raises(DataError, match=message):
        leave_group_out(4, groups)


def test_left_out_rows_must_be_different() -> None:
    with pytest.raises(DataError, match="position 2 stands more than once"):
        leave_one_out_subsets(5, np.array([2, 2]))


def test_a_subset_is_a_mask_positions_or_everything() -> None:
    assert subset_mask(None, 3).tolist() == [True] * 3
    assert subset_mask(np.array([2, 0]), 3).tolist() == [True, False, True]
    assert subset_mask([True, False, True], 3).tolist() == [True, False, True]
    with pytest.raises(DataError, match=r"shape \(2,\) for 3"):
        subset_mask([True, False], 3)
    with pytest.raises(DataError, match="empty"):
        subset_mask([False] * 3, 3)


def test_subsets_must_be_masks() -> None:
    assert subset_masks(np.eye(3, dtype=bool), 3).shape == (3, 3)
    with pytest.raises(DataError, match="boolean masks"):
        subset_masks(np.eye(3, dtype=int), 3)
    with pytest.raises(DataError, match="subset 1 is empty"):
        subset_masks([[True, False], [False, False]], 2)
