import pytest
from index_stores import DIMENSION, ROWS, draw, write_store

from forebear.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Isotropic rows in three shards."""
    folder = tmp_path_factory.mktemp("stores") / "isotropic"
    return write_store(folder, draw(ROWS, DIMENSION), dtype="float32", shard_rows=900)
