"""`report.html` of a study: one file with its figures inside."""

import base64
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from forebear.report.page import FONTS, environment, font, static

if TYPE_CHECKING:
    from forebear.studies.base import StudyResult


def write_page(study: "StudyResult", folder: Path) -> Path:
    """Write `report.html` and return its path."""
    template = environment().get_template("study.html.j2")
    figures = {
        caption: base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        for name, caption in study.figures.items()
    }
    page = template.render(
        study=study,
        figures=figures,
        created=datetime.fromisoformat(study.created),
        style=static("report.css"),
        fonts={name: font(file) for name, file in FONTS.items()},
    )
    path = folder / "report.html"
    partial = folder / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path
