"""Scores and top-k lists: what they refuse, and what is on disk."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from forebear.errors import DataError, FormatError, MismatchError
from forebear.types import Provenance, Scores, TopK, read_json, write_json

VALUES = torch.tensor([[0.5, -1.0, 2.0, 0.5], [3.0, 0.25, -4.0, 3.0]])


def scores(**changes: object) -> Scores:
    settings = {
        "values": VALUES,
        "query_ids": np.asarray(["p", "q"]),
        "train_ids": np.asarray([10, 11, 12, 13]),
        "provenance": Provenance(
            method="ekfac", settings={"damping": 0.1}, units="removal", coverage=0.5, seed=3
        ),
    }
    return Scores(**settings | changes)  # type: ignore[arg-type]


def test_top_is_strongest_first_and_ties_fall_to_the_earlier_example() -> None:
    top = scores().top(3)
    assert top.ids.tolist() == [[12, 10, 13], [10, 13, 11]]
    assert top.values.tolist() == [[2.0, 0.5, 0.5], [3.0, 3.0, 0.25]]
    assert not top.opponents
    opponents = scores().top(2, opponents=True)
    assert opponents.ids.tolist() == [[11, 10], [12, 11]]
    assert opponents.values.tolist() == [[-1.0, 0.5], [-4.0, 0.25]]
    assert opponents.provenance == scores().provenance


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_must_fit(k: int) -> None:
    with pytest.raises(DataError, match=f"k is {k} and there are 4 training examples"):
        scores().top(k)


def test_the_matrix_must_be_query_by_train() -> None:
    with pytest.raises(DataError, match=r"orientation is \[query, train\]"):
        scores(values=VALUES.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_read_back_as_they_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = scores(values=VALUES.to(dtype))
    saved.save(tmp_path / "new" / "folder")
    loaded = Scores.load(tmp_path / "new" / "folder")
    assert loaded.values.dtype == dtype
    assert torch.equal(loaded.values, saved.values)
    assert loaded.query_ids.tolist() == ["p", "q"]
    assert loaded.train_ids.tolist() == [10, 11, 12, 13]
    assert loaded.provenance == saved.provenance
    assert (loaded.top(2).ids == saved.top(2).ids).all()


def test_a_transposed_view_is_saved_as_what_it_shows(tmp_path: Path) -> None:
    scores(values=VALUES.T.contiguous().T).save(tmp_path)
    assert torch.equal(Scores.load(tmp_path).values, VALUES)


def test_parquet_has_one_row_a_query_and_rank(tmp_path: Path) -> None:
    scores().top(2).to_parquet(tmp_path / "top.parquet")
    table = pq.read_table(tmp_path / "top.parquet")
    assert table.to_pylist() == [
        {"query": "p", "rank": 1, "example": 12, "score": 2.0},
        {"query": "p", "rank": 2, "example": 10, "score": 0.5},
        {"query": "q", "rank": 1, "example": 10, "score": 3.0},
        {"query": "q", "rank": 2, "example": 13, "score": 3.0},
    ]


def test_missing_damaged_and_newer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"scores\.json does not exist"):
        Scores.load(tmp_path)
    scores().save(tmp_path)
    about, matrix = tmp_path / "scores.json", tmp_path / "scores.safetensors"
    whole = matrix.read_bytes()
    matrix.write_bytes(whole[:20])
    with pytest.raises(FormatError, match=r"scores\.safetensors is damaged"):
        Scores.load(tmp_path)
    matrix.unlink()
    with pytest.raises(FormatError, match=r"scores\.safetensors"):
        Scores.load(tmp_path)
    matrix.write_bytes(whole)
    facts = json.loads(about.read_text())
    about.write_text(json.dumps({key: facts[key] for key in ("format", "provenance")}))
    with pytest.raises(FormatError, match=r"scores\.json is damaged.*query_ids"):
        Scores.load(tmp_path)
    about.write_text(json.dumps(facts | {"provenance": {"unheard_of": 1}}))
    with pytest.raises(FormatError, match=r"scores\.json is damaged"):
        Scores.load(tmp_path)
    about.write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(FormatError, match=r"has format 99 .* up to 1: upgrade forebear"):
        Scores.load(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b'{"format": "new"}'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")


def test_json_is_written_whole_with_its_format(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"format": 1, "x": [1, 2.5, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError):  # what cannot be written leaves the old file alone
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json")["x"] == [1, 2.5, None]


def test_provenance_names_what_differs() -> None:
    one, other = Provenance(method="a", train="x"), Provenance(method="b", train="y")
    one.require_same(one.__class__(method="b", train="x"), ("train", "queries"))
    with pytest.raises(
        MismatchError, match=r"train differs: 'x' against 'y'.*another training set"
    ):
        one.require_same(other, ("queries", "train"))
    with pytest.raises(MismatchError, match="method differs"):
        one.require_same(other, ("method",))


def test_a_representation_says_what_the_scores_are() -> None:
    assert repr(scores()) == "Scores(ekfac: 2 queries × 4 examples, removal units, coverage 50%)"
    plain = scores().with_provenance(coverage=None, units="ranking")
    assert repr(plain) == "Scores(ekfac: 2 queries × 4 examples, ranking units)"
    assert torch.equal(plain.values, VALUES)


def test_top_lists_are_values() -> None:
    top = scores().top(1)
    with pytest.raises(AttributeError):
        top.opponents = True  # type: ignore[misc]
    assert isinstance(top, TopK)
