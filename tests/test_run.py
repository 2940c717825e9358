"""The run folder: what is written is read back, and damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from forebear.errors import FormatError, UnknownNameError
from forebear.run import (
    DatasetFacts,
    Interval,
    MethodResult,
    ModelFacts,
    Removal,
    Run,
    TruthFacts,
    read_data,
    read_ids,
    read_self_influence,
    read_texts,
    read_top,
    scores_folder,
    self_influence_path,
    top_path,
)
from forebear.types import Provenance, Scores

FULL = Run(
    kind="demo",
    title="A title",
    created="2026-01-02T03:04:05",
    version="0.1.0",
    seconds=1.5,
    dataset=DatasetFacts(name="d", train=5, queries=2, classes=["a", "b"], image_shape=[2, 2]),
    model=ModelFacts(description="m", parameters=3, train_accuracy=1.0),
    plain_pass_seconds=0.25,
    truth=TruthFacts(
        subsets=4,
        seeds=2,
        fraction=0.5,
        agreement=0.5,
        ceiling=Interval(mean=0.7, low=0.6, high=0.8),
    ),
    methods=[
        MethodResult(name="ekfac", label="EK-FAC", settings={"damping": 0.1, "layers": ["a"]}),
        MethodResult(name="random", label="Random", lds=Interval(mean=0.0, low=-0.1, high=0.1)),
    ],
    removal=Removal(fractions=[0.0, 0.1], curves={"ekfac": [1.0, -2.0]}, measurement="minus loss"),
    best="ekfac",
    environment={"torch": "2", "threads": 1},
)


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = FULL.save(tmp_path / "new" / "folder")
    assert Run.load(path.parent) == FULL
    assert json.loads(path.read_text())["format"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_absent_parts_are_none(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 1, "kind": "attribute", "unheard_of": 3}')
    run = Run.load(tmp_path)
    assert run == Run(kind="attribute")
    assert run.best_method is None


def test_the_best_method_is_the_named_one_or_the_first() -> None:
    assert FULL.best_method == FULL.methods[0]
    named = Run(kind="demo", methods=FULL.methods, best="random").best_method
    assert named is FULL.methods[1]
    with pytest.raises(UnknownNameError, match="did you mean 'ekfac'"):
        FULL.method("ekfak")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[1]", "holds a list"),
        ('{"format": 2, "kind": "demo"}', "upgrade forebear"),
        ('{"format": 1}', "lacks .*kind"),
        ('{"kind": 3}', "kind is damaged: 3"),
        (
            '{"kind": "demo", "methods": [{"name": "a"}]}',
            r"methods\[0\] .* lacks .*label",
        ),
        ('{"kind": "demo", "removal": {"fractions": ["x"], "curves": {}}}', "'x' is not"),
        ('{"kind": "demo", "seconds": true}', "seconds is damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        Run.load(tmp_path)


def test_a_folder_without_a_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"not a run folder.*forebear demo"):
        Run.load(tmp_path)


def test_intervals_overlap_when_they_share_a_point() -> None:
    low, high = Interval(mean=0.1, low=0.0, high=0.2), Interval(mean=0.4, low=0.3, high=0.5)
    assert not low.overlaps(high)
    assert not high.overlaps(low)
    assert low.overlaps(Interval(mean=0.3, low=0.2, high=0.4))
    assert Interval(mean=0.1, low=0.0, high=1.0).overlaps(high)


def test_scores_and_top_lists_of_the_library_are_read_back(tmp_path: Path) -> None:
    values = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, -4.0]])
    scores = Scores(
        values=values,
        query_ids=np.asarray(["p", "q"]),
        train_ids=np.asarray(["x", "y", "z"]),
        provenance=Provenance(method="graddot"),
    )
    scores.save(scores_folder(tmp_path, "graddot"))
    top_path(tmp_path, "graddot").parent.mkdir()
    scores.top(2).to_parquet(top_path(tmp_path, "graddot"))
    scores.top(2, opponents=True).to_parquet(top_path(tmp_path, "graddot", opponents=True))
    assert read_ids(tmp_path, "graddot") == (["p", "q"], ["x", "y", "z"])
    assert read_top(tmp_path, "graddot").by_query() == {
        "p": [("z", 2.0), ("x", 0.5)],
        "q": [("x", 3.0), ("y", 0.0)],
    }
    assert read_top(tmp_path, "graddot", opponents=True).by_query()["q"][0] == ("z", -4.0)


def test_missing_lists_are_an_error_and_missing_extras_are_not(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"ekfac.parquet does not exist.*run it again"):
        read_top(tmp_path, "ekfac")
    assert read_self_influence(tmp_path, "ekfac") is None
    assert read_ids(tmp_path, "ekfac") is None
    assert read_data(tmp_path) == {}
    assert read_texts(tmp_path) == {"train": {}, "queries": {}}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for path in (top_path(tmp_path, "m"), self_influence_path(tmp_path, "m")):
        path.parent.mkdir()
        path.write_bytes(b"not what it should be")
    (tmp_path / "data.safetensors").write_bytes(b"\0" * 4)
    (tmp_path / "examples.json").write_text("]")
    with pytest.raises(FormatError, match=r"m\.parquet is damaged"):
        read_top(tmp_path, "m")
    with pytest.raises(FormatError, match=r"m\.npy is damaged"):
        read_self_influence(tmp_path, "m")
    with pytest.raises(FormatError, match=r"data\.safetensors is damaged"):
        read_data(tmp_path)
    with pytest.raises(FormatError, match=r"examples\.json is damaged"):
        read_texts(tmp_path)
