"""Shards reach the disk in the background: whole, as they were given, and no error is lost."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from forebear.store import Manifest, Store, StoreBuilder, builder, verify

ROWS, SIZE, K = 40, 10, 8


def manifest(dtype: Any = "float32") -> Manifest:
    return Manifest(rows=ROWS, dimension=K, dtype=dtype, shard_rows=SIZE)


def rows() -> Tensor:
    return torch.randn(ROWS, K, generator=torch.Generator().manual_seed(0))


def fill(open_builder: StoreBuilder) -> None:
    for shard in open_builder.missing():
        part = open_builder.manifest.rows_of(shard)
        open_builder.write(shard, rows()[part], np.arange(ROWS)[part])


def test_what_was_given_may_change_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, really = threading.Event(), builder.write_shard

    def later(*arguments: Any) -> None:
        assert may_write.wait(30)
        really(*arguments)

    monkeypatch.setattr(builder, "write_shard", later)
    with StoreBuilder.create(tmp_path, Manifest(rows=SIZE, dimension=K, dtype="float32")) as made:
        values, ids = rows()[:SIZE].clone(), np.arange(SIZE)
        made.write(0, values, ids)
        assert not list(tmp_path.glob("shard-*"))  # it did not wait
        values.zero_()
        ids[:] = 7
        may_write.set()
        store = made.finish()
    assert torch.equal(store.rows(range(SIZE)), rows()[:SIZE])
    assert store.ids.tolist() == list(range(SIZE))


def full_once(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    really = builder.write_shard

    def write(folder: Path, shard: int, tensors: Any) -> None:
        if shard == at:
            raise OSError(errno.ENOSPC, "full")
        really(folder, shard, tensors)

    monkeypatch.setattr(builder, "write_shard", write)


@pytest.mark.parametrize("how", ["write", "missing", "finish", "close"])
def test_what_went_wrong_on_the_way_is_raised_by_what_comes_next(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_once(monkeypatch, at=1)
    made = StoreBuilder.create(tmp_path, manifest())
    made.write(0, rows()[:10], np.arange(10))
    made.write(1, rows()[10:20], np.arange(10, 20))
    step = {
        "write": lambda: made.write(2, rows()[20:30], np.arange(20, 30)),
        "missing": made.missing,
        "finish": made.finish,
        "close": made.close,
    }[how]
    with pytest.raises(OSError, match="full"):
        step()
    made.close()  # once is enough, and the lock is free again
    with StoreBuilder.resume(tmp_path) as again:
        assert again.missing() == [1, 2, 3]


def test_an_error_of_the_block_is_not_hidden_by_that_of_the_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_once(monkeypatch, at=0)

    def build(error: Exception | None) -> None:
        with StoreBuilder.create(tmp_path, manifest()) as made:
            made.write(0, rows()[:10], np.arange(10))
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        build(ZeroDivisionError())
    with pytest.raises(OSError, match="full"):
        build(None)
    assert not (tmp_path / "build.lock").exists()


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[2]).parent))
from test_builder import fill, manifest
from forebear.store import StoreBuilder
with StoreBuilder.create(sys.argv[1], manifest()) as builder:
    resource.setrlimit(resource.RLIMIT_FSIZE, (800, resource.RLIM_INFINITY))
    fill(builder)
"""


def test_a_file_the_system_refuses_leaves_nothing_and_building_again_ends_the_same(
    tmp_path: Path,
) -> None:
    """A real refusal by the kernel: no file may be longer than 800 bytes."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "limited"), __file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "bytes and" in done.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "limited").iterdir()] == ["manifest.json"]
    for name in ("limited", "whole"):
        with StoreBuilder.create(tmp_path / name, manifest()) as made:
            fill(made)
            made.finish()
    assert verify(tmp_path / "limited").complete
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "limited" / path.name).read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written to"):
            StoreBuilder.create(tmp_path, manifest())
    finally:
        tmp_path.chmod(0o700)


def test_reading_in_order_gives_every_shard_once_however_many_are_fetched_ahead(
    tmp_path: Path,
) -> None:
    with StoreBuilder.create(tmp_path, manifest()) as made:
        fill(made)
        made.finish()
    store = Store.open(tmp_path)
    before = threading.active_count()
    scan: Any = store.blocks(4)
    first = next(scan)
    assert torch.equal(first.values, rows()[:4])
    scan.close()  # given up halfway: its thread ends too
    assert threading.active_count() == before
    assert torch.equal(torch.cat([block.values for block in store.blocks(4)]), rows())
    (tmp_path / "shard-000003.safetensors").unlink()
    with pytest.raises(Exception, match="shard-000003"):
        list(Store(tmp_path, manifest()).blocks(4))
