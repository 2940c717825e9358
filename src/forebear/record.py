"""The record of a run: opened for a model and its data, or refused where they are others."""

import json
import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from forebear.data import Data, batch_length, map_tensors
from forebear.descriptions import same, shown
from forebear.errors import MismatchError
from forebear.methods.fitted import version
from forebear.plan import PROBE, graph_bytes
from forebear.run import IMAGES, DatasetFacts, ModelFacts, Run, scores_folder
from forebear.stream import BATCH, fitting
from forebear.task import Task
from forebear.types import read_json

LONG = 2.0
"""Seconds of a plain pass beyond which it is made once."""


def open_run(
    out: Path, name: str, task: Task, train: Data, queries: Data, *, kind: str = "attribute"
) -> Run:
    """The record of a run of the same model and data, or a new one.

    Args:
        out: folder of the run.
        name: of the data, for people.
        task: what was trained.
        train: the training set.
        queries: what is asked about.
        kind: of a new run, and of one that is there.

    Raises:
        MismatchError: the folder holds a run of another kind, model, loss, measurement or data, or
            one of a version that did not record the loss.
    """
    asked = task.facts()
    model = ModelFacts(
        description=type(task.model).__name__,
        parameters=sum(p.numel() for p in task.model.parameters()),
        hash=task.model_hash(),
        loss=asked["loss"],
        measure=asked["measure"],
    )
    dataset = DatasetFacts(
        name=name, train=len(train), queries=len(queries), fingerprint=train.fingerprint
    )
    if not (out / "run.json").is_file():
        return Run(
            kind=kind,
            title=name,
            created=now(),
            version=version(),
            dataset=dataset,
            model=model,
            plain_pass_seconds=plain_pass_seconds(task, train),
            environment=environment(),
        )
    run = Run.load(out)
    if IMAGES in (run.kind, kind) and run.kind != kind:
        raise MismatchError(
            f"{out} holds a run of another kind ({run.kind!r}, this one is {kind!r}): choose "
            "another --out, or delete the folder"
        )
    scored = [read_json(scores_folder(out, r.name) / "scores.json") for r in run.methods[:1]]
    for what, mine, theirs in (
        ("model", model.hash, run.model and run.model.hash),
        ("training set", dataset.fingerprint, run.dataset and run.dataset.fingerprint),
        *(("set of queries", queries.fingerprint, s["provenance"]["queries"]) for s in scored),
    ):
        if mine != theirs:
            raise MismatchError(
                f"{out} holds a run of another {what} ({theirs}, this one is {mine}): choose "
                "another --out, or delete the folder"
            )
    _require_same_questions(out, run, model)
    return run


def _require_same_questions(out: Path, run: Run, model: ModelFacts) -> None:
    """Refuse to add to scores of another loss: on one page they would be taken for the same."""
    remedy = "choose another --out, or delete the folder"
    for name, noun in (("loss", "loss"), ("measure", "measurement")):
        mine, theirs = getattr(model, name), getattr(run.model, name, None)
        if theirs is None:
            raise MismatchError(
                f"{out} holds a run of a version that did not record the {noun}, so others cannot "
                f"be added to it: {remedy}"
            )
        if not same(theirs, mine):
            raise MismatchError(
                f"{out} holds a run of another {noun} ({shown(theirs, mine)}, this one is "
                f"{shown(mine, theirs)}): {remedy}"
            )


def write_texts(out: Path, texts: Mapping[str, Mapping[Any, str]]) -> None:
    """Texts of examples for people, by id, into the folder of a run."""
    named = {
        side: {str(key): str(text) for key, text in texts.get(side, {}).items()}
        for side in ("train", "queries")
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "examples.json").write_text(json.dumps(named, indent=1) + "\n")


def plain_pass_seconds(task: Task, train: Data, *, batch_size: int = BATCH) -> float:
    """Median time of one plain forward and backward pass over the training set, of three.

    A pass that takes seconds is made once. Batches are so small that they fit into memory.
    """
    parameters = [p for p in task.model.parameters() if p.requires_grad]

    def once(size: int) -> float:
        started = time.perf_counter()
        for _, batch in train.batches(size):
            moved = map_tensors(lambda t: t.to(task.device), batch)
            torch.autograd.grad(
                task.losses(task.model, moved).mean(), parameters, allow_unused=True
            )
        return time.perf_counter() - started

    with task.evaluation(), torch.enable_grad():
        some = map_tensors(lambda t: t.to(task.device), train.batch(slice(0, PROBE)))
        # Gradients on the way back take as much again.
        size = fitting(2 * graph_bytes(task, some) // batch_length(some), batch_size)
        first = once(size)
        return first if first > LONG else median(once(size) for _ in range(3))


def environment() -> dict[str, Any]:
    """Versions and threads, for the record of a run."""
    import scipy

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def now() -> str:
    """The time for a record, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
