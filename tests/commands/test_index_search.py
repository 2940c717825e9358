"""`forebear index` and `forebear search`, as a person types them, against scores in process."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

import forebear as fb
from forebear.cli import app
from forebear.methods import stored
from forebear.task_file import defined

FILE = """
import numpy as np, torch
from torch import nn
import forebear as fb

N = 60

def data(size, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=draw), torch.randint(3, (size,), generator=draw)

def task():
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return fb.Task(model, fb.losses.cross_entropy)

def train():
    return data(N, 1)

def queries():
    return fb.Data(data(4, 2), ids=["a", "b", "c", "d"])

def ids():
    return [100 + i for i in range(N)]

def columns():
    dates = [f"2024-{i % 12 + 1:02d}-01" for i in range(N)]
    return {"label": train()[1], "source": np.asarray(["web", "book"])[np.arange(N) % 2],
            "date": np.asarray(dates), "size": np.arange(N) / 8, "new": np.arange(N) >= 30}

def examples():
    return {"train": {100 + i: f"drawing {i}" for i in range(N)}, "queries": {"b": "a dog"}}
"""
SETTINGS = ["--option", "dimension=16", "--option", "damping=0.05"]
METHOD = fb.TRAK(dimension=16, damping=0.05)


def forebear(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments: object) -> str:
    """The one sentence that a wrong use gets."""
    result = forebear(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def written(folder: Path, seed: int = 0) -> Path:
    path = folder / f"file{seed}.py"
    path.write_text(FILE.replace("SEED", str(seed)))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file and a store of what it defines."""
    folder = tmp_path_factory.mktemp("store")
    arguments = ["--out", folder / "store", "--dtype", "float32", "--shard-rows", 25]
    result = forebear("index", written(folder), "-m", "trak", *SETTINGS, *arguments)
    assert result.exit_code == 0, result.output
    assert "wrote 60 rows in" in result.stdout
    assert "60 rows × 16 float32" in result.stdout
    return folder


@pytest.fixture(scope="module")
def scores(place: Path) -> fb.Scores:
    """What the method says when it is fitted to the examples themselves."""
    made = defined(place / "file0.py", ("task", "train", "queries", "ids"))
    return METHOD.fit(made["task"], made["train"], ids=made["ids"]).score(made["queries"])


def found(place: Path, *arguments: object) -> list[dict[str, Any]]:
    result = forebear("search", place / "store", place / "file0.py", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["answers"]


def test_search_finds_what_the_scores_say(place: Path, scores: fb.Scores) -> None:
    for flags, opponents in ((), False), (("--opponents",), True):
        expected = scores.top(7, opponents=opponents)
        answers = found(place, "-k", 7, *flags)
        assert [one["query"] for one in answers] == ["a", "b", "c", "d"]
        assert [[row["id"] for row in one["rows"]] for one in answers] == expected.ids.tolist()
        values = [[row["score"] for row in one["rows"]] for one in answers]
        np.testing.assert_allclose(values, expected.values, rtol=1e-3)


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["label=2"], lambda c: c["label"] == 2),
        (["source=book"], lambda c: c["source"] == "book"),
        (["label=0|1", "source = web"], lambda c: (c["label"] < 2) & (c["source"] == "web")),
        (["date>=2024-06-01", "date<=2024-09-01"],
         lambda c: (c["date"] >= "2024-06-01") & (c["date"] <= "2024-09-01")),
        (["size>=2.5", "new=false"], lambda c: (c["size"] >= 2.5) & ~c["new"]),
    ],
)  # fmt: skip
def test_conditions_leave_rows_out(
    conditions: list[str], kept: Any, place: Path, scores: fb.Scores
) -> None:
    columns = defined(place / "file0.py", ("columns",))["columns"]
    mask = np.asarray(kept({name: np.asarray(values) for name, values in columns.items()}))
    assert 3 <= mask.sum() < 60
    order = np.argsort(-scores.values.numpy()[:, mask], axis=1)[:, :3]
    expected = scores.train_ids[mask][order]
    answers = found(place, "-k", 3, *(part for text in conditions for part in ("--where", text)))
    assert [[row["id"] for row in one["rows"]] for one in answers] == expected.tolist()
    one = answers[0]["rows"][0]
    assert one["columns"]["source"] == columns["source"][one["id"] - 100]
    assert one["text"] == f"drawing {one['id'] - 100}"


def test_groups_and_one_query(place: Path, scores: fb.Scores) -> None:
    labels = np.asarray(defined(place / "file0.py", ("columns",))["columns"]["label"])
    (answer,) = found(place, "-k", 2, "--group", "label", "--query", "c")
    assert answer["query"] == "c"
    for label in range(3):
        rows = [row for row in answer["rows"] if row["group"] == label]
        mask = labels == label
        order = np.argsort(-scores.values.numpy()[2, mask])[:2]
        assert [row["id"] for row in rows] == scores.train_ids[mask][order].tolist()
        assert [row["rank"] for row in rows] == [1, 2]


def test_a_row_has_neighbours_and_needs_no_model(place: Path) -> None:
    rows = fb.Store.open(place / "store").rows(range(60)).double()
    products = rows @ rows[7]
    products[7] = -torch.inf
    expected = products.topk(4)
    result = forebear("search", place / "store", "--row", 107, "-k", 4, "--json")
    (answer,) = json.loads(result.stdout)["answers"]
    assert [row["id"] - 100 for row in answer["rows"]] == expected.indices.tolist()
    np.testing.assert_allclose([row["score"] for row in answer["rows"]], expected.values, rtol=1e-5)
    assert "rows nearest to row 107" in forebear("search", place / "store", "--row", 107).stdout


def test_a_table_for_people(place: Path, scores: fb.Scores) -> None:
    text = forebear("search", place / "store", place / "file0.py", "-k", 2).stdout
    assert "strongest proponents of query b (a dog)" in text
    assert f"drawing {scores.top(1).ids[1, 0] - 100}" in text
    assert "1 more queries: choose one with --query ID" in text


def test_what_is_written_is_a_top_list(place: Path, scores: fb.Scores, tmp_path: Path) -> None:
    out = tmp_path / "lists" / "top.parquet"
    forebear("search", place / "store", place / "file0.py", "-k", 5, "--out", out)
    scores.top(5).to_parquet(tmp_path / "expected.parquet")
    table, expected = (
        pq.read_table(path).to_pydict() for path in (out, tmp_path / "expected.parquet")
    )
    assert {name: table[name] for name in ("query", "rank", "example")} == {
        name: expected[name] for name in ("query", "rank", "example")
    }
    np.testing.assert_allclose(table["score"], expected["score"], rtol=1e-3)
    forebear("search", place / "store", place / "file0.py", "-k", 5, "--out", tmp_path / "folder")
    assert pq.read_table(tmp_path / "folder" / "top.parquet").to_pydict() == table
    about = json.loads((tmp_path / "folder" / "search.json").read_text())
    assert about["search"] == "exact"
    assert about["provenance"]["units"] == "removal"
    assert about["provenance"]["model"] == scores.provenance.model


def test_the_place_of_a_score_among_all(place: Path, scores: fb.Scores) -> None:
    for one, values in zip(found(place, "-k", 60, "--quantiles"), scores.values, strict=True):
        for row in one["rows"]:
            share = (values <= values[row["id"] - 100]).float().mean()
            assert row["quantile"] == pytest.approx(share.item(), abs=0.02)  # rounding: one place


def test_an_index_is_built_kept_and_says_its_recall(place: Path, scores: fb.Scores) -> None:
    pytest.importorskip("faiss")
    arguments = ["-m", "trak", *SETTINGS, "--out", place / "store", "--dtype", "float32"]
    arguments += ["--shard-rows", 25, "--kind", "ivf", "--recall", "0.99"]
    first = forebear("index", place / "file0.py", *arguments)
    assert first.exit_code == 0, first.output
    assert "index ivf finds" in first.stdout
    changed = (place / "store" / "index-ivf" / "index.json").stat().st_mtime_ns
    again = forebear("index", place / "file0.py", *arguments)
    assert "every row was there: nothing to build" in again.stdout
    assert again.stdout.splitlines()[-2] == first.stdout.splitlines()[-2]
    assert (place / "store" / "index-ivf" / "index.json").stat().st_mtime_ns == changed
    result = forebear("search", place / "store", place / "file0.py", "--kind", "ivf", "-k", 3)
    assert "index ivf finds" in result.stdout
    ids = [[row["id"] for row in one["rows"]] for one in found(place, "--kind", "ivf", "-k", 3)]
    shared = [len({*a} & {*b}) for a, b in zip(ids, scores.top(3).ids.tolist(), strict=True)]
    assert np.mean(shared) >= 2
    for where in ([], ["--where", "label=0"], ["--where", "label=1"], ["--where", "label=2"]):
        near = ["search", place / "store", "--row", 107, "-k", 3, "--json", *where]
        exact, other = (
            json.loads(forebear(*near, *kind).stdout)["answers"][0]
            for kind in ([], ["--kind", "ivf"])
        )
        assert len(other["rows"]) == 3
        assert 107 not in [row["id"] for row in other["rows"]]
        if other["exact"]:
            assert other["rows"] == exact["rows"]
    sentence = refused(
        "search", place / "store", place / "file0.py", "--kind", "ivf", "--group", "label"
    )
    assert "groups need every row to be looked at" in sentence


def test_what_is_missing_is_built_and_nothing_else(tmp_path: Path) -> None:
    arguments = [written(tmp_path), "-m", "trak", *SETTINGS]
    arguments += ["--out", tmp_path / "store", "--shard-rows", 25]
    assert "wrote 60 rows" in forebear("index", *arguments).stdout
    shards = sorted((tmp_path / "store").glob("shard-*"))
    bytes_before = [path.read_bytes() for path in shards]
    kept = shards[0].stat().st_mtime_ns
    shards[2].unlink()
    again = forebear("index", *arguments)
    assert "wrote 10 rows in" in again.stdout
    assert ", 50 were there" in again.stdout
    assert [path.read_bytes() for path in shards] == bytes_before
    assert shards[0].stat().st_mtime_ns == kept
    assert "every row was there: nothing to build" in forebear("index", *arguments).stdout


def test_a_store_that_cannot_be_written_to_is_searched_all_the_same(
    place: Path, scores: fb.Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (place / "store").glob("[ms]*"):  # manifest and shards, without what was fitted
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / path.name).write_bytes(path.read_bytes())

    def full(path: Path, pieces: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(stored, "write_whole", full)
    result = forebear("search", tmp_path / "store", place / "file0.py", "-k", 4, "--json")
    answers = json.loads(result.stdout)["answers"]
    ids = [[row["id"] for row in one["rows"]] for one in answers]
    assert ids == scores.top(4).ids.tolist()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-k", "61"], "k is 61 and there are 60 rows: choose 1 to 60"),
        (["--where", "lable=2"], "unknown column 'lable': did you mean 'label'? known: date, "),
        (["--where", "label~2"], "'label~2' is no condition: write COLUMN=VALUE"),
        (["--where", "label=dog"], "column 'label' holds int64 and 'dog' is not a number"),
        (["--where", "new=maybe"], "column 'new' holds bool and 'maybe' is not true or false"),
        (["--group", "sorce"], "unknown column 'sorce': did you mean 'source'?"),
        (["-k", "40", "--where", "source=web"], "k is 40 and the filter leaves 30 rows"),
        (["--query", "e"], "unknown query 'e': the file has 4, from 'a' to 'd'"),
        (["--out", "top.csv"], "--out top.csv is neither a FILE.parquet nor a folder"),
        (["--row", "3"], "name the FILE.py whose queries are asked, or a row with --row ID"),
        (["--kind", "hnws"], "did you mean 'hnsw'?"),
        (["--kind", "pq"], "no finished index of kind 'pq'"),
    ],
)
def test_wrong_questions_are_one_sentence(arguments: list[str], sentence: str, place: Path) -> None:
    assert sentence in refused("search", place / "store", place / "file0.py", *arguments)


def test_what_does_not_belong_together_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    other = written(tmp_path, seed=1)
    store = place / "store"
    assert "model differs" in refused("search", store, other)
    arguments = ["--out", store, "--dtype", "float32", "--shard-rows", 25]
    assert "model differs" in refused("index", other, "-m", "trak", *SETTINGS, *arguments)
    file = place / "file0.py"
    assert "settings differs" in refused("index", file, "-m", "trak", *SETTINGS[:2], *arguments)
    assert "dtype differs" in refused("index", file, "-m", "trak", *SETTINGS, "--out", store)
    assert "id 3 is not in the store" in refused("search", store, "--row", 3)
    assert "its ids are integers" in refused("search", store, "--row", "three")
    assert "ekfac has no vector for each example" in refused(
        "index", file, "-m", "ekfac", "--out", tmp_path / "no"
    )


def test_folders_that_cannot_be(place: Path, tmp_path: Path) -> None:
    file = place / "file0.py"
    assert "is not a store" in refused("search", tmp_path, file)
    (tmp_path / "taken").write_text("a file")
    assert "taken" in refused("index", file, "-m", "trak", "--out", tmp_path / "taken" / "store")
    newer = tmp_path / "newer"
    newer.mkdir()
    manifest = json.loads((place / "store" / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "upgrade forebear" in refused("search", newer, file)
    assert "upgrade forebear" in refused("index", file, "-m", "trak", "--out", newer)
    assert "'bf16' is unknown" in refused(
        "index", file, "-m", "trak", "--out", tmp_path / "o", "--dtype", "bf16"
    )


def test_a_file_says_what_it_lacks(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("def task(): ...")
    assert "does not define queries(): it must define task() and queries()" in refused(
        "search", place / "store", path
    )
    assert "does not define train()" in refused("index", path, "-m", "trak", "--out", tmp_path)
