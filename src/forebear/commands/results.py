"""Results of runs and studies on a console."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebear.commands.tables import print_table

if TYPE_CHECKING:
    from forebear.studies import StudyResult

SHOWN_QUERIES = 3


def print_top(
    folder: Path,
    label: str,
    lists: dict[str, list[tuple[Any, float]]],
    query: str | None,
    k: int,
    opponents: bool,
) -> None:
    """Print the strongest examples of one query, or of the first few."""
    from forebear.report.material import Examples
    from forebear.run import Run

    examples = Examples(folder, Run.load(folder))
    names = [query] if query is not None else list(lists)[:SHOWN_QUERIES]
    side = "opponents" if opponents else "proponents"
    for name in names:
        about = examples.describe("queries", name)
        print(f"{label}: strongest {side} of query {name}" + (f" ({about})" if about else ""))
        rows = [
            [str(rank), str(example), f"{score:+.4g}", examples.describe("train", example)]
            for rank, (example, score) in enumerate(lists[name][:k], 1)
        ]
        columns = ["rank", "example", "score", "what it is"]
        if not any(row[-1] for row in rows):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        print_table(columns, rows, right=["rank", "example", "score"])
    if len(lists) > len(names) and query is None:
        print(f"{len(lists) - len(names)} more queries: choose one with --query ID")


def print_results(folder: Path) -> None:
    """Print what the methods of a run reached."""
    from forebear.report import words
    from forebear.run import Run

    run = Run.load(folder)
    columns = ["method", "coverage", "time", "× plain pass", "LDS", "95 % interval", "AUC"]
    rows = [
        [
            m.label,
            words.percent(m.coverage) if m.coverage is not None else "–",
            words.duration(m.seconds) if m.seconds is not None else "–",
            words.multiple(m.passes) if m.passes is not None else "–",
            words.number(m.lds.mean) if m.lds else "–",
            words.span(m.lds) if m.lds else "–",
            f"{m.label_error_auc:.3f}" if m.label_error_auc is not None else "–",
        ]
        for m in run.methods
    ]
    print_table(columns, rows, right=columns[1:])
    if run.truth is not None and run.truth.ceiling is not None:
        ceiling = run.truth.ceiling
        print(f"noise ceiling of LDS: {words.number(ceiling.mean)} ({words.span(ceiling)})")
    print("AUC: how well self-influence finds the flipped labels; 0.5 is guessing")
    if (folder / "report.html").is_file():
        print(f"page: {folder / 'report.html'}")


def print_study(result: "StudyResult", folder: Path) -> None:
    """Print the tables and findings of a study."""
    print(result.title)
    for table in result.tables:
        if table.shown:
            print(f"\n{table.title}")
            print_table(list(table.columns), table.texts(), right=table.numeric)
            if table.note:
                print(table.note)
    if result.findings:
        print("\nFindings")
    for finding in result.findings:
        print(f"- {finding.sentence()}")
    print(f"\npage: {folder / 'report.html'}")
