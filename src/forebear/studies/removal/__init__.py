"""`forebear study removal`: how removal estimates err as n, d and k grow, against the theory.

After Rubinstein & Hopkins, "On the Accuracy of Newton Step and Influence Function Data
Attributions" (2025), and their rescaled influence (2025).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from forebear.progress import track
from forebear.removal import Factorised, distance_bound, shift
from forebear.removal.estimators import mask_of
from forebear.studies.base import Finding, StudyResult, Table
from forebear.studies.figure import require_figures
from forebear.studies.removal import figures
from forebear.studies.removal.experiments import (
    COMPARED,
    SIGNAL,
    Cell,
    Exponents,
    cell,
    fit_law,
    problem,
    random_sets,
    self_logit_slopes,
)

SUMMARY = (
    "k of n examples of a logistic regression in d dimensions are removed at random. Each "
    "estimate of the new parameters is compared with a refit; exponents of n, d and k are fitted "
    "to the errors and held against the published laws."
)

N_RANGE = (-2.2, -1.85)
RANGES = {
    "newton_step": {"n": N_RANGE, "kd": (0.85, 1.1)},
    "influence": {"n": N_RANGE, "kd": (0.42, 0.64), "k+d": (0.8, 1.15)},
    "rescaled_n": {"n": N_RANGE, "kd": (0.95, 1.25)},
}
"""Intervals that the fitted exponents are held against."""

CORRECTED = ((4000, 10, 400, 0.0), (4000, 10, 400, 300.0), (2000, 40, 500, 100.0),
             (2000, 40, 1, 100.0))  # fmt: skip
LEVERAGES = ((20, 0.1), (100, 0.1), (200, 1.0), (800, 1.0), (800, 100.0))
SIGNALS = (0.0, 0.5, 1.0, 2.0, 4.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Sweep:
    """Errors along one axis, the others fixed.

    Attributes:
        title: what varies, and where.
        axis: `n`, `d` or `k`.
        cells: along it.
    """

    title: str
    axis: str
    cells: Sequence[Cell]

    def slope(self, values: Callable[[Cell], float]) -> float:
        """Slope of logarithms along the axis."""
        x = np.log([getattr(c, self.axis) for c in self.cells])
        return float(np.polyfit(x, np.log([values(c) for c in self.cells]), 1)[0])


@dataclass(frozen=True)
class Measured:
    """Everything the study measured."""

    grid: list[Cell]
    sweeps: list[Sweep]
    corrected: list[tuple[tuple[int, int, int, float], Cell]]
    slopes: list[tuple[int, float, dict[str, float]]]
    signals: list[tuple[float, Cell]]
    sizes: list[Cell]
    bounds: list[tuple[int, int, int, float, float]]

    @property
    def exponents(self) -> dict[str, Exponents]:
        """Fitted laws of the Newton step's error and of the gaps to it."""
        n, d, k = (np.log([getattr(c, axis) for c in self.grid]) for axis in "ndk")
        both = np.log([c.k + c.d for c in self.grid])
        newton = np.array([c.errors["newton_step"] for c in self.grid])
        gap = np.array([c.gaps["influence"] for c in self.grid])
        scaled = np.array([c.gaps["rescaled_n"] for c in self.grid])
        return {
            "newton_step": fit_law(np.column_stack([n, k + d]), newton),
            "influence": fit_law(np.column_stack([n, k + d, both]), gap),
            "rescaled_n": fit_law(np.column_stack([n, k + d]), scaled),
        }


def run(
    out: Path, *, quick: bool = False, seed: int = 0, threads: int | None = None
) -> StudyResult:
    """Measure, fit, judge, draw, and write the folder.

    Args:
        out: folder to write.
        quick: fewer data sets and sets; smaller n.
        seed: of the first data set.
        threads: to compute with.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_figures()
    if threads is not None:
        torch.set_num_threads(threads)
    start = perf_counter()
    measured = measure(quick=quick, seed=seed)
    seconds = perf_counter() - start
    exponents = measured.exponents
    values = {name: law.values for name, law in exponents.items()}
    figures.draw_laws(out, measured.grid, values, measured.sweeps[-1].cells)
    figures.draw_sizes(out, measured.sizes)
    result = StudyResult(
        name="removal",
        title="Removal estimates for logistic regression",
        summary=SUMMARY,
        settings={
            "quick": quick,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "data_sets": len(measured.grid[0].size),
            "signal": SIGNAL,
            "seconds": round(seconds, 1),
        },
        tables=tables(measured, exponents),
        findings=findings(measured, exponents),
        figures={
            "removal-laws": "Errors against the predicted laws, and their orders in n.",
            "removal-sizes": "Relative error of each estimate as more examples are removed.",
        },
    )
    result.save(out)
    return result


def measure(*, quick: bool = False, seed: int = 0) -> Measured:
    """All measurements: a minute on one thread, a third of it when quick."""
    seeds = range(seed, seed + (4 if quick else 8))
    few = range(seed, seed + (3 if quick else 4))
    sets, many = (12, 30) if quick else (12, 100)
    scale = 2 if quick else 1
    sizes = (2000 // scale, 4000 // scale, 8000 // scale)
    places = [(n, d) for n in sizes for d in (4, 12, 36)]
    grid = [
        one
        for n, d in track(places, "grid of n, d and k")
        for one in cell(n, d, (2, 8, 32, 128), seeds, sets)
    ]
    top = sizes[-1]
    sweeps = [
        Sweep(f"k, at k ≪ d (n={top // 2}, d=64)", "k",
              cell(top // 2, 64, (1, 2, 4, 8, 16), few, many)),
        Sweep(f"k, at k ≫ d (n={top}, d=4)", "k", cell(top, 4, (32, 64, 128, 256), few, many)),
        Sweep(f"d, at d ≫ k (n={top}, k=2)", "d",
              [c for d in (16, 32, 64, 128) for c in cell(top, d, (2,), few, many)]),
        Sweep(f"d, at d ≪ k (n={top}, k=256)", "d",
              [c for d in (4, 8, 16) for c in cell(top, d, (256,), few, many)]),
        Sweep("n (d=20, k=20)", "n",
              [c for n in (500, 1000, 2000, 4000, 8000) for c in cell(n, 20, (20,), few, many)]),
    ]  # fmt: skip
    corrected = [
        (case, cell(case[0], case[1], (case[2],), few, 12, penalty=case[3])[0])
        for case in track(CORRECTED, "size-corrected estimates")
    ]
    slopes = [
        (d, penalty, self_logit_slopes(400, d, penalty, few))
        for d, penalty in track(LEVERAGES, "high dimension")
    ]
    signals = [(s, cell(top // 2, 12, (8,), few, 24, signal=s)[0]) for s in SIGNALS]
    return Measured(
        grid, sweeps, corrected, slopes, signals,
        sizes=cell(top // 2, 12, SIZES, few, 24), bounds=bounds(top // 2, seed),
    )  # fmt: skip


def bounds(n: int, seed: int) -> list[tuple[int, int, int, float, float]]:
    """The proved bound as a multiple of the Newton step's real error: smallest and largest."""
    rows = []
    for d in (4, 12, 36):
        model = problem(n, d, seed)
        factorised = Factorised(model)
        for k in (2, 32, 128):
            groups = random_sets(n, k, 12, seed + k)
            step = shift(factorised, groups, "newton_step")
            real = (step - shift(factorised, groups, "exact")).norm(dim=1)
            ratio = distance_bound(model, step, mask_of(groups, n)).distance / real
            rows.append((n, d, k, ratio.min().item(), ratio.max().item()))
    return rows


def predicted_slope(sweep: Sweep, name: str) -> float:
    """Slope of the published law along the same points."""

    def law(c: Cell) -> float:
        if name == "newton_step":
            return c.k * c.d / c.n**2
        if name == "influence":
            return (c.k + c.d) * math.sqrt(c.k * c.d) / c.n**2
        return math.sqrt(c.k * c.d) / c.n

    return sweep.slope(law)


def tables(measured: Measured, exponents: dict[str, Exponents]) -> list[Table]:
    """Every number behind the findings."""
    return [
        _exponent_table(exponents),
        _slope_table(measured.sweeps),
        Table(
            "corrected", "Distance to the refit, with and without a penalty",
            ["n", "d", "k", "λ", *COMPARED],
            [[*case, *(float(c.errors[m].mean()) for m in COMPARED)]
             for case, c in measured.corrected],
            "λ in the sum convention: ½ λ ‖θ‖² beside the summed losses.",
        ),
        Table(
            "self_logit", "Predicted over real change of an example's own logit",
            ["d", "λ", "mean leverage", "influence", "newton_step"],
            [[d, lam, s["leverage"], s["influence"], s["rescaled"]] for d, lam, s in
             measured.slopes],
            "n = 400, features of squared length near 20, one example left out; 1 is right.",
        ),
        Table(
            "signal", "Constants of the laws by signal",
            ["‖θ*‖", "newton_step: error n² / kd", "influence: gap n² / ((k + d) √(kd))"],
            [[s, _constant(c, "newton_step"), _constant(c, "influence")]
             for s, c in measured.signals],
        ),
        Table(
            "bounds", "The proved bound over the real error of the Newton step",
            ["n", "d", "k", "smallest", "largest"], [list(row) for row in measured.bounds],
            "At least 1 for a bound; over 12 sets.",
        ),
        Table(
            "grid", "Mean errors of the grid", ["n", "d", "k", "shift", *COMPARED, "gap"],
            [[c.n, c.d, c.k, float(c.size.mean()),
              *(float(c.errors[m].mean()) for m in COMPARED), float(c.gaps["influence"].mean())]
             for c in measured.grid],
            shown=False,
        ),
    ]  # fmt: skip


def _exponent_table(exponents: dict[str, Exponents]) -> Table:
    rows = []
    what = {
        "newton_step": "error of the Newton step",
        "influence": "influence to Newton step",
        "rescaled_n": "rescaled_n to Newton step",
    }
    for name, law in exponents.items():
        for (term, (low, high)), value, a, b in zip(
            RANGES[name].items(), law.values, law.low, law.high, strict=True
        ):
            rows.append(
                [what[name], term, float(value), f"{a:.3f} to {b:.3f}", f"{low} to {high}", law.fit]
            )
    columns = ["distance", "power of", "exponent", "95 % interval", "expected", "R²"]
    return Table("exponents", "Fitted exponents", columns, rows, "Intervals over data sets.")


def _slope_table(sweeps: Sequence[Sweep]) -> Table:
    rows = []
    for sweep in sweeps:
        row: list[str | float] = [sweep.title]
        row += [sweep.slope(lambda c: c.size.mean()), predicted_slope(sweep, "shift")]
        row += [_newton_slope(sweep), predicted_slope(sweep, "newton_step")]
        row += [_gap_slope(sweep), predicted_slope(sweep, "influence")]
        row += [sweep.slope(lambda c: c.errors["newton_step_2"].mean())]
        rows.append(row)
    columns = ["along", "shift", "law", "Newton step", "law ", "influence gap", "law  ",
               "second order"]  # fmt: skip
    note = "Each law's slope is taken along the same points."
    return Table("slopes", "Slopes along one axis", columns, rows, note)


def findings(measured: Measured, exponents: dict[str, Exponents]) -> list[Finding]:
    """The claims, judged."""
    found = []
    claims = {
        "newton_step": "The Newton step errs by kd / n².",
        "influence": "Influence differs from the Newton step by (k + d) √(kd) / n².",
        "rescaled_n": "n / (n − k) times rescaled influence errs by kd / n² in all regimes.",
    }
    for name, claim in claims.items():
        ranges = RANGES[name]
        inside = [
            low <= value <= high
            for value, (low, high) in zip(exponents[name].values, ranges.values(), strict=True)
        ]
        expected = ", ".join(f"{t}: {low} to {high}" for t, (low, high) in ranges.items())
        values = ", ".join(
            f"{t}: {v:.2f}" for t, v in zip(ranges, exponents[name].values, strict=True)
        )
        fit = f"{values}; R² {exponents[name].fit:.3f}"
        found.append(Finding(claim, f"exponents of {expected}", fit, all(inside)))
    found += [*_orderings(measured), *_slopes(measured), *_others(measured)]
    return [replace(one, holds=bool(one.holds)) for one in found]  # numpy's own bool is no JSON


def _orderings(measured: Measured) -> list[Finding]:
    cells = measured.grid
    total = len(cells)
    better = {
        name: sum(c.errors[name].mean() < c.errors["influence"].mean() for c in cells)
        for name in ("newton_step", "rescaled")
    }
    newton = [_constant(c, "newton_step") for c in cells]
    gap = [_constant(c, "influence") for c in cells]
    return [
        Finding(
            "The Newton step and rescaled influence are nearer to the refit than influence.",
            f"in {total} of {total} cells",
            f"Newton step {better['newton_step']}, rescaled {better['rescaled']}",
            min(better.values()) == total,
        ),
        Finding(
            "The constants of the laws hold over the grid.",
            "Newton step 2 to 5.5, influence 1.9 to 4.2",
            f"{min(newton):.2f} to {max(newton):.2f}, {min(gap):.2f} to {max(gap):.2f}",
            min(newton) > 2 and max(newton) < 5.5 and min(gap) > 1.9 and max(gap) < 4.2,
        ),
    ]


def _slopes(measured: Measured) -> list[Finding]:
    *others, ladder = measured.sweeps
    orders = [
        ladder.slope(lambda c: c.size.mean()),
        ladder.slope(lambda c: c.errors["influence"].mean()),
        _newton_slope(ladder),
        ladder.slope(lambda c: c.errors["newton_step_2"].mean()),
    ]
    off = [abs(_newton_slope(s) - predicted_slope(s, "newton_step")) for s in others]
    off += [abs(_gap_slope(s) - predicted_slope(s, "influence")) for s in others]
    return [
        Finding(
            "Shift, influence, Newton step and second order fall as n to the −1, −2, −2 and −3.",
            "−1, −2, −2, −3, each within 0.25",
            ", ".join(f"{order:.2f}" for order in orders),
            all(abs(o - e) < 0.25 for o, e in zip(orders, (-1, -2, -2, -3), strict=True)),
        ),
        Finding(
            "Along one axis, where one of k and d is small, the slopes are those of the laws.",
            "within 0.25 of the law along the same points",
            f"largest deviation {max(off):.2f}",
            max(off) < 0.25,
        ),
    ]


def _others(measured: Measured) -> list[Finding]:
    ratios = []
    for (_, d, k, _), c in measured.corrected:
        if k >= 10 * d:
            near = c.errors["rescaled_d"].mean() / c.errors["newton_step"].mean()
            gain = c.errors["rescaled"].mean() / c.errors["rescaled_d"].mean()
            ratios.append((near, gain))
    single = [c for (_, _, k, _), c in measured.corrected if k == 1]
    same = max(abs(c.errors["rescaled_d"] - c.errors["rescaled"]).max() for c in single)
    slopes = [s for _, _, s in measured.slopes]
    lowest = min(row[3] for row in measured.bounds)
    flat = _constant(measured.signals[0][1], "newton_step")
    usual = _constant(dict(measured.signals)[SIGNAL], "newton_step")
    return [
        Finding(
            "Taking the mean effect of k − 1 others out of the data's part of the curvature "
            "repairs rescaled influence for large groups.",
            "at k ≥ 10 d within 2 × the Newton step and 2 × better than without; the same at k = 1",
            f"{max(r[0] for r in ratios):.2f} ×, {min(r[1] for r in ratios):.1f} × better; "
            f"difference at k = 1 {same:.0e}",
            all(near < 2 and gain > 2 for near, gain in ratios) and bool(same < 1e-12),
        ),
        Finding(
            "With high leverage influence underestimates, and the Newton step does not.",
            "Newton step at least 0.97; influence below it everywhere",
            f"Newton step {min(s['rescaled'] for s in slopes):.3f} or more, influence down to "
            f"{min(s['influence'] for s in slopes):.2f}",
            all(s["rescaled"] > 0.97 and s["influence"] < s["rescaled"] for s in slopes),
        ),
        Finding(
            "Without a signal the Newton step's law fails by symmetry.",
            "its constant at ‖θ*‖ = 0 is under a quarter of that at 2",
            f"{flat:.2f} against {usual:.2f}",
            flat < usual / 4,
        ),
        Finding(
            "The proved bound is never below the real error.",
            "ratio at least 1",
            f"{lowest:.2f} to {max(row[4] for row in measured.bounds):.1f}",
            lowest >= 1,
        ),
    ]


def _newton_slope(sweep: Sweep) -> float:
    return sweep.slope(lambda c: c.errors["newton_step"].mean())


def _gap_slope(sweep: Sweep) -> float:
    return sweep.slope(lambda c: c.gaps["influence"].mean())


def _constant(c: Cell, name: str) -> float:
    if name == "newton_step":
        return float(c.errors[name].mean() / (c.k * c.d / c.n**2))
    return float(c.gaps[name].mean() / ((c.k + c.d) * math.sqrt(c.k * c.d) / c.n**2))
