"""Builds `report.html` of a run: one file with its pictures, charts, type and data inside."""

import base64
import json
import math
from dataclasses import asdict
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from forebear.report import words
from forebear.report.descriptions import described
from forebear.report.material import Examples, Query, Suspects, queries, suspects
from forebear.report.thumbnails import Sprite, sprite
from forebear.run import IMAGES, MethodResult, Run

LOW_COVERAGE = 0.95
OPTIONAL = ("passes", "lds", "found_in_first_10_percent", "label_error_auc")
"""Columns of the table of methods that are left out where no method has them."""


def write(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run.

    Sections whose data the run does not have are left out.

    Returns:
        The path of the page.

    Raises:
        FormatError: `run.json` or a file beside it is missing or damaged.
    """
    folder = Path(folder)
    page = render(folder)
    path = folder / "report.html"
    partial = folder / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def render(folder: Path) -> str:
    """The page of a run as text."""
    run = Run.load(folder)
    if run.kind == IMAGES:
        from forebear.report.generated import render_images  # which needs what is below

        return render_images(folder, run)
    examples = Examples(folder, run)
    shown = queries(folder, run, examples)
    suspicious = suspects(folder, run, examples)
    pictures = examples.pictures()
    tiles = sprite(pictures) if pictures is not None else None
    facts = examples.facts()
    finder = words.best_at_labels(run)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            words=words,
            title=words.title(run),
            headline=words.headline(run),
            figures=_figures(run),
            examples=facts,
            queries=shown,
            query_methods=[m for m in run.methods if shown and m.name in shown[0].proponents],
            query_method=_first(run.best, shown[0].proponents if shown else {}),
            suspects=suspicious,
            suspect_methods=[m for m in run.methods if m.name in suspicious],
            suspect_method=_first(finder.name if finder else run.best, suspicious),
            methods=_ranked(run.methods),
            has={key: any(getattr(m, key) is not None for m in run.methods) for key in OPTIONAL},
            places=examples.strongest,
            low_coverage=LOW_COVERAGE,
            created=date(run.created),
            sprite=tiles,
            long_names=examples.long_names,
            style=static("report.css"),
            fonts={name: font(file) for name, file in FONTS.items()},
            scripts=[
                static("vendor/d3.min.js"),
                static("vendor/plot.umd.min.js"),
                static("report.js"),
            ],
            payload=embed(_payload(run, facts, shown, suspicious, tiles)),
        )
    )


FONTS = {
    "Inter": "inter-latin-wght-normal.woff2",
    "Source Serif 4": "source-serif-4-latin-wght-normal.woff2",
}


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: no `<`, and null for what is not finite."""
    return json.dumps(_finite(value), separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _payload(
    run: Run,
    facts: list[dict[str, Any]],
    shown: list[Query],
    suspicious: dict[str, Suspects],
    tiles: Sprite | None,
) -> dict[str, Any]:
    ceiling = run.truth.ceiling if run.truth is not None else None
    return {
        "examples": facts,
        "columns": tiles.columns if tiles is not None else 0,
        "labels": {m.name: m.label for m in run.methods},
        "best": run.best,
        "queries": [
            {"example": q.example, "proponents": q.proponents, "opponents": q.opponents}
            for q in shown
        ],
        "suspects": {
            name: {"examples": s.examples, "finding": s.finding, "curve": s.curve}
            for name, s in suspicious.items()
        },
        "lds": [
            {"name": m.name, "label": m.label, **asdict(m.lds)}
            for m in _ranked(run.methods)
            if m.lds is not None
        ],
        "ceiling": asdict(ceiling) if ceiling is not None else None,
        "removal": asdict(run.removal) if run.removal is not None else None,
    }


def _figures(run: Run) -> list[tuple[str, str]]:
    """Up to four numbers for the top of the page, each with what it is."""
    best, truth = run.best_method, run.truth
    figures = []
    if best is not None and best.lds is not None:
        figures.append(
            (words.number(best.lds.mean), f"rank correlation of {best.label} with real retraining")
        )
    if truth is not None:
        figures.append(
            (words.count(truth.subsets * truth.seeds), "models retrained to check the scores")
        )
    if best is not None and best.passes is not None:
        figures.append(
            (
                words.multiple(best.passes),
                f"the time of one plain training pass, for all scores of {best.label}",
            )
        )
    if best is not None and best.coverage is not None:
        figures.append(
            (words.percent(best.coverage), f"of the model’s parameters seen by {best.label}")
        )
    return figures


def _ranked(methods: list[MethodResult]) -> list[MethodResult]:
    """Best LDS first; methods without one keep their order at the end."""
    return sorted(methods, key=lambda m: -m.lds.mean if m.lds is not None else math.inf)


def _first(wanted: str | None, known: dict[str, Any]) -> str | None:
    return wanted if wanted in known else next(iter(known), None)


def date(created: str) -> str:
    """A time of a record as people write it."""
    try:
        return datetime.fromisoformat(created).strftime("%-d %B %Y, %H:%M")
    except ValueError:
        return created


def static(name: str) -> str:
    """A script or style sheet of the pages, ready to be inlined."""
    content = (resources.files("forebear.report") / "static" / name).read_text(encoding="utf-8")
    # A closing tag inside a string of a library would end the element it is inlined in.
    return content.replace("</script", "<\\/script").replace("</style", "<\\/style")


def font(file: str) -> str:
    """A vendored font in base64."""
    content = (resources.files("forebear.report") / "static" / "vendor" / file).read_bytes()
    return base64.b64encode(content).decode()


def environment() -> Any:
    """The templates of all pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("forebear.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        percent=words.percent,
        number=words.number,
        count=words.count,
        multiple=words.multiple,
        duration=words.duration,
        span=words.span,
        described=described,
    )
    return templates
