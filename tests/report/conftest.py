"""A small real run: ridge regression on digits with planted label errors, really retrained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from forebear.run import (
    DatasetFacts,
    Interval,
    LabelErrors,
    MethodResult,
    ModelFacts,
    Removal,
    Run,
    TruthFacts,
    scores_folder,
    self_influence_path,
    top_path,
)
from forebear.types import Provenance, Scores

TRAIN, QUERIES, FLIPPED, SUBSETS = 240, 30, 16, 24
CLASSES = [str(i) for i in range(10)]


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ np.eye(10)[y])


def interval(values: np.ndarray) -> Interval:
    rng = np.random.default_rng(0)
    means = rng.choice(values, (500, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    digits = load_digits()
    rows = rng.permutation(len(digits.target))[: TRAIN + QUERIES]
    images = (digits.images[rows] * 15).astype(np.uint8)
    x, labels = digits.data[rows] / 16, digits.target[rows].astype(np.int64)
    flipped = np.zeros(TRAIN, dtype=bool)
    flipped[rng.choice(TRAIN, FLIPPED, replace=False)] = True
    given = labels[:TRAIN].copy()
    given[flipped] = (given[flipped] + rng.integers(1, 10, FLIPPED)) % 10
    xt, xq, yq = x[:TRAIN], x[TRAIN:], labels[TRAIN:]
    weights = fit(xt, given)
    rt, rq = xt @ weights - np.eye(10)[given], xq @ weights - np.eye(10)[yq]
    curvature = np.linalg.inv(xt.T @ xt + 0.1 * np.eye(64))
    found = {
        "graddot": ((rq @ rt.T) * (xq @ xt.T), (rt**2).sum(1) * (xt**2).sum(1)),
        "exact": (
            (rq @ rt.T) * (xq @ curvature @ xt.T),
            (rt**2).sum(1) * np.einsum("ij,jk,ik->i", xt, curvature, xt),
        ),
        "random": (rng.normal(size=(QUERIES, TRAIN)), rng.random(TRAIN)),
    }
    subsets = np.stack([rng.permutation(TRAIN) < TRAIN // 2 for _ in range(SUBSETS)])
    outcomes = np.stack(
        [-((xq @ fit(xt[s], given[s]) - np.eye(10)[yq]) ** 2).sum(1) / 2 for s in subsets]
    )
    methods = []
    for name, (values, influence) in found.items():
        scores = Scores(
            values=torch.from_numpy(values),
            query_ids=np.arange(QUERIES),
            train_ids=np.arange(TRAIN),
            provenance=Provenance(method=name),
        )
        scores.save(scores_folder(folder, name))
        for path in (top_path(folder, name), self_influence_path(folder, name)):
            path.parent.mkdir(exist_ok=True)
        scores.top(8).to_parquet(top_path(folder, name))
        scores.top(8, opponents=True).to_parquet(top_path(folder, name, opponents=True))
        np.save(self_influence_path(folder, name), influence)
        forecast = subsets @ values.T  # [subsets, queries]
        lds = np.array([spearmanr(forecast[:, q], outcomes[:, q])[0] for q in range(QUERIES)])
        head = np.argsort(-influence)[: TRAIN // 10]
        methods.append(
            MethodResult(
                name=name,
                label={"graddot": "GradDot", "exact": "Exact", "random": "Random"}[name],
                settings={"damping": 0.1} if name == "exact" else {},
                coverage=1.0,
                seconds=0.01,
                passes=2.5,
                lds=interval(lds),
                label_error_auc=float(roc_auc_score(flipped, influence)),
                found_in_first_10_percent=float(flipped[head].sum() / FLIPPED),
            )
        )
    predictions = (xq @ weights).argmax(1)
    save_file(
        {
            "train_images": np.ascontiguousarray(images[:TRAIN]),
            "query_images": np.ascontiguousarray(images[TRAIN:]),
            "train_labels": labels[:TRAIN].copy(),
            "train_given_labels": given,
            "query_labels": yq.copy(),
            "query_predictions": predictions,
            "flipped": flipped,
        },
        folder / "data.safetensors",
    )
    Run(
        kind="demo",
        title="Digits",
        created="2026-01-02T03:04:05",
        version="0.1.0",
        dataset=DatasetFacts(
            name="digits", train=TRAIN, queries=QUERIES, classes=CLASSES, image_shape=[8, 8]
        ),
        model=ModelFacts(description="ridge regression", parameters=640, hash="abc"),
        plain_pass_seconds=0.004,
        truth=TruthFacts(
            subsets=SUBSETS, seeds=1, fraction=0.5, ceiling=Interval(mean=1.0, low=1.0, high=1.0)
        ),
        label_errors=LabelErrors(flipped=FLIPPED),
        methods=methods,
        removal=Removal(
            fractions=[0.0, 0.1], curves={"exact": [-0.1, -0.4], "random": [-0.1, -0.15]}
        ),
        best=max(methods, key=lambda m: m.lds.mean if m.lds else 0.0).name,
        environment={"numpy": np.__version__},
    ).save(folder)
    return folder
