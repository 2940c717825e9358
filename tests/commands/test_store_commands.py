"""`forebear store`, as a person types it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from forebear.cli import app
from forebear.store import Column, Manifest, Store, StoreBuilder


def forebear(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, arguments)])


def build(folder: Path, first: int = 0, model: str = "m") -> Store:
    columns = {"label": Column("int64")}
    manifest = Manifest(rows=10, dimension=4, shard_rows=4, columns=columns, model=model)
    with StoreBuilder.create(folder, manifest) as builder:
        for shard in builder.missing():
            part = manifest.rows_of(shard)
            ids = np.arange(part.start, part.stop) + first
            values = torch.full((len(ids), 4), float(first + shard))
            builder.write(shard, values, ids, {"label": ids % 2})
        return builder.finish()


def test_info_says_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "shard-000001.safetensors").unlink()
    text = forebear("info", tmp_path).stdout
    assert "10 × 4 bfloat16" in text
    assert "2 of 3 are there" in text
    assert "label (int64)" in text
    facts = json.loads(forebear("info", tmp_path, "--json").stdout)
    assert (facts["rows"], facts["shards_there"], facts["model"]) == (10, 2, "m")


def test_verify_finds_and_removes_what_is_damaged(tmp_path: Path) -> None:
    build(tmp_path)
    assert forebear("verify", tmp_path).stdout == "3 of 3 shards are intact\n"
    path = tmp_path / "shard-000002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    found = forebear("verify", tmp_path)
    assert found.exit_code == 1
    assert "shard-000002.safetensors is damaged" in found.stdout
    assert path.exists()
    assert "removed 1 damaged" in forebear("verify", tmp_path, "--repair").stdout
    assert not path.exists()
    assert "missing: 1 of 3 shards, first 2" in forebear("verify", tmp_path).stdout


def test_merge_and_export(tmp_path: Path) -> None:
    build(tmp_path / "a")
    build(tmp_path / "b", first=100)
    done = forebear("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab")
    assert done.stdout == f"wrote 20 rows to {tmp_path / 'ab'}\n"
    forebear("export", tmp_path / "ab", "--out", tmp_path / "ab.parquet")
    table = pq.read_table(tmp_path / "ab.parquet").to_pydict()
    assert table["id"] == [*range(10), *range(100, 110)]
    assert table["values"][11] == [100.0] * 4
    forebear("export", tmp_path / "ab", "--out", tmp_path / "npy")
    assert np.load(tmp_path / "npy/values.npy")[19].tolist() == [102.0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "nowhere is not a store: it has no manifest.json"),
        (["verify", "nowhere"], "nowhere is not a store"),
        (["merge", "a", "c", "--out", "o"], "model differs: the store has 'm' and this is 'n'"),
        (["export", "a", "--out", "a.csv"], "neither a FILE.parquet nor a folder"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "a")
    build(tmp_path / "c", first=50, model="n")
    result = forebear(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
