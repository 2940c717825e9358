"""The folder of a run: `run.json` and the files beside it, readable without forebear.

    run.json                            what was done and what came out (`Run`)
    scores/METHOD/                      the score matrix (`forebear.types.Scores.save`)
    top/METHOD.parquet                  query, rank, example, score: strongest proponents
    top/METHOD-opponents.parquet        the same for opponents
    self_influence/METHOD.npy           [n]
    truth/                              retrained models' outcomes
    data.safetensors                    images, labels and which labels were flipped
    examples.json                       {"train": {id: text}, "queries": {id: text}}
    gallery.json                        of generated images: what the page shows (`Gallery`)
    report.html                         the page

Nothing here imports torch, so that commands which only read a run start at once.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from forebear.errors import FormatError, unknown_name

FORMAT = 1
IMAGES = "images"
"""Kind of a run on generated images, which has a page of its own (`forebear.gallery`)."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What was trained on and asked about; `image_shape` is `[h, w]` or None."""

    name: str
    train: int
    queries: int
    classes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    image_shape: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What was trained; accuracies are shares of one.

    `loss` and `measure` are descriptions of what training lowered and of what is asked; None in
    records of earlier versions.
    """

    description: str
    parameters: int
    hash: str = ""
    train_accuracy: float | None = None
    query_accuracy: float | None = None
    loss: Any = None
    measure: Any = None


@dataclass(frozen=True, kw_only=True)
class TruthFacts:
    """How the ground truth was made.

    Attributes:
        subsets: how many subsets were drawn.
        seeds: how many models were trained on each.
        fraction: share of the training set in a subset.
        agreement: mean rank correlation between two halves of the retrainings.
        ceiling: the highest LDS that the noise of retraining allows.
        seconds: time of all retrainings.
    """

    subsets: int
    seeds: int
    fraction: float
    agreement: float | None = None
    ceiling: Interval | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method: what it cost, what it saw and how well it did.

    Attributes:
        name: registered name, e.g. `ekfac`.
        label: name for people, e.g. `EK-FAC`.
        coverage: share of the trainable parameters seen.
        units: `removal` or `ranking`.
        passes: time as a multiple of one plain forward and backward pass over the training set.
        lds: linear datamodelling score.
        label_error_auc: area under the ROC curve of finding flipped labels.
        found_in_first_10_percent: share of the flipped labels in the first tenth of the list.
    """

    name: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    coverage: float | None = None
    units: str = ""
    seconds: float | None = None
    passes: float | None = None
    lds: Interval | None = None
    label_error_auc: float | None = None
    found_in_first_10_percent: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelErrors:
    """How many training labels were flipped on purpose."""

    flipped: int


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What happened to the measurement when the strongest examples were removed.

    Attributes:
        fractions: shares of the training set removed.
        curves: method name to one value a fraction.
        measurement: what the values are, in words.
    """

    fractions: list[float]
    curves: dict[str, list[float]]
    measurement: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything in `run.json`; whatever was not measured is None or empty."""

    kind: str
    title: str = ""
    created: str = ""
    version: str = ""
    seconds: float | None = None
    dataset: DatasetFacts | None = None
    model: ModelFacts | None = None
    plain_pass_seconds: float | None = None
    truth: TruthFacts | None = None
    label_errors: LabelErrors | None = None
    methods: list[MethodResult] = field(default_factory=list)
    removal: Removal | None = None
    best: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Read `run.json` of `folder`.

        Raises:
            FormatError: it is missing, damaged, or written by a newer version.
        """
        path = Path(folder) / "run.json"
        if not path.is_file():
            raise FormatError(
                f"{folder} is not a run folder: it has no run.json; "
                "make one with 'forebear demo' or 'forebear attribute'"
            )
        content = read_object(path)
        version = content.get("format", 1)
        if not isinstance(version, int) or version > FORMAT:
            raise FormatError(
                f"{path} has format {version!r} and this version reads up to {FORMAT}: "
                "upgrade forebear"
            )
        return typed(cls, content, str(path))

    def save(self, folder: str | Path) -> Path:
        """Write `run.json` into `folder`, whole or not at all, and return its path."""
        path = Path(folder) / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        partial.replace(path)
        return path

    def method(self, name: str) -> MethodResult:
        """The result of the method called `name`.

        Raises:
            UnknownNameError: this run has no such method.
        """
        for result in self.methods:
            if result.name == name:
                return result
        raise unknown_name("method of this run", name, [result.name for result in self.methods])

    @property
    def best_method(self) -> MethodResult | None:
        """The method to show first: the one called best, else the first."""
        if self.best is not None:
            return self.method(self.best)
        return self.methods[0] if self.methods else None


@dataclass(frozen=True, kw_only=True)
class TopRows:
    """Rows of a top-k table, in the order of the file: by query, strongest first."""

    query: list[Any]
    rank: list[int]
    example: list[Any]
    score: list[float]

    def by_query(self) -> dict[str, list[tuple[Any, float]]]:
        """Query id as text to its examples and scores, strongest first."""
        lists: dict[str, list[tuple[Any, float]]] = {}
        for query, example, score in zip(self.query, self.example, self.score, strict=True):
            lists.setdefault(str(query), []).append((example, score))
        return lists


def scores_folder(folder: str | Path, method: str) -> Path:
    """Where the score matrix of `method` is."""
    return Path(folder) / "scores" / method


def top_path(folder: str | Path, method: str, *, opponents: bool = False) -> Path:
    """Where the strongest proponents, or opponents, of `method` are."""
    return Path(folder) / "top" / f"{method}{'-opponents' if opponents else ''}.parquet"


def self_influence_path(folder: str | Path, method: str) -> Path:
    """Where the self-influence of `method` is."""
    return Path(folder) / "self_influence" / f"{method}.npy"


def read_top(folder: str | Path, method: str, *, opponents: bool = False) -> TopRows:
    """The strongest proponents of every query, or opponents.

    Raises:
        FormatError: the file is missing or damaged.
    """
    path = top_path(folder, method, opponents=opponents)
    if not path.is_file():
        raise FormatError(
            f"{path} does not exist: the run kept no top list of {method!r}; run it again"
        )
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [column.name for column in fields(TopRows)]
    try:
        columns = pq.ParquetFile(path).read(columns=names).to_pydict()
        return TopRows(**columns)
    except (pa.ArrowException, OSError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path} is damaged ({first}): delete it and run again") from error


def read_self_influence(folder: str | Path, method: str) -> np.ndarray | None:
    """Self-influence `[n]` of `method`; None where the run has none."""
    path = self_influence_path(folder, method)
    if not path.is_file():
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise FormatError(f"{path} is damaged ({error}): delete it and run again") from error


def read_data(folder: str | Path) -> dict[str, np.ndarray]:
    """Arrays of `data.safetensors` by name; empty where the run has none."""
    path = Path(folder) / "data.safetensors"
    if not path.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}): delete it and run again") from error


def read_texts(folder: str | Path) -> dict[str, dict[str, str]]:
    """Texts of examples: `{"train": {id: text}, "queries": {id: text}}`; empty where none."""
    path = Path(folder) / "examples.json"
    content = read_object(path) if path.is_file() else {}
    return {side: dict(content.get(side, {})) for side in ("train", "queries")}


def read_ids(folder: str | Path, method: str) -> tuple[list[Any], list[Any]] | None:
    """Ids of queries and training examples that scores of `method` were saved with."""
    path = scores_folder(folder, method) / "scores.json"
    if not path.is_file():
        return None
    content = read_object(path)
    return content.get("query_ids", []), content.get("train_ids", [])


def read_object(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        FormatError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path} is damaged ({error}): delete it and run again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def typed(cls: type[T], content: Any, where: str) -> T:
    """A dataclass from JSON. Keys that this version does not know are left out."""
    if not isinstance(content, Mapping):
        raise FormatError(f"{where} is damaged: expected an object, found {content!r}")
    hints = get_type_hints(cls)
    known = {name: content[name] for name in hints if name in content}
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in known.items()}
    try:
        return cls(**values)
    except TypeError as error:
        missing = str(error).split("argument")[-1].lstrip("s: ")
        raise FormatError(f"{where} is damaged: it lacks {missing}; run again") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None:
            return None
        return _value(next(kind for kind in inner if kind is not type(None)), value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return typed(hint, value, where)
    if origin is list and isinstance(value, list):
        return [_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise FormatError(f"{where} is damaged: {value!r} is not of the expected kind; run again")
