"""What a study is: a module with `run(out, ...)`, and a result that is a folder for anyone to read.

The folder holds `study.json` (settings, findings and what the tables are), one Parquet file a
table, `study.md`, the figures as PNG and SVG, and `report.html`, one file that needs no network.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from forebear.errors import DataError, FormatError, MismatchError
from forebear.executors import write_tensors
from forebear.types import read_json, read_tensors, write_json

Cell = str | float | int | bool | None


@dataclass(frozen=True)
class Table:
    """Numbers under named columns.

    Attributes:
        name: of its file, without ending.
        title: for people.
        columns: their names.
        rows: one cell a column; None where there is no value.
        note: what a reader must know to read it.
        shown: whether pages and the terminal show it; long ones are only written.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    shown: bool = True

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise DataError(
                    f"a row of table {self.name!r} has {len(row)} cells for {len(self.columns)} "
                    f"columns: {row!r}"
                )

    def texts(self) -> list[list[str]]:
        """The cells as people read them."""
        return [[_text(cell) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[str]:
        """Columns that hold numbers only, to be aligned on the right."""
        kinds = zip(self.columns, zip(*self.rows, strict=True), strict=True) if self.rows else ()
        return [
            name
            for name, cells in kinds
            if all(cell is None or isinstance(cell, int | float) for cell in cells)
        ]

    def markdown(self) -> str:
        """The table in Markdown."""
        numeric = set(self.numeric)
        rule = [("---:" if name in numeric else "---") for name in self.columns]
        lines = [list(self.columns), rule, *self.texts()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def write(self, folder: Path) -> None:
        """Write `<name>.parquet`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns)
        arrays = {name: list(cells) for name, cells in zip(self.columns, columns, strict=True)}
        pq.write_table(pa.table(arrays), folder / f"{self.name}.parquet")

    @classmethod
    def read(cls, folder: Path, about: Mapping[str, Any]) -> "Table":
        """Read what `write` wrote; `about` holds everything but the rows."""
        import pyarrow.parquet as pq

        path = folder / f"{about['name']}.parquet"
        if not path.is_file():
            raise FormatError(f"{path} does not exist")
        columns = pq.read_table(path).to_pydict()
        return cls(**about, rows=list(zip(*columns.values(), strict=True)))


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, or of forebear, held against what was measured.

    Attributes:
        claim: one sentence.
        expected: what should come out, with its number.
        measured: what came out.
        holds: whether it did; None where these data cannot tell.
    """

    claim: str
    expected: str
    measured: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """`holds`, `does not hold` or `not judged`."""
        return {True: "holds", False: "does not hold", None: "not judged"}[self.holds]

    def sentence(self) -> str:
        """Claim, expectation, measurement and verdict in one line."""
        expected = f" Expected: {self.expected}." if self.expected else ""
        verdict = self.verdict if self.holds is not None else f"is {self.verdict}"
        return f"{self.claim}{expected} Measured: {self.measured}. This {verdict}."


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study found.

    Attributes:
        name: as registered.
        title: for people; one line.
        summary: what was asked and done, in a few sentences.
        settings: everything that decides the numbers.
        tables: of numbers.
        findings: claims held against them.
        figures: captions by name; each has a PNG and an SVG of that name.
        created: when, in UTC.
        version: of forebear.
    """

    name: str
    title: str
    summary: str = ""
    settings: Mapping[str, Any]
    tables: Sequence[Table] = ()
    findings: Sequence[Finding] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = field(default_factory=lambda: version("forebear"))

    def save(self, folder: str | Path) -> Path:
        """Write the whole folder; figures are expected to be there.

        Returns:
            The path of the page.
        """
        from forebear.studies.page import write_page

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for table in self.tables:
            table.write(folder)
        (folder / "study.md").write_text(self.markdown(), encoding="utf-8")
        write_json(folder / "study.json", self._facts())
        return write_page(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> "StudyResult":
        """Read what `save` wrote.

        Raises:
            FormatError: a file is missing or damaged.
        """
        folder = Path(folder)
        facts = read_json(folder / "study.json")
        try:
            return cls(
                name=facts["name"],
                title=facts["title"],
                summary=facts["summary"],
                settings=facts["settings"],
                tables=[Table.read(folder, about) for about in facts["tables"]],
                findings=[Finding(**finding) for finding in facts["findings"]],
                figures=facts["figures"],
                created=facts["created"],
                version=facts["version"],
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{folder} does not hold a whole study: {error}") from error

    def markdown(self) -> str:
        """Everything in Markdown."""
        parts = [f"# {self.title}", self.summary]
        if self.findings:
            parts.append("## Findings")
            parts.append("\n".join(f"- {finding.sentence()}" for finding in self.findings))
        for name, caption in self.figures.items():
            parts.append(f"![{caption}]({name}.svg)\n\n{caption}")
        for table in self.tables:
            if table.shown:
                parts += [f"## {table.title}", table.markdown(), table.note]
            else:
                parts.append(f"`{table.name}.parquet`: {table.title}")
        settings = json.dumps(dict(self.settings), indent=1, default=str)
        parts += ["## Settings", f"```json\n{settings}\n```"]
        parts.append(f"Made with forebear {self.version} on {self.created}.")
        return "\n\n".join(part for part in parts if part) + "\n"

    def _facts(self) -> dict[str, Any]:
        tables = [{k: v for k, v in asdict(t).items() if k != "rows"} for t in self.tables]
        plain = json.loads(json.dumps(dict(self.settings), default=str))
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "settings": plain,
            "tables": tables,
            "findings": [asdict(finding) for finding in self.findings],
            "figures": dict(self.figures),
            "created": self.created,
            "version": self.version,
        }


@dataclass(frozen=True)
class Pieces:
    """Finished pieces of a long study, so that the same command goes on where it was stopped.

    Attributes:
        folder: where they are kept.
        settings: what decides the numbers; a folder made with others is refused.
    """

    folder: Path
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "work.json"
        facts = json.loads(json.dumps(dict(self.settings), default=str))
        if not path.exists():
            write_json(path, {"settings": facts})
            return
        stored = read_json(path).get("settings", {})
        for name in sorted({*facts, *stored}):
            if stored.get(name) != facts.get(name):
                raise MismatchError(
                    f"{name} differs: {self.folder} holds work with {stored.get(name)!r} and this "
                    f"is {facts.get(name)!r}; choose another --out or delete that folder"
                )

    def has(self, name: str) -> bool:
        """Whether the piece of that name is there."""
        return self._path(name).is_file()

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The piece of that name: read when it is there, made and written otherwise."""
        if self.has(name):
            return read_tensors(self._path(name))
        made = make()
        write_tensors(self._path(name), made)
        return made

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def fingerprint(*parts: Any) -> str:
    """A short name for settings, to name a piece with."""
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _text(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if not isinstance(cell, float):
        return str(cell)
    size = abs(cell)
    if size and not 0.001 <= size < 10_000:
        return f"{cell:.2e}"
    return f"{cell:.3f}" if size < 10 else f"{cell:.4g}"
