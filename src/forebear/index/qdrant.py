"""Rows in a Qdrant collection, on a server or inside the client."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import numpy as np
import torch

from forebear.errors import DataError, ForebearError, FormatError, MissingDependencyError
from forebear.index.base import Chosen, require_positive
from forebear.index.conditions import FIELD, payload_kinds, translated
from forebear.index.files import fingerprint
from forebear.progress import track
from forebear.store import Store, decode

KEY = "QDRANT_API_KEY"
NUMBERS = 2**18  # in a request: some megabytes of text, of the 32 that a server takes
PAGE = 10_000
TOGETHER = 64  # queries in a request, at most
MOST = sys.float_info.max  # in place of infinity
PAUSE = 0.5  # seconds between two looks at whether a server is at work
CALM = 3  # looks in a row that find it idle: it begins a moment after the last upload
TIMEOUT = 300  # seconds of one request


@dataclass(frozen=True)
class Points:
    """A collection that is ready."""

    client: Any
    name: str
    columns: Any


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Rows as points of a Qdrant collection, whose columns filters are evaluated with.

    Without `url` the client itself holds them, in memory and anew for each opening, and compares
    all of them: for tests, and for trying things with some thousands of rows. A key is read from
    the environment variable `QDRANT_API_KEY` and written nowhere.

    Attributes:
        url: of a server; none when left out.
        links: of a row to others (m of HNSW).
        construction: rows kept in sight while a row is added (ef_construct).
        breadth: rows kept in sight during a search (hnsw_ef).
        exact: compare all rows.
        quantised: keep int8 copies in memory, which choose what is read from the disk.
        refine: rows re-scored exactly for each one wanted.
    """

    libraries: ClassVar = ("qdrant-client",)
    files: ClassVar = ()
    effort: ClassVar = ("breadth",)

    url: str | None = None
    links: int = 16
    construction: int = 100
    breadth: int = 128
    exact: bool = False
    quantised: bool = False
    refine: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "links", "construction", "breadth", "refine")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise DataError(f"url is {self.url!r}: give one such as http://localhost:6333")
            if "@" in parts.netloc or parts.query:
                raise DataError(
                    f"the url of the server at {parts.hostname} holds a password or a key, which "
                    f"would be written to disk: set {KEY} instead"
                )

    def build(self, store: Store, folder: Path, seed: int) -> tuple[Self, Points]:
        """Upload the rows that are not there yet, and wait until the server has indexed them."""
        points = self._points(store)
        with self._explained():
            if not points.client.collection_exists(points.name):
                self._create(points, store)
            _upload(points, store)
            if self.url is not None:
                _wait(points)
        return self, points

    def open(self, store: Store, folder: Path) -> Points:
        """Find the collection on the server and count its points; without one, build it."""
        if self.url is None:
            return self.build(store, folder, 0)[1]
        points = self._points(store)
        with self._explained():
            there = points.client.collection_exists(points.name)
            count = points.client.count(points.name, exact=True).count if there else 0
        if count != len(store):
            raise FormatError(
                f"the Qdrant collection {points.name} at {self.url} holds {count} of {len(store)} "
                "rows: build it again, which uploads those that are missing"
            )
        return points

    def propose(
        self, handle: Points, queries: np.ndarray, count: int, chosen: Chosen | None
    ) -> np.ndarray:
        """Ask, some queries at a time."""
        from qdrant_client import models

        parameters = None  # which the client alone has no use for
        if self.url is not None:
            parameters = models.SearchParams(hnsw_ef=max(self.breadth, count), exact=self.exact)
        condition = None if chosen is None else _condition(chosen, handle.columns)
        found = np.full((len(queries), count), -1, np.int64)
        together = max(1, min(TOGETHER, NUMBERS // queries.shape[1]))
        for start in range(0, len(queries), together):
            requests = [
                models.QueryRequest(
                    query=query.tolist(), limit=count, filter=condition, params=parameters
                )
                for query in queries[start : start + together]
            ]
            with self._explained():
                answers = handle.client.query_batch_points(handle.name, requests)
            for row, answer in zip(found[start:], answers, strict=False):
                row[: len(answer.points)] = [point.id for point in answer.points]
        return found

    def harder(self, rows: int) -> Self | None:
        """Twice the breadth, until it is all rows."""
        if self.exact or self.breadth >= rows:
            return None
        return replace(self, breadth=min(2 * self.breadth, rows))

    def _points(self, store: Store) -> Points:
        built = f"{fingerprint(store)} {self.links} {self.construction} {self.quantised}"
        name = f"forebear-{sha256(built.encode()).hexdigest()[:16]}"
        return Points(self._client(), name, store.manifest.columns)

    def _client(self) -> Any:
        try:
            from qdrant_client import QdrantClient
        except ImportError:
            raise MissingDependencyError(
                "the index kind qdrant needs its client: pip install 'forebear[index]'"
            ) from None
        if self.url is None:
            return QdrantClient(":memory:")
        with self._explained():
            return QdrantClient(url=self.url, api_key=os.environ.get(KEY), timeout=TIMEOUT)

    def _create(self, points: Points, store: Store) -> None:
        from qdrant_client import models

        quantisation = models.ScalarQuantization(
            scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        )
        points.client.create_collection(
            points.name,
            vectors_config=models.VectorParams(
                size=store.dimension, distance=models.Distance.DOT, on_disk=True
            ),
            hnsw_config=models.HnswConfigDiff(m=self.links, ef_construct=self.construction),
            quantization_config=quantisation if self.quantised else None,
            on_disk_payload=True,
        )
        if self.url is not None:  # the client alone compares every payload anyway
            for name, kind in payload_kinds(store.manifest.columns).items():
                points.client.create_payload_index(
                    points.name, f"{FIELD}.{name}", models.PayloadSchemaType(kind)
                )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong on the way to a server, with what to do about it."""
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        try:
            yield
        except (ApiException, QdrantException) as error:
            raise ForebearError(
                f"Qdrant at {self.url} did not do as asked ({error}): is it running, and is "
                f"{KEY} right?"
            ) from error


def _wait(points: Points) -> None:
    """Until all is indexed: before, rows are compared one by one and recall looks better."""
    idle = 0
    while idle < CALM:
        time.sleep(PAUSE)
        idle = 0 if points.client.get_collection(points.name).status.value == "yellow" else idle + 1


def _upload(points: Points, store: Store) -> None:
    """Rows whose points are not there; their ids are positions, so this may be done twice."""
    from qdrant_client import models

    there = _positions(points, len(store))
    if there.all():
        return
    kinds = payload_kinds(store.manifest.columns)
    columns = {name: store.column(name) for name in kinds}
    step = max(1, NUMBERS // store.dimension)
    for block in track(store.blocks(step), "upload", total=-(-len(store) // step)):
        lacking = np.flatnonzero(~there[block.rows])
        if not len(lacking):
            continue
        inside = torch.from_numpy(lacking)
        scales = None if block.scales is None else block.scales[inside]
        rows = decode(block.values[inside], scales)
        where = lacking + block.rows.start
        payloads = [
            {"id": store.ids[row].item(), FIELD: _payload(columns, row)} for row in where.tolist()
        ]
        points.client.upsert(
            points.name,
            models.Batch(ids=where.tolist(), vectors=rows.tolist(), payloads=payloads),
            wait=True,
        )


def _payload(columns: dict[str, np.ndarray], row: int) -> dict[str, Any]:
    values = {name: column[row].item() for name, column in columns.items()}
    # JSON has neither: what is no number equals nothing and lies nowhere, as one that is absent.
    return {
        name: max(-MOST, min(MOST, value)) if isinstance(value, float) else value
        for name, value in values.items()
        if value == value
    }


def _positions(points: Points, rows: int) -> np.ndarray:
    """`[n]` bool: rows that have a point."""
    there = np.zeros(rows, bool)
    offset = None
    while True:
        found, offset = points.client.scroll(
            points.name, limit=PAGE, offset=offset, with_payload=False, with_vectors=False
        )
        there[[point.id for point in found]] = True
        if offset is None:
            return there


def _condition(chosen: Chosen, columns: Any) -> Any:
    """The filter in Qdrant's words, or the rows themselves where it has none for it."""
    from qdrant_client import models

    condition = translated(chosen.condition, columns)
    if condition is not None:
        return condition
    rows: list[Any] = np.flatnonzero(chosen.mask).tolist()
    return models.Filter(must=models.HasIdCondition(has_id=rows))
