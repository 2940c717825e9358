"""Studies: one command each, from training to a page. One file a study, one row each.

Every module has `run(out, *, quick=False, seed=0, threads=None, ...) -> StudyResult`.
"""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from forebear.errors import ForebearError, unknown_name
from forebear.executors.torchrun import Torchrun
from forebear.studies.base import Finding, Pieces, StudyResult, Table

__all__ = ["STUDIES", "Finding", "Pieces", "StudyResult", "Table", "run"]

STUDIES = {
    "diffusion": "forebear.studies.diffusion",
    "final-model": "forebear.studies.final_model",
    "hessians": "forebear.studies.hessians",
    "removal": "forebear.studies.removal",
}


def run(name: str, out: Path, **options: Any) -> StudyResult:
    """Run a study by its registered name and write its folder.

    Raises:
        UnknownNameError: there is no such study, or it has no such option.
        MissingDependencyError: figures need matplotlib.
        ForebearError: the executor is made of processes that would all run the study.
    """
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    function = import_module(STUDIES[name]).run
    known = [option for option in inspect.signature(function).parameters if option != "out"]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of the study {name}", option, known)
    if isinstance(options.get("executor"), Torchrun):
        raise ForebearError(
            "executor torchrun: a study is one process that gives out work; use processes:N or ray"
        )
    return function(out, **options)
