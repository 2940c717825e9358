"""Building, reading, refusing: a store against the tensors it was made of."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from forebear.errors import DataError, ForebearError, FormatError, MismatchError, NonFiniteError
from forebear.store import (
    Column,
    Manifest,
    Store,
    StoreBuilder,
    decode,
    merge,
    to_npy,
    to_parquet,
    verify,
)
from forebear.store.rows import encode

N, K = 23, 12
COLUMNS = {"label": Column("int64"), "source": Column("string"), "box": Column("float32", (2,))}


def rows(n: int = N, k: int = K, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def names(n: int = N, prefix: str = "é") -> np.ndarray:
    return np.asarray([f"{prefix}-{(7 * i) % n}" for i in range(n)])


def columns(n: int = N) -> dict[str, np.ndarray]:
    return {
        "label": np.arange(n) % 3,
        "source": np.asarray(["", "web", "bücher"])[np.arange(n) % 3],
        "box": np.stack([np.arange(n), -np.arange(n)], 1) / 4,
    }


def manifest(**changes: Any) -> Manifest:
    return Manifest(**({"rows": N, "dimension": K, "dtype": "float32", "shard_rows": 5} | changes))


def fill(
    builder: StoreBuilder,
    values: Tensor,
    ids: np.ndarray,
    labels: dict[str, np.ndarray] | None = None,
    weights: Tensor | None = None,
) -> None:
    for shard in builder.missing():
        part = builder.manifest.rows_of(shard)
        own = {name: column[part] for name, column in (labels or {}).items()}
        builder.write(
            shard, values[part], ids[part], own, None if weights is None else weights[part]
        )


def build(folder: Path, values: Tensor | None = None, ids: Any = None, **changes: Any) -> Store:
    values = rows() if values is None else values
    ids = np.arange(len(values)) if ids is None else ids
    with StoreBuilder.create(folder, manifest(rows=len(values), **changes)) as builder:
        fill(builder, values, ids)
        return builder.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


TOLERANCE = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_come_back_within_the_rounding_of_their_type(dtype: str, tmp_path: Path) -> None:
    store = build(tmp_path, dtype=dtype)
    values = rows()
    assert ((store.rows(range(N)) - values).abs() <= TOLERANCE[dtype] * values.abs()).all()
    assert torch.allclose(store.norms, values.square().sum(1).sqrt(), rtol=1e-6)


@given(
    st.integers(1, 40),
    st.integers(1, 9) | st.integers(30, 100),
    st.integers(0, 99),
    st.floats(-20, 20),
)
@settings(max_examples=40, deadline=None)
def test_int8_is_off_by_half_a_step_of_its_columns(n: int, k: int, seed: int, power: float) -> None:
    values = rows(n, k, seed) * 10**power
    values[0] = 0
    values[:, : k // 2] *= 1000
    stored = encode(values, "int8", np.arange(n))
    back = decode(stored["values"], stored["scales"])
    assert stored["scales"].shape == (n, -(-k // 16))
    for first in range(0, k, 16):
        own = slice(first, first + 16)
        step = values[:, own].abs().amax(1, keepdim=True) / 127
        assert ((back - values)[:, own].abs() <= 0.505 * step).all()
    some = slice(k // 3, k // 3 + 40)  # columns that begin and end inside of others' scales
    part = decode(stored["values"][:, some], stored["scales"], some.start)
    assert torch.equal(part, back[:, some])


def test_int8_with_one_scale_a_row_is_read_as_it_was_written_before(tmp_path: Path) -> None:
    values = rows(N, 100)
    build(tmp_path / "old", values, dimension=100, dtype="int8", scale_columns=0)
    facts = json.loads((tmp_path / "old/manifest.json").read_text())
    assert facts["format"] == 1
    assert "scale_columns" not in facts
    assert load_file(tmp_path / "old/shard-000000.safetensors")["scales"].shape == (5,)
    old = Store.open(tmp_path / "old")
    step = values.abs().amax(1, keepdim=True) / 127
    assert ((old.rows(range(N)) - values).abs() <= 0.501 * step).all()
    assert verify(tmp_path / "old").complete
    build(tmp_path / "new", values, dimension=100, dtype="int8")
    assert json.loads((tmp_path / "new/manifest.json").read_text())["format"] == 2
    with pytest.raises(MismatchError, match="scale_columns differs: the store has 0 and this is"):
        merge([tmp_path / "old", tmp_path / "new"], tmp_path / "both")


@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 45))
@settings(max_examples=20, deadline=None)
def test_shards_and_blocks_of_any_size_give_the_same_rows(n: int, size: int, step: int) -> None:
    import tempfile

    values = rows(n)
    with tempfile.TemporaryDirectory() as folder:
        store = build(Path(folder), values, shard_rows=size)
        blocks = list(store.blocks(step))
        assert torch.equal(torch.cat([block.values for block in blocks]), values)
        where = [i for block in blocks for i in range(n)[block.rows]]
        assert where == list(range(n))
        assert max(len(block.values) for block in blocks) <= min(step, size)
        chosen = torch.randint(n, (17,), generator=torch.Generator().manual_seed(n))
        assert torch.equal(store.rows(chosen), values[chosen])


def test_a_block_is_a_view_of_the_file(tmp_path: Path) -> None:
    store = build(tmp_path, dtype="bfloat16")
    first, again = next(store.blocks(5)), next(store.blocks(5))
    assert first.values.data_ptr() == again.values.data_ptr()
    assert first.values.dtype == torch.bfloat16
    maps = Path("/proc/self/maps").read_text().splitlines()
    own = [line.split()[0].split("-") for line in maps if "shard-000000" in line]
    assert any(int(a, 16) <= first.values.data_ptr() < int(b, 16) for a, b in own)


def test_ids_and_columns_come_back(tmp_path: Path) -> None:
    with StoreBuilder.create(tmp_path, manifest(ids="string", columns=COLUMNS)) as builder:
        fill(builder, rows(), names(), columns())
        store = builder.finish()
    assert store.ids.tolist() == names().tolist()
    for name, expected in columns().items():
        assert store.column(name).tolist() == expected.tolist()
    assert torch.equal(store.rows(ids=["é-7", "é-0"]), rows()[[1, 0]])
    with pytest.raises(DataError, match="'é-99' is not in the store"):
        store.rows(ids=["é-7", "é-99"])
    with pytest.raises(DataError, match="no column 'date': it has 'box', 'label', 'source'"):
        store.column("date")
    with pytest.raises(DataError, match="id 3 is not in the store, whose ids are of type string"):
        store.positions([3])
    with pytest.raises(DataError, match="position 23 is not"):
        store.rows([0, 23])


def test_shards_are_safetensors_files_that_others_read(tmp_path: Path) -> None:
    build(tmp_path, dtype="bfloat16")
    read = load_file(tmp_path / "shard-000004.safetensors")
    assert torch.equal(read["values"], rows()[20:].bfloat16())
    assert read["ids"].tolist() == [20, 21, 22]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weighted_rows_stand_for_vector_times_weight(dtype: str, tmp_path: Path) -> None:
    weights = torch.linspace(-1, 1, N)
    with StoreBuilder.create(tmp_path, manifest(dtype=dtype, weighted=True)) as builder:
        fill(builder, rows(), np.arange(N), weights=weights)
        store = builder.finish()
    expected = rows() * weights[:, None]
    assert torch.allclose(store.rows(range(N)), expected, atol=0.02)
    blocks = list(store.blocks(7))
    joined = torch.cat([decode(b.values, b.scales) for b in blocks])
    assert torch.equal(joined, store.rows(range(N)))
    assert torch.allclose(store.norms, expected.norm(dim=1), rtol=1e-5)
    plain = [decode(b.values, b.scales) for b in store.blocks(7, weighted=False)]
    assert torch.allclose(torch.cat(plain), rows(), atol=0.02)  # weight 0 loses nothing


def test_an_interrupted_build_ends_in_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "whole")
    with StoreBuilder.create(tmp_path / "parts", manifest()) as builder:
        for shard in (3, 0):
            part = builder.manifest.rows_of(shard)
            builder.write(shard, rows()[part], np.arange(N)[part])
        assert builder.missing() == [1, 2, 4]
        with pytest.raises(FormatError, match=r"3 of 5 shards .* missing \(first 1\)"):
            builder.finish()
    with pytest.raises(FormatError, match=r"3 of 5 shards .* missing \(first 1\)"):
        Store.open(tmp_path / "parts")
    (tmp_path / "parts/shard-000001.safetensors.partial").write_bytes(b"half")
    with StoreBuilder.resume(tmp_path / "parts") as builder:
        fill(builder, rows(), np.arange(N))
        builder.finish()
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "b"},
        {"train": "b"},
        {"method": "b"},
        {"settings": {"dimension": 13}},
        {"seed": 1},
        {"precision": "float64"},
        {"loss": "b"},
        {"dimension": K + 1},
        {"dtype": "int8"},
        {"rows": N + 1},
        {"shard_rows": 6},
        {"columns": {"label": Column("int64")}},
        {"weighted": True},
        {"ids": "string"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_manifest_is_refused_by_the_name_of_the_field(
    change: dict[str, Any], tmp_path: Path
) -> None:
    about = manifest(model="a", train="a", method="a", settings={"dimension": 12}, seed=0, loss="a")
    StoreBuilder.create(tmp_path, about).close()
    with pytest.raises(MismatchError, match=f"^{next(iter(change))} differs: "):
        StoreBuilder.create(tmp_path, replace(about, **change))
    StoreBuilder.create(tmp_path, replace(about, version="2")).close()  # recorded, not compared


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with StoreBuilder.create(tmp_path, manifest(dtype="float16")) as builder:
        ids = np.arange(100, 105)

        def write(values: Tensor, ids: Any = ids, **more: Any) -> None:
            builder.write(0, values, ids, **more)

        with pytest.raises(DataError, match=r"shape \(13,\), the store has 12 .* projection"):
            write(rows(5, 13))
        with pytest.raises(DataError, match="given 4 rows and has 5"):
            write(rows(4))
        for bad in (float("nan"), float("inf")):
            values = rows(5)
            values[1, 2] = values[4, 0] = bad
            with pytest.raises(NonFiniteError, match=r"2 rows .* \(ids 101, 104\)"):
                write(values)
        for scale in (1e6, 1e-9):
            with pytest.raises(DataError, match=r"for float16 \(ids 103\): store bfloat16"):
                write(rows(5) * torch.tensor([1, 1, 1, scale, 0])[:, None])
        with pytest.raises(DataError, match="given 2 ids"):
            write(rows(5), ids[:2])
        with pytest.raises(DataError, match="needs 5 of type integer"):
            write(rows(5), names(5))
        with pytest.raises(DataError, match="columns 'label' were given"):
            write(rows(5), columns={"label": ids})
        with pytest.raises(DataError, match="not weighted"):
            write(rows(5), weights=torch.ones(5))
        assert builder.missing() == [0, 1, 2, 3, 4]


def test_an_id_that_stands_in_two_shards_is_refused_at_the_end(tmp_path: Path) -> None:
    ids = np.arange(N)
    ids[17] = 4
    with pytest.raises(DataError, match=r"1 ids stand more than once \(id 4 at positions 4 and 17"):
        build(tmp_path, ids=ids)


def test_a_newer_or_damaged_manifest_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"format": 99}))
    with pytest.raises(FormatError, match=r"format 99 .* upgrade forebear"):
        Store.open(tmp_path)
    with pytest.raises(FormatError, match="upgrade forebear"):
        StoreBuilder.create(tmp_path, manifest())
    del good["dimension"]
    path.write_text(json.dumps(good))
    with pytest.raises(FormatError, match="damaged"):
        Store.open(tmp_path)
    with pytest.raises(FormatError, match="is not a store"):
        Store.open(tmp_path / "nowhere")


def damage(path: Path, kind: str) -> None:
    raw = bytearray(path.read_bytes())
    if kind == "truncated":
        raw = raw[:-3]
    elif kind == "cut in the header":
        raw = raw[:40]
    elif kind == "empty":
        raw = bytearray()
    elif kind == "one bit of a value":
        raw[-100] ^= 4
    elif kind == "one bit of the header":
        raw[raw.index(b"F32")] ^= 1
    elif kind == "zeros":
        raw[-64:] = bytes(64)
    path.write_bytes(raw)


KINDS = [
    "truncated",
    "cut in the header",
    "empty",
    "one bit of a value",
    "one bit of the header",
    "zeros",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_is_found_and_nothing_else_is_lost(kind: str, tmp_path: Path) -> None:
    build(tmp_path)
    assert verify(tmp_path).complete
    whole = content(tmp_path)
    damage(tmp_path / "shard-000002.safetensors", kind)
    found = verify(tmp_path)
    assert (list(found.damaged), found.missing) == ([2], ())
    assert "shard-000002" in found.damaged[2]
    with StoreBuilder.resume(tmp_path) as builder:
        assert builder.missing(deep=True) == [2]
    assert verify(tmp_path, repair=True).repaired
    assert verify(tmp_path).missing == (2,)
    with StoreBuilder.resume(tmp_path) as builder:
        fill(builder, rows(), np.arange(N))
        builder.finish()
    assert content(tmp_path) == whole


def test_a_truncated_shard_counts_as_missing_and_is_not_read(tmp_path: Path) -> None:
    store = build(tmp_path)
    damage(tmp_path / "shard-000002.safetensors", "truncated")
    with StoreBuilder.resume(tmp_path) as builder:
        assert builder.missing() == [2]
    with pytest.raises(FormatError, match=r"damaged .* bytes in place of .* verify --repair"):
        Store.open(tmp_path).rows([12])
    assert torch.equal(store.rows([0, 22]), rows()[[0, 22]])


def test_shards_under_each_others_names_are_found(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "shard-000001.safetensors").rename(tmp_path / "shard-000002.safetensors")
    assert list(verify(tmp_path).damaged) == [2]


def test_a_full_disk_leaves_nothing_behind_and_says_what_was_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StoreBuilder.create(tmp_path, manifest()) as builder:
        before = set(tmp_path.iterdir())
        monkeypatch.setattr(os, "posix_fallocate", full)
        builder.write(0, rows(5), np.arange(5))
        with pytest.raises(OSError, match=r"needs [\d,]+ bytes and [\d,]+ are free") as caught:
            builder.write(1, rows(5), np.arange(5))
    assert caught.value.errno == errno.ENOSPC
    assert {path.name for path in before} - {p.name for p in tmp_path.iterdir()} == {"build.lock"}
    assert not list(tmp_path.glob("*.partial"))


def test_a_read_only_folder_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *_: Any) -> int:  # tests may run as root, who may write anywhere
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="cannot be written to: choose another folder") as caught:
            StoreBuilder.create(tmp_path, manifest())
    assert caught.value.errno == errno.EROFS


HOLDER = """
import sys, time
from forebear.store import Manifest, StoreBuilder
builder = StoreBuilder.resume(sys.argv[1])
print("ready", flush=True)
time.sleep(60)
"""


def test_two_builders_are_refused_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    StoreBuilder.create(tmp_path, manifest()).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(ForebearError, match=f"being built by process {holder.pid} on "):
            StoreBuilder.resume(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / "build.lock").exists()  # it had no time to remove it
    StoreBuilder.resume(tmp_path).close()
    assert not (tmp_path / "build.lock").exists()
    (tmp_path / "build.lock").write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(ForebearError, match="process 1 on elsewhere: if that one has died, delete"):
        StoreBuilder.resume(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_merging_keeps_rows_ids_and_columns_as_they_are(dtype: str, tmp_path: Path) -> None:
    about = manifest(dtype=dtype, ids="string", columns=COLUMNS, weighted=True, model="m")
    weights = torch.linspace(0.5, 1, N)
    for name in ("a", "b"):
        with StoreBuilder.create(tmp_path / name, replace(about, train=name)) as builder:
            fill(builder, rows(seed=ord(name)), names(prefix=name), columns(), weights)
            builder.finish()
    sources = [tmp_path / "a", tmp_path / "b"]
    merged = merge(sources, tmp_path / "out", shard_rows=9)
    a, b = map(Store.open, sources)
    everything = range(N)
    assert torch.equal(merged.rows(range(2 * N)), torch.cat([s.rows(everything) for s in (a, b)]))
    assert merged.ids.tolist() == [*a.ids, *b.ids]
    assert merged.column("source").tolist() == [*a.column("source"), *b.column("source")]
    assert torch.equal(merged.norms, torch.cat([a.norms, b.norms]))
    assert merged.manifest.train not in ("a", "b")
    whole = content(tmp_path / "out")
    (tmp_path / "out/shard-000003.safetensors").unlink()
    merge(sources, tmp_path / "out", shard_rows=9)
    assert content(tmp_path / "out") == whole


def test_stores_that_do_not_belong_together_are_not_merged(tmp_path: Path) -> None:
    build(tmp_path / "a", model="a")
    build(tmp_path / "b", model="b")
    with pytest.raises(MismatchError, match="model differs: the store has 'a' and this is 'b'"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with pytest.raises(DataError, match="id 0 and 22 more are in"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(DataError, match="is one of the stores"):
        merge([tmp_path / "a"], tmp_path / "a")


def test_exports_hold_the_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    with StoreBuilder.create(tmp_path / "s", manifest(dtype="int8", columns=COLUMNS)) as builder:
        fill(builder, rows(), np.arange(N), columns())
        store = builder.finish()
    to_npy(store, tmp_path / "npy")
    expected = store.rows(range(N)).numpy()
    assert (np.load(tmp_path / "npy/values.npy") == expected).all()
    assert (np.load(tmp_path / "npy/column-source.npy") == columns()["source"]).all()
    to_parquet(store, tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert (np.asarray(table["values"], dtype=np.float32) == expected).all()
    assert table["id"] == list(range(N))
    assert table["box"] == columns()["box"].tolist()
    assert not list(tmp_path.rglob("*.partial"))


def test_parts_must_cover_the_row() -> None:
    with pytest.raises(DataError, match="parts have 5 numbers and rows 12"):
        manifest(parts={"0": 5})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_finds_the_rows_with_the_largest_products(
    dtype: str, weighted: bool, tmp_path: Path
) -> None:
    from forebear.search import search_exact

    values, weights = rows(300), torch.linspace(-1, 2, 300)
    about = manifest(rows=300, shard_rows=70, dtype=dtype, weighted=weighted)
    with StoreBuilder.create(tmp_path, about) as builder:
        fill(builder, values, np.arange(300), weights=weights if weighted else None)
        store = builder.finish()
    queries = rows(6, seed=1)
    found = search_exact(store, queries, 9)
    products = queries.double() @ store.rows(range(300)).double().T
    expected, places = products.topk(9, dim=1)
    assert np.array_equal(np.asarray(found.positions), places.numpy())
    assert torch.allclose(torch.as_tensor(found.values).double(), expected, rtol=1e-5)
