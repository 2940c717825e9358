"""What of a run goes on the page: some queries with their examples, suspects, curves."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forebear.report import words
from forebear.run import (
    Run,
    read_data,
    read_ids,
    read_self_influence,
    read_texts,
    read_top,
    top_path,
)

QUERIES = 16
STRONGEST = 6
LONG_NAME = 5
"""Letters of a class name above which pictures are wider and a row holds one fewer."""
SUSPECTS = 120
CURVE_POINTS = 120


class Examples:
    """The examples that the page shows, each once, numbered in the order they are asked for."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.data = read_data(folder)
        self.texts = read_texts(folder)
        self.classes = run.dataset.classes if run.dataset is not None else []
        self.shown: dict[tuple[str, str], int] = {}
        ids = next((ids for m in run.methods if (ids := read_ids(folder, m.name))), None)
        queries, train = ids or ([], [])
        self.rows = {
            "queries": {str(name): row for row, name in enumerate(queries)},
            "train": {str(name): row for row, name in enumerate(train)},
        }
        self.query_ids = queries

    @property
    def long_names(self) -> bool:
        """Whether some class name does not fit under a small picture."""
        return any(len(name) > LONG_NAME for name in self.classes)

    @property
    def strongest(self) -> int:
        """How many examples stand in a row."""
        return STRONGEST - 1 if self.long_names else STRONGEST

    def number(self, side: str, name: Any) -> int:
        """The number on the page of an example of `side` (`train` or `queries`)."""
        return self.shown.setdefault((side, str(name)), len(self.shown))

    def row(self, side: str, name: Any) -> int | None:
        """Position of an id in the arrays; an integer id without a list is its own position."""
        known = self.rows[side]
        if known:
            return known.get(str(name))
        return int(name) if str(name).isdigit() else None

    def value(self, column: str, side: str, name: Any) -> Any:
        """What an array of the run says about an example; None where it says nothing."""
        array, row = self.data.get(column), self.row(side, name)
        return None if array is None or row is None or row >= len(array) else array[row]

    def label(self, column: str, side: str, name: Any) -> str | None:
        """The name of a class."""
        value = self.value(column, side, name)
        if value is None:
            return None
        index = int(value)
        return self.classes[index] if 0 <= index < len(self.classes) else str(index)

    def is_flipped(self, name: Any) -> bool:
        """Whether the label of a training example was changed on purpose."""
        return bool(self.value("flipped", "train", name))

    def describe(self, side: str, name: Any) -> str:
        """An example in a few words: its text or its label, and what the label really is."""
        about = self._facts(side, str(name))
        if about["text"]:
            return about["text"]
        label = about["label"] or ""
        return f"{label} (really {about['true']}: flipped)" if about["flipped"] else label

    def facts(self) -> list[dict[str, Any]]:
        """Every example shown: id, given and true label, whether flipped, text."""
        return [self._facts(side, name) for side, name in self.shown]

    def _facts(self, side: str, name: str) -> dict[str, Any]:
        train = side == "train"
        true = self.label("train_labels" if train else "query_labels", side, name)
        given = self.label("train_given_labels", side, name) if train else None
        return {
            "id": name,
            "label": given or true,
            "true": true,
            "flipped": train and self.is_flipped(name),
            "text": self.texts[side].get(name),
        }

    def pictures(self) -> np.ndarray | None:
        """`[m, h, w]` pictures of the examples shown; None where the run has no images."""
        train, queries = self.data.get("train_images"), self.data.get("query_images")
        if train is None or queries is None or not self.shown:
            return None
        blank = np.zeros_like(train[0])
        found = []
        for side, name in self.shown:
            picture = self.value("train_images" if side == "train" else "query_images", side, name)
            found.append(blank if picture is None else picture)
        return np.stack(found)


Ranked = list[tuple[int, float]]
"""Examples by their number on the page, with scores."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query with the examples that pushed it up and down, a list for each method."""

    example: int
    prediction: str | None
    wrong: bool
    proponents: dict[str, Ranked] = field(default_factory=dict)
    opponents: dict[str, Ranked] = field(default_factory=dict)


def queries(folder: Path, run: Run, examples: Examples) -> list[Query]:
    """The queries worth looking at: mistakes, those that met a planted error, one of each class."""
    tops = {
        method.name: (
            read_top(folder, method.name).by_query(),
            read_top(folder, method.name, opponents=True).by_query(),
        )
        for method in run.methods
        if top_path(folder, method.name).is_file()
        and top_path(folder, method.name, opponents=True).is_file()
    }
    if not tops:
        return []
    best = run.best if run.best in tops else next(iter(tops))
    return [
        _query(name, tops, examples) for name in _chosen(list(tops[best][0]), tops[best], examples)
    ]


def _query(
    name: str, tops: dict[str, tuple[dict[str, list], dict[str, list]]], examples: Examples
) -> Query:
    def ranked(rows: list[tuple[Any, float]], sign: int) -> Ranked:
        # The tail of a short list may have crossed zero: those are not proponents (opponents).
        strong = [(example, score) for example, score in rows if score * sign > 0]
        return [(examples.number("train", e), score) for e, score in strong[: examples.strongest]]

    label = examples.label("query_labels", "queries", name)
    prediction = examples.label("query_predictions", "queries", name)
    return Query(
        example=examples.number("queries", name),
        prediction=prediction,
        wrong=None not in (label, prediction) and label != prediction,
        proponents={method: ranked(top[0].get(name, []), 1) for method, top in tops.items()},
        opponents={method: ranked(top[1].get(name, []), -1) for method, top in tops.items()},
    )


def _chosen(
    names: list[str], tops: tuple[dict[str, list], dict[str, list]], examples: Examples
) -> list[str]:
    labels = {name: examples.label("query_labels", "queries", name) for name in names}
    wrong = [
        name
        for name in names
        if labels[name] != examples.label("query_predictions", "queries", name)
        and labels[name] is not None
    ]
    met = [
        name
        for name in names
        if any(
            examples.is_flipped(example)
            for side in tops
            for example, _ in side.get(name, [])[: examples.strongest]
        )
    ]
    both = [name for name in wrong if name in set(met)]
    order = [*both[:3], *wrong[:4], *met[:4], *_one_of_each(labels), *names]
    return list(dict.fromkeys(order))[:QUERIES]


def _one_of_each(labels: dict[str, str | None]) -> Iterable[str]:
    first: dict[str | None, str] = {}
    for name, label in labels.items():
        first.setdefault(label, name)
    return first.values()


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """The head of a method's list of suspicious training labels.

    Attributes:
        examples: numbers on the page, most suspicious first.
        finding: what they hold, in a sentence; empty where no errors were planted.
        curve: `(share of the list read, share of the planted errors found)`.
    """

    examples: list[int]
    finding: str = ""
    curve: list[tuple[float, float]] = field(default_factory=list)


def suspects(folder: Path, run: Run, examples: Examples) -> dict[str, Suspects]:
    """Training examples by self-influence, for each method that has it."""
    found = {}
    for method in run.methods:
        influence = read_self_influence(folder, method.name)
        if influence is None or not len(influence) or not examples.data:
            continue
        ids = list(examples.rows["train"]) or [str(i) for i in range(len(influence))]
        order = np.argsort(-influence, kind="stable")
        head = order[: min(SUSPECTS, max(1, len(order) // 10))]
        flipped = examples.data.get("flipped")
        known = flipped is not None and len(flipped) == len(order) and flipped.any()
        found[method.name] = Suspects(
            examples=[examples.number("train", ids[row]) for row in head],
            finding=words.suspects_finding(
                run, method.name, int(flipped[head].sum()), len(head), int(flipped.sum())
            )
            if known and flipped is not None
            else "",
            curve=_curve(flipped[order]) if known and flipped is not None else [],
        )
    return found


def _curve(flipped: np.ndarray) -> list[tuple[float, float]]:
    shares = np.concatenate([[0.0], np.cumsum(flipped) / flipped.sum()])
    # Finer at the head, where people look first.
    at = np.unique(np.rint(np.linspace(0, 1, CURVE_POINTS) ** 2 * len(flipped)).astype(int))
    return [(round(i / len(flipped), 5), round(float(shares[i]), 5)) for i in at]
