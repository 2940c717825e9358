"""Diffusion models: which method says best which training images made an image?

Scores are held against networks retrained on halves of the images (after Park et al. 2023; Zheng
et al. 2024), and against images made again from the same noise after the strongest were removed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forebear.executors import Executor, InProcess
from forebear.studies.base import StudyResult, fingerprint
from forebear.studies.diffusion import concepts, customised
from forebear.studies.diffusion.entrants import (
    ENTRANTS,
    FIXED,
    PAIRS,
    Entrant,
    Field,
    absent,
    score,
)
from forebear.studies.diffusion.figures import draw
from forebear.studies.diffusion.findings import findings
from forebear.studies.diffusion.judging import Judgement, ceiling, judge, ranked, standardised
from forebear.studies.diffusion.likeness import datamodel
from forebear.studies.diffusion.models import Trained, ground_truth, train, truth_jobs
from forebear.studies.diffusion.removal import (
    Removals,
    before_jobs,
    measures,
    removal_jobs,
    remove,
)
from forebear.studies.diffusion.subjects import subject_of
from forebear.studies.diffusion.tables import spent, tables
from forebear.studies.figure import require_figures
from forebear.studies.jobs import SCORING, TRUTH, Found, Job, TimedPieces, heard
from forebear.training import GroundTruth

SUMMARY = (
    "{m} halves of {n} training images were drawn, and a network was trained on each with {seeds} "
    "seeds. Methods that see the network trained on all images say how much each image counts for "
    "{q} queries, some held out and some made by the network; shown is how well the sums of their "
    "scores foretell the loss of the query under the networks trained on halves."
)


@dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
        trained: the model and its queries.
        truth: what retrained models measure.
        scores: by entrant, `[ridges or 1, q, n]`.
        rows: positions of the queries that an entrant scored, `[q]`.
        judged: by entrant and group of queries, one for each ridge.
        ceilings: agreement between seeds and noise ceiling, by group.
        seconds: of the processor that an entrant took.
        passes: the same over one plain pass, forward and backward, over the training images.
        skipped: why an entrant did not take part.
        warned: what an entrant warned of.
        unlearned: how unlearning of each query went, by entrant: steps, whether the bound was
            reached, and losses.
        removals: of the strongest examples, by how images were compared.
    """

    trained: Trained
    truth: GroundTruth
    scores: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    judged: Mapping[str, Mapping[str, list[Judgement]]]
    ceilings: Mapping[str, tuple[float, float]]
    seconds: Mapping[str, float]
    passes: Mapping[str, float]
    skipped: Mapping[str, str]
    warned: Mapping[str, tuple[str, ...]]
    unlearned: Mapping[str, Mapping[str, list[Any]]]
    removals: Mapping[str, Removals]

    def fixed(self, key: str, group: str) -> Judgement:
        """At the ridge that a fixed rule sets."""
        each = self.judged[key][group]
        return each[FIXED] if len(each) > 1 else each[0]

    def best(self, key: str, group: str) -> Judgement:
        """At the ridge that the ground truth itself would choose."""
        return max(self.judged[key][group], key=lambda one: one.mean)


def run(
    out: Path,
    *,
    task: str = "digits-eps",
    quick: bool = False,
    seed: int = 0,
    threads: int | None = None,
    executor: Executor | None = None,
) -> StudyResult:
    """Train, retrain on halves, score, compare, remove, and write the folder.

    Args:
        out: folder to write; what it holds of the same work is not done again.
        task: `digits-eps`, `digits-edm`, `concepts`, `customised` or `fashion`.
        quick: fewer images, queries and steps; the numbers say nothing.
        seed: of the model.
        threads: to compute with.
        executor: where networks are retrained, scored and removed from; here when left out.

    Raises:
        MissingDependencyError: matplotlib, scikit-learn or the images are not installed.
        MismatchError: the folder holds other work.
    """
    require_figures()
    if threads is not None:
        torch.set_num_threads(threads)
    if task == "concepts":
        return concepts.run(out, quick=quick, seed=seed, executor=executor)
    if task == "customised":
        return customised.run(out, quick=quick, seed=seed, executor=executor)
    subject = subject_of(task, quick=quick, seed=seed)
    start = time.process_time()
    pieces = TimedPieces(out / "pieces", subject.facts(), executor or InProcess())
    measured = measure(train(subject, pieces), pieces)
    truth = measured.truth
    figures = draw(measured, out)
    rest = time.process_time() - start - sum(pieces.made.values())
    result = StudyResult(
        name="diffusion",
        title=f"Attribution of diffusion models: {subject.title}",
        summary=SUMMARY.format(
            m=len(truth.subsets),
            n=len(subject.train),
            seeds=len(truth.seeds),
            q=truth.outcomes.shape[2],
        ),
        settings={
            **subject.facts(),
            "quick": quick,
            "threads": torch.get_num_threads(),
            "executor": str(pieces.executor),
        },
        tables=[*tables(measured), spent(pieces, rest)],
        findings=findings(measured),
        figures=figures,
    )
    result.save(out)
    return result


def measure(trained: Trained, pieces: TimedPieces) -> Measured:
    """Ground truth, scores of every entrant, how they do, and what removals change."""
    field = Field(trained)
    plain = Job(SCORING, "plain-pass", partial(_plain_pass, field))
    entered = {one.key: _scoring(one, field) for one in ENTRANTS if absent(one, field) is None}
    # Nothing here waits for anything else. Long pieces go first, so that no worker is left with one
    # while others have nothing to do; the entrants stand in the order of what they cost.
    retraining = [*truth_jobs(trained.subject, trained.queries), *before_jobs(trained)]
    pieces.make([*retraining, *reversed(entered.values()), plain], "retraining and scoring")
    truth = ground_truth(trained.subject, trained.queries, pieces)
    one_pass = pieces.read(plain)[0]["seconds"].median().item()
    scores: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    warned: dict[str, tuple[str, ...]] = {}
    unlearned: dict[str, dict[str, list[Any]]] = {}
    for entrant in ENTRANTS:
        if entrant.key not in entered:
            skipped[entrant.key] = absent(entrant, field) or ""
            continue
        tensors, about = pieces.read(entered[entrant.key])
        if "refused" in about:
            skipped[entrant.key] = about["refused"]
            continue
        scores[entrant.key], rows[entrant.key] = tensors["scores"], field.rows(entrant)
        seconds[entrant.key] = about["seconds"]
        warned[entrant.key] = tuple(about["warnings"])
        if "unlearning" in about:
            unlearned[entrant.key] = about["unlearning"]
    _add_ensembles(scores, rows, seconds)
    seconds["datamodel"] = pieces.seconds(TRUTH)
    rows["datamodel"] = torch.arange(len(trained.queries))
    scores["datamodel"] = datamodel(truth.subsets, truth.mean_outcomes)[None]
    groups = trained.subject.groups
    return Measured(
        trained=trained,
        truth=truth,
        scores=scores,
        rows=rows,
        judged={
            key: {
                name: _judged(truth, values, rows[key], g)
                for name, g in groups.items()
                if len(of_group(rows[key], g))
            }
            for key, values in scores.items()
        },
        ceilings={name: ceiling(truth, g) for name, g in groups.items()},
        seconds=seconds,
        passes={key: value / one_pass for key, value in seconds.items()},
        skipped=skipped,
        warned={key: texts for key, texts in warned.items() if texts},
        unlearned=unlearned,
        removals=_removals(field, scores, rows, pieces),
    )


def of_group(rows: Tensor, group: slice) -> Tensor:
    """Which of the queries at `rows` belong to a group, as positions among them."""
    return torch.nonzero((rows >= group.start) & (rows < group.stop))[:, 0]


def _judged(truth: GroundTruth, values: Tensor, rows: Tensor, group: slice) -> list[Judgement]:
    places = of_group(rows, group)
    return [judge(each[places], truth, rows[places]) for each in values]


def _scoring(entrant: Entrant, field: Field) -> Job:
    """How the scores of an entrant are made."""
    rows = field.rows(entrant)
    name = f"scores-{entrant.key}-{fingerprint(entrant.settings, rows.tolist())}"
    asked = field.trained.queries.select(rows)
    return Job(SCORING, name, partial(heard, partial(score, entrant, field, asked)))


def _add_ensembles(
    scores: dict[str, Tensor], rows: dict[str, Tensor], seconds: dict[str, float]
) -> None:
    """Means of z-scores, and of ranks, of two members at their fixed ridges."""
    for one, other in PAIRS:
        if one not in scores or other not in scores:
            continue
        common = rows[one] if len(rows[one]) <= len(rows[other]) else rows[other]
        members = []
        for key in (one, other):
            values = scores[key][FIXED if len(scores[key]) > 1 else 0]
            members.append(values[torch.searchsorted(rows[key], common)])
        for how, scaled in (("z", standardised), ("rank", ranked)):
            key = f"{one}+{other}:{how}"
            scores[key] = torch.stack([scaled(each) for each in members]).sum(0).float()[None]
            rows[key], seconds[key] = common, seconds[one] + seconds[other]


def _removals(
    field: Field, scores: Mapping[str, Tensor], rows: Mapping[str, Tensor], pieces: TimedPieces
) -> dict[str, Removals]:
    trained = field.trained
    about, group = trained.subject.removal, trained.subject.groups["generated"]
    chosen = {}
    for key in about.methods:
        if key not in scores:
            continue
        places = of_group(rows[key], group)
        if len(places) >= about.targets:
            values = scores[key]
            chosen[key] = values[FIXED if len(values) > 1 else 0][places]
    pieces.make(removal_jobs(trained, chosen), "removal")
    return {
        name: remove(trained, chosen, pieces, compare)
        for name, compare in measures(field.encoder).items()
    }


def _plain_pass(field: Field) -> Found:
    """Seconds of the processor for a forward and a backward pass over the training images."""
    model, loss = field.trained.model, field.shared
    times = []
    for _ in range(3):
        start = time.process_time()
        for _, batch in field.train.batches(128):
            torch.autograd.grad(loss(model, batch).mean(), list(model.parameters()))
        times.append(time.process_time() - start)
    return {"seconds": torch.tensor(times, dtype=torch.float64)}, {}
