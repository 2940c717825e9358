"""The page for people: what the store is, and the neighbours of a row."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, Template


def page(facts: dict[str, Any], asked: dict[str, Any], found: Any, error: str) -> str:
    """HTML that needs nothing else: no script, no other file, no network.

    Args:
        facts: about the store.
        asked: what stands in the form.
        found: an answer and the row it is about; None before anything was asked.
        error: why there is no answer.
    """
    rows: list[dict[str, Any]] = found[0]["answers"][0]["rows"] if found else []
    largest = max((abs(row["score"]) for row in rows), default=0.0)
    for row in rows:
        row["share"] = round(100 * abs(row["score"]) / largest, 1) if largest else 0.0
    about = found[1] if found else None
    return _template().render(
        facts=facts, asked=asked, rows=rows, about=about, found=found is not None, error=error
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("forebear.service"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["score"] = lambda value: f"{value:+.4g}".replace("-", "−")
    environment.filters["shown"] = lambda value: "–" if value is None else str(value)
    return environment.get_template("index.html.j2")
