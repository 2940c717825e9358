"""Tables of the study of diffusion models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from forebear import methods
from forebear.studies.base import Cell, Table
from forebear.studies.diffusion.entrants import ENTRANTS, RIDGES
from forebear.studies.diffusion.removal import RANDOM, SEEDS, Changes, Removals
from forebear.studies.jobs import PARTS, TimedPieces

if TYPE_CHECKING:
    from forebear.studies.diffusion import Measured

SIMPLE = ("pixels", "pixels_cosine", "embedding")
"""Likeness of images, for which no diffusion model is needed."""

LABELS = {entrant.key: entrant.label for entrant in ENTRANTS}


def label(key: str) -> str:
    """The name for people of an entrant, an ensemble or an oracle."""
    if key in LABELS:
        return LABELS[key]
    if ":" in key:
        members, how = key.split(":")
        names = " + ".join(LABELS[member] for member in members.split("+"))
        return f"{names}, {'z-scores' if how == 'z' else 'ranks'}"
    return {"datamodel": "Ridge datamodel (oracle)", RANDOM: "Random"}[key]


def tables(measured: "Measured") -> list[Table]:
    """What was measured, by method."""
    found = [_lds(measured), _noise(measured)]
    if any(len(each) > 1 for each in measured.scores.values()):
        found.append(_ridges(measured))
    found += _removed(measured.removals)
    if measured.unlearned:
        found.append(_unlearning(measured))
    found += [_cost(measured), _per_query(measured)]
    return found


def spent(pieces: TimedPieces, rest: float) -> Table:
    """How long the parts of the study took.

    Args:
        pieces: all that the study asked for.
        rest: seconds of this run for what is no piece.
    """
    counts = {part: sum(part == other for other, _ in pieces.used.values()) for part in PARTS}
    rows: list[list[Cell]] = [[part, counts[part], pieces.seconds(part)] for part in PARTS]
    total = sum(pieces.seconds(part) for part in PARTS) + rest
    rows += [["judging, tables and figures", None, rest], ["all", sum(counts.values()), total]]
    shown: list[list[Cell]] = [
        [part, count, round(seconds, 1), f"{seconds / 60:.1f}"]
        for part, count, seconds in rows
        if isinstance(seconds, float)
    ]
    note = (
        "Time of the processor that everything takes from nothing, whichever run did it: pieces "
        "that a stopped run had not finished are not counted."
    )
    return Table("time", "Time", ["part", "pieces", "seconds", "minutes"], shown, note)


def _lds(measured: "Measured") -> Table:
    groups = measured.trained.subject.groups
    rows: list[list[Cell]] = []
    for key, judged in measured.judged.items():
        row: list[Cell] = [label(key)]
        for name in groups:
            known = name in judged
            row.append(measured.fixed(key, name).text if known else None)
            sweeps = known and len(judged[name]) > 1
            row.append(measured.best(key, name).text if sweeps else None)
        row += [len(measured.rows[key]), measured.passes.get(key)]
        rows.append(row)
    columns = ["method"]
    for name in groups:
        columns += [name, f"{name}, oracle ridge"]
    note = (
        "Mean over queries ± half of a 95 % interval from a bootstrap over subsets. The ridge of "
        "the first column is the mean eigenvalue that is not zero; the oracle's was chosen by the "
        "ground truth itself. Passes: time of the processor over that of one forward and backward "
        "pass over the training images, all queries and ridges included; of the datamodel, of the "
        "ground truth. The datamodel was fitted to the subsets it is judged on."
    )
    return Table("lds", "LDS", [*columns, "queries", "passes"], rows, note)


def _noise(measured: "Measured") -> Table:
    rows = [(name, *pair) for name, pair in measured.ceilings.items()]
    note = (
        "Rank correlation between the outcomes of two seeds, and the LDS that it leaves to a "
        "perfect predictor of the mean over all seeds."
    )
    return Table("ceiling", "Noise ceiling", ["queries", "agreement", "ceiling"], rows, note)


def _ridges(measured: "Measured") -> Table:
    rows: list[list[Cell]] = []
    for key, judged in measured.judged.items():
        for name, each in judged.items():
            if len(each) > 1:
                rows.append([label(key), name, *(one.mean for one in each)])
    columns = ["method", "queries", *(f"{ridge:g}" for ridge in RIDGES)]
    note = "Columns are multiples of the mean eigenvalue that is not zero."
    return Table("ridges", "LDS by ridge", columns, rows, note)


def _removed(removals: Mapping[str, Removals]) -> list[Table]:
    found = []
    first = next(iter(removals.values()))
    if first.single:
        rows = [_single(first, key) for key in first.single]
        columns = ["method", "removed", "target", "bystanders", "over random", "AUC", "p"]
        note = (
            "Mean pixel distance of the image that is made again from the same noise. Over random: "
            "the ratio of the targets' means; p: one-sided Mann-Whitney test against random."
        )
        found.append(Table("removal", "Removal for one image at a time", columns, rows, note))
    rows = []
    for measure, each in removals.items():
        for key, mine in each.pooled.items():
            shift, aside = each.pooled_shift(key), each.bystander_shift(key)
            row: list[Cell] = [measure, label(key), int(mine.removed), mine.overlap]
            row += [shift.mean, shift.random, shift.p, aside.mean, aside.random]
            rows.append([*row, each.aim(key).p])
    columns = ["measure", "method", "removed", "overlap", "targets", "random", "p"]
    columns += ["controls", "controls, random", "p over controls"]
    note = (
        "All targets' lists removed at once. Removed: size of their union; overlap: mean share "
        "that two lists have in common. Random: as many random images removed. p: one-sided "
        f"Mann-Whitney test over images, each the mean of {SEEDS} retrainings, that targets moved "
        "more than after the random removal; and that they moved more beyond it than controls did."
    )
    found.append(Table("pooled", "Removal for all targets at once", columns, rows, note))
    return found


def _single(removals: Removals, key: str) -> list[Cell]:
    mine: Changes = removals.single[key]
    row: list[Cell] = [label(key), int(mine.removed)]
    row += [float(mine.targets.mean()), float(mine.bystanders.mean())]
    if key == RANDOM:
        return [*row, None, None, None]
    shift = removals.single_shift(key)
    return [*row, shift.ratio, shift.auc, shift.p]


def _unlearning(measured: "Measured") -> Table:
    rows: list[list[Cell]] = []
    for key, each in measured.unlearned.items():
        stepped = "before" in each  # AbU takes steps of a given length and has no bound
        reached = each["forgotten" if stepped else "converged"]
        names = (None, "after", None) if stepped else ("steps", "forgotten", "retained")
        row: list[Cell] = [label(key), len(reached), sum(reached)]
        row += [None if name is None else float(np.mean(each[name])) for name in names]
        rows.append(row)
    columns = ["method", "queries", "went as it should", "steps", "loss of the query"]
    note = (
        "MUCS should end where the loss of the query reaches 0.95 of that of a network that knows "
        "nothing, within 1,000 steps; a step of AbU should raise it. Steps and losses in the end "
        "are means over queries."
    )
    title = "How unlearning went"
    return Table("unlearning", title, [*columns, "loss of training images"], rows, note)


def _cost(measured: "Measured") -> Table:
    rows: list[list[Cell]] = []
    for entrant in ENTRANTS:
        key = entrant.key
        note = measured.skipped.get(key) or "; ".join(measured.warned.get(key, ()))
        rows.append([entrant.label, measured.seconds.get(key), measured.passes.get(key), note])
    entered = {entrant.method for entrant in ENTRANTS}
    rows += [
        [entry.label, None, None, "takes no part"]
        for name, entry in methods.METHODS.items()
        if name not in entered
    ]
    columns = ["method", "seconds", "passes", "note"]
    note = "Seconds of the processor for fitting and all queries; with ridges, for all ridges."
    return Table("cost", "Time, and what methods had to say", columns, rows, note)


def _per_query(measured: "Measured") -> Table:
    rows: list[list[Cell]] = []
    for key, judged in measured.judged.items():
        for name in judged:
            values = measured.fixed(key, name).values
            rows += [[key, name, query, _plain(value)] for query, value in enumerate(values)]
    return Table(
        "per_query", "LDS of every query", ["method", "queries", "query", "lds"], rows, shown=False
    )


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
