"""How a model's measurements respond when it is trained further without an example."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError, FormatError, MismatchError, NumericalWarning
from forebear.executors import write_tensors
from forebear.metrics.reliability import Agreement, split_half_reliability
from forebear.types import Provenance, Scores, read_json, read_tensors, write_json

Adjustment = Literal["full", "mean"]

ROUNDING = 10.0
"""A gold value below so many units in the last place, over √seeds, may be rounding."""

ROUNDED_SHARE = 0.05
"""Share of such values from which a warning is given."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """Measurements of every query after further training with and without groups of examples.

    Attributes:
        outcomes: `[seeds, amounts, q, m]`, the measurement without each group.
        full: `[seeds, amounts, q]`, the same after training on everything.
        amounts: epochs of further training.
        steps: steps made on everything at each amount.
        learning_rate: of the further training.
        groups: positions of the examples that each run lacked, m of them.
        fraction: of their weight that was removed.
        adjustment: the default one of `gold`.
        seeds: of the order of the examples.
        train_ids: ids of the left-out examples, or a name for each group; `[m]`.
        query_ids: `[q]`.
        model: hash of the model that was trained further.
        train: fingerprint of the training set.
        queries: fingerprint of the queries.
        measure: name of the measurement.
        settings: of the further training, with the names of parameters that were not trained.
        version: of forebear.
    """

    outcomes: Tensor
    full: Tensor
    amounts: tuple[float, ...]
    steps: tuple[int, ...]
    learning_rate: float
    groups: tuple[tuple[int, ...], ...]
    fraction: float
    adjustment: Adjustment
    seeds: tuple[int, ...]
    train_ids: np.ndarray
    query_ids: np.ndarray
    model: str
    train: str
    queries: str
    measure: str
    settings: Mapping[str, Any]
    version: str

    @property
    def horizons(self) -> tuple[float, ...]:
        """The amounts as η·T: learning rate times steps."""
        return tuple(self.learning_rate * steps for steps in self.steps)

    @property
    def left_out(self) -> Tensor:
        """Position of the example that each run lacked, `[m]`.

        Raises:
            DataError: groups of several examples were left out.
        """
        if any(len(group) > 1 for group in self.groups):
            raise DataError("groups of several examples were left out: see groups")
        return torch.tensor([group[0] for group in self.groups])

    def per_seed(self, adjustment: Adjustment | None = None) -> Tensor:
        """Gold of each seed, `[seeds, amounts, q, m]`; see `gold`."""
        chosen = adjustment or self.adjustment
        if chosen == "mean":
            if len(self.groups) < 3:
                raise DataError(
                    f"{len(self.groups)} runs were made: their mean says too little with fewer "
                    "than 3; use adjustment='full'"
                )
            base = self.outcomes.mean(3, keepdim=True)
        elif chosen == "full":
            base = self.full[..., None]
        else:
            raise DataError(f"adjustment is {chosen!r}: it must be 'full' or 'mean'")
        return (base - self.outcomes) / self.fraction

    def gold(self, adjustment: Adjustment | None = None) -> Tensor:
        """The gold standard `[amounts, q, m]`: positive where the examples raised the measurement.

        The measurement after training on everything minus that without the group, mean over
        seeds, and divided by the removed fraction of the weight. `"mean"` compares with the mean
        over all groups in place of the run on everything.

        Raises:
            DataError: the mean adjustment is asked of fewer than three groups.
        """
        return self.per_seed(adjustment).mean(0)

    @cached_property
    def reliability(self) -> np.ndarray:
        """Split-half reliability of the gold at each amount, `[amounts]`, NaN for a single seed.

        By cosine, mean over queries.
        """
        return self.reliability_by("cosine")

    def reliability_by(self, kind: Agreement, adjustment: Adjustment | None = None) -> np.ndarray:
        """Split-half reliability `[amounts]` by cosine, Pearson's or Spearman's correlation.

        Queries whose gold is zero for all groups are left aside.
        """
        if len(self.seeds) < 2:
            return np.full(len(self.amounts), np.nan)
        values = split_half_reliability(self.per_seed(adjustment).numpy(), kind)  # [amounts, q]
        known = ~np.isnan(values)
        counts = known.sum(1)
        total = np.where(known, values, 0.0).sum(1)
        return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)

    def scores(self, amount: float | None = None, adjustment: Adjustment | None = None) -> Scores:
        """The gold of one amount as `Scores` `[q, m]` with units of removal; the last by default.

        Raises:
            DataError: the amount was not measured.
        """
        chosen = self.amounts[-1] if amount is None else float(amount)
        if chosen not in self.amounts:
            raise DataError(f"amount {chosen} was not measured: there are {self.amounts}")
        about = Provenance(
            method="further_training",
            settings={**self.settings, "amount": chosen, "seeds_used": list(self.seeds)},
            units="removal",
            model=self.model,
            train=self.train,
            queries=self.queries,
            seed=self.seeds[0],
            version=self.version,
        )
        return Scores(
            values=self.gold(adjustment)[self.amounts.index(chosen)],
            query_ids=self.query_ids,
            train_ids=self.train_ids,
            provenance=about,
        )

    def require_match(self, scores: Scores) -> None:
        """Raise `MismatchError` when scores are of other data or of another model."""
        here = Provenance(
            method="further training", train=self.train, queries=self.queries, model=self.model
        )
        here.require_same(scores.provenance, ("train", "queries", "model"))

    def warn_of_rounding(self) -> None:
        """Warn when many gold values are no larger than rounding can make them.

        A unit in the last place is that of the measurement, and at least that of one: losses of
        confident predictions are differences of numbers of that size.
        """
        if self.outcomes.dtype == torch.float64:
            return
        unit = torch.finfo(self.outcomes.dtype).eps * self.outcomes.abs().amax(0).clamp_min(1.0)
        limit = ROUNDING * unit / self.fraction / len(self.seeds) ** 0.5
        lost = int((self.gold().abs() < limit).sum())
        if lost > ROUNDED_SHARE * limit.numel():
            warnings.warn(
                f"{lost} of {limit.numel()} gold values are below {ROUNDING:g} units of rounding: "
                "measure with double=True, or a margin in place of the loss",
                NumericalWarning,
                stacklevel=4,
            )

    def save(self, folder: str | Path) -> None:
        """Write `response.safetensors` and `response.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(
            folder / "response.safetensors", {"outcomes": self.outcomes, "full": self.full}
        )
        facts = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("outcomes", "full", "train_ids", "query_ids")
        }
        ids = {"train_ids": self.train_ids.tolist(), "query_ids": self.query_ids.tolist()}
        write_json(folder / "response.json", {**facts, **ids})

    @classmethod
    def load(cls, folder: str | Path, *, model: str | None = None) -> "Response":
        """Read what `save` wrote.

        Args:
            folder: what `save` wrote.
            model: hash of the model it must belong to, `task.model_hash()`.

        Raises:
            FormatError: a file is missing or damaged.
            MismatchError: it belongs to another model.
        """
        facts = read_json(Path(folder) / "response.json")
        tensors = read_tensors(Path(folder) / "response.safetensors")
        facts.pop("format", None)
        try:
            facts["groups"] = tuple(tuple(group) for group in facts["groups"])
            for name in ("amounts", "steps", "seeds"):
                facts[name] = tuple(facts[name])
            for name in ("train_ids", "query_ids"):
                facts[name] = np.asarray(facts[name])
            read = cls(**{**facts, **tensors})
        except (KeyError, TypeError) as error:
            raise FormatError(f"{folder} does not hold a whole response: {error}") from error
        if model is not None and model != read.model:
            raise MismatchError(f"{folder} belongs to model {read.model} and this is {model}")
        return read
