"""What a store holds and where it comes from: one JSON file, written once."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from forebear.descriptions import same, shown
from forebear.errors import DataError, FormatError, MismatchError
from forebear.store.files import write_whole
from forebear.types import read_json, require_choices

NAME = "manifest.json"
FORMAT = 2
"""Format 1 knows int8 with one scale a row only; it is read, and written where it is enough."""

SCALE_COLUMNS = 16
"""Columns of int8 rows that share a scale, unless another number is chosen."""

SHARD_BYTES = 2**23
"""Rows of a shard take about so many bytes (8 MB) unless their number is chosen."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
COLUMN_DTYPES = ("int64", "int32", "float64", "float32", "bool", "string")

StoredType = Literal["float32", "float16", "bfloat16", "int8"]

SAME = ("dimension", "dtype", "scale_columns", "ids", "weighted", "columns", "parts")
FINGERPRINTS = ("model", "method", "settings", "seed", "precision", "loss")


@dataclass(frozen=True)
class Column:
    """A value for each row beside its numbers: a label, a source, a date.

    Attributes:
        dtype: one of `COLUMN_DTYPES`; strings have no shape.
        shape: of one row's value.
    """

    dtype: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Facts about a store.

    Attributes:
        rows: how many there are when it is complete.
        dimension: numbers in a row.
        dtype: how they are stored.
        scale_columns: for int8, so many consecutive columns of a row share a scale; 0 for one scale
            a row. Without meaning for other types, and 0 there.
        shard_rows: rows of a shard, the last may have fewer.
        ids: whether ids are `"integer"` or `"string"`.
        weighted: each row is kept as a vector and a weight, and stands for their product.
        columns: further values of each row, by name.
        parts: names and widths of the consecutive parts of a row, such as layers; may be empty.
        model: hash of the model.
        train: fingerprint of the dataset.
        method: name of the method.
        settings: of the method, ready for JSON.
        seed: of projections.
        precision: in which rows were computed.
        version: of forebear; recorded, not compared.
        loss: description of what the model was trained with; None where rows have no model, and in
            stores of earlier versions, and then not compared.
    """

    rows: int
    dimension: int
    dtype: StoredType = "bfloat16"
    scale_columns: int = SCALE_COLUMNS
    shard_rows: int = 0
    ids: Literal["integer", "string"] = "integer"
    weighted: bool = False
    columns: Mapping[str, Column] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    model: str = ""
    train: str = ""
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    precision: str = "float32"
    version: str = ""
    loss: Any = None

    def __post_init__(self) -> None:
        require_choices(self)
        if self.rows < 1 or self.dimension < 1:
            raise DataError(
                f"a store of {self.rows} rows of {self.dimension} numbers: both must be at least 1"
            )
        if self.scale_columns not in (0, SCALE_COLUMNS):
            raise DataError(
                f"scale_columns is {self.scale_columns}: use {SCALE_COLUMNS}, or 0 for one scale a "
                "row"
            )
        if self.dtype != "int8":
            object.__setattr__(self, "scale_columns", 0)
        if self.shard_rows < 0:
            raise DataError(f"shard_rows is {self.shard_rows}: it must be at least 1")
        if self.shard_rows == 0:
            fitting = SHARD_BYTES // (self.dimension * ITEM_BYTES[self.dtype])
            object.__setattr__(self, "shard_rows", max(1, fitting))
        for name, column in self.columns.items():
            known = column.dtype in COLUMN_DTYPES and not (
                column.dtype == "string" and column.shape
            )
            if not known or "." in name:
                raise DataError(
                    f"column {name!r} has dtype {column.dtype!r} and shape {column.shape}: use "
                    f"{', '.join(COLUMN_DTYPES)}, strings without a shape, and names without dots"
                )
        if self.parts and sum(self.parts.values()) != self.dimension:
            raise DataError(
                f"parts have {sum(self.parts.values())} numbers and rows {self.dimension}"
            )

    @property
    def shards(self) -> int:
        """How many shards there are when it is complete."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> slice:
        """The positions that a shard holds.

        Raises:
            DataError: there is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise DataError(f"shard {shard} does not exist: there are {self.shards}, from 0")
        start = shard * self.shard_rows
        return slice(start, min(start + self.shard_rows, self.rows))

    def require_same(
        self, other: "Manifest", names: tuple[str, ...] = (*SAME, *FINGERPRINTS, "train")
    ) -> None:
        """Raise `MismatchError` naming the first of the fields `names` that differs."""
        mine, theirs = self.plain(), other.plain()
        for name in names:
            if name == "loss" and not (name in mine and name in theirs):
                continue
            if not same(mine[name], theirs[name]):
                raise MismatchError(
                    f"{name} differs: the store has {shown(mine[name], theirs[name])} and this is "
                    f"{shown(theirs[name], mine[name])}; their rows must not be mixed: use "
                    "another folder, or build the store again"
                )

    def plain(self) -> dict[str, Any]:
        """As it is read back from JSON; without a loss where none is known."""
        facts = json.loads(json.dumps(asdict(self)))
        if self.loss is None:
            del facts["loss"]
        return facts

    def write(self, folder: Path) -> None:
        """Write `manifest.json` whole or not at all."""
        facts = {"format": FORMAT, **self.plain()}
        if not self.scale_columns:
            facts["format"] = 1
            del facts["scale_columns"]
        content = json.dumps(facts, indent=1) + "\n"
        write_whole(folder / NAME, [content.encode()])

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read what `write` wrote.

        Raises:
            FormatError: it is missing, damaged or from a newer version.
        """
        path = folder / NAME
        if not path.exists():
            raise FormatError(f"{folder} is not a store: it has no {NAME}")
        content = {"scale_columns": 0, "loss": None, **read_json(path, FORMAT)}
        try:
            known: dict[str, Any] = {f.name: content[f.name] for f in fields(cls)}
            known["columns"] = {
                name: Column(column["dtype"], tuple(column["shape"]))
                for name, column in known["columns"].items()
            }
            return cls(**known)
        except (KeyError, TypeError, AttributeError, DataError) as error:
            raise FormatError(f"{path} is damaged: {error}") from error

    def with_rows(self, rows: int, **changes: Any) -> "Manifest":
        """The same facts about another number of rows."""
        return replace(self, rows=rows, **changes)
