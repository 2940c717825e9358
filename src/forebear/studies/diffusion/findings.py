"""Claims about attribution of diffusion models, held against what the study measured.

Expected numbers come from reference runs on the same networks and images.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from forebear.metrics.correlation import correlations
from forebear.studies.base import Finding
from forebear.studies.diffusion.judging import paired_difference
from forebear.studies.diffusion.removal import Removals
from forebear.studies.diffusion.tables import SIMPLE, label

if TYPE_CHECKING:
    from forebear.studies.diffusion import Measured

GRADIENTS = ("graddot", "gradcos", "trak", "relative", "dtrak", "das_linear", "das")


def findings(measured: "Measured") -> list[Finding]:
    """Every claim that the entrants present allow to be judged."""
    task = measured.trained.subject.name
    judged = [_oracle(measured), _chance(measured), _simple(measured)]
    if task == "digits-eps":
        judged += [_nda(measured), _late(measured), _squaring(measured)]
        judged += [_kernel(measured), _harder(measured)]
    if task == "digits-edm":
        judged += [_mucs(measured), *_ablations(measured), _few_levels(measured)]
        judged += [_better_together(measured), *_single(measured)]
    judged += [_pooled(measured), _controls(measured), _ensembles(measured)]
    return [finding for finding in judged if finding is not None]


def _oracle(measured: "Measured") -> Finding:
    groups = measured.trained.subject.groups
    worst = min(measured.fixed("datamodel", name).mean for name in groups)
    best = max(
        (measured.best(key, name).mean, label(key))
        for key in measured.judged
        for name in measured.judged[key]
        if key != "datamodel"
    )
    return Finding(
        "A ridge datamodel fitted to the subsets it is judged on is beyond every method.",
        "its LDS above that of all others, even with their best ridges",
        f"{worst:.3f}; the best other {best[0]:.3f} ({best[1]})",
        bool(worst > best[0]),
    )


def _chance(measured: "Measured") -> Finding | None:
    if "random" not in measured.judged:
        return None
    mean = float(np.nanmean(_overall(measured, "random")))
    return Finding(
        "Random scores foretell nothing.",
        "LDS within 0.08 of zero, mean over all queries",
        f"{mean:+.3f}",
        abs(mean) <= 0.08,
    )


def _simple(measured: "Measured") -> Finding | None:
    """Says plainly where a simple baseline wins."""
    texts, ahead = [], True
    others = [key for key in measured.judged if key not in (*SIMPLE, "datamodel", "random")]
    for name in measured.trained.subject.groups:
        asked = [key for key in others if name in measured.judged[key]]
        best = max(asked, key=lambda key: measured.fixed(key, name).mean)
        same = {key: _on_rows_of(measured, best, key, name) for key in SIMPLE}
        simple = max(same, key=lambda key: same[key])
        a, b = measured.fixed(best, name).mean, same[simple]
        texts.append(f"{name}: {label(best)} {a:.3f}, {label(simple)} {b:.3f}")
        ahead &= a > b
    return Finding(
        "The best method is ahead of likeness of pixels and of embeddings.",
        "a higher LDS on every group of queries, with a fixed ridge, on the queries of the method",
        "; ".join(texts),
        bool(ahead),
    )


def _on_rows_of(measured: "Measured", one: str, other: str, group: str) -> float:
    """Mean LDS of an entrant on the queries of a group that another was asked about."""
    each = measured.trained.subject.groups[group]
    mine, all_rows = (
        [row for row in measured.rows[key].tolist() if each.start <= row < each.stop]
        for key in (one, other)
    )
    values = measured.fixed(other, group).values
    return float(np.nanmean([values[all_rows.index(row)] for row in mine]))


def _nda(measured: "Measured") -> Finding | None:
    if "nda" not in measured.judged:
        return None
    mine = measured.fixed("nda", "validation").mean
    whole = measured.fixed("softmax", "validation").mean
    return Finding(
        "Patch weights of NDA foretell losses, at least as well as those of whole images.",
        "LDS at least 0.30 on held-out images, and not below whole images by more than 0.02",
        f"{mine:.3f}, whole images {whole:.3f}",
        mine >= 0.30 and mine >= whole - 0.02,
    )


def _late(measured: "Measured") -> Finding | None:
    if not {"nda", "nda_late"} <= set(measured.judged):
        return None
    near = measured.fixed("nda", "validation").mean
    late = measured.fixed("nda_late", "validation").mean
    return Finding(
        "NDA needs a timestep with little noise.",
        "LDS on held-out images higher by at least 0.15 at t = 50 than at t = 400",
        f"{near:.3f} and {late:.3f}",
        bool(near - late >= 0.15),
    )


def _squaring(measured: "Measured") -> Finding | None:
    return _gain(
        measured,
        "das",
        "das_linear",
        0.10,
        "Squaring lifts the LDS of DAS.",
    )


def _kernel(measured: "Measured") -> Finding | None:
    if not {"trak", "graddot"} <= set(measured.judged):
        return None
    best = measured.best("trak", "validation").mean
    dot = measured.fixed("graddot", "validation").mean
    return Finding(
        "With its best ridge TRAK is ahead of plain products of gradients.",
        "LDS higher by at least 0.10 on held-out images",
        f"{best:.3f} and {dot:.3f}",
        best - dot >= 0.10,
    )


def _harder(measured: "Measured") -> Finding | None:
    present = [key for key in GRADIENTS if key in measured.judged]
    if not present:
        return None
    pairs = {
        key: [measured.fixed(key, name).mean for name in ("validation", "generated")]
        for key in present
    }
    return Finding(
        "Generated images are harder than held-out ones for every gradient method.",
        "a lower LDS with a fixed ridge",
        ", ".join(f"{label(key)} {a:.2f} and {b:.2f}" for key, (a, b) in pairs.items()),
        all(a > b for a, b in pairs.values()),
    )


def _overall(measured: "Measured", key: str) -> np.ndarray:
    """LDS of every query of an entrant, both groups together."""
    groups = measured.trained.subject.groups
    return np.concatenate([measured.fixed(key, name).values for name in groups])


def _mucs(measured: "Measured") -> Finding | None:
    if "mucs" not in measured.judged:
        return None
    mine = float(np.nanmean(_overall(measured, "mucs")))
    text, holds = f"{mine:.3f}", mine >= 0.45
    if "nda" in measured.judged:
        nda = float(np.nanmean(_overall(measured, "nda")))
        text, holds = f"{text}, NDA {nda:.3f}", holds and mine - nda >= 0.1
    return Finding(
        "MUCS foretells losses of the EDM network, better than NDA.",
        "LDS at least 0.45, and above NDA by at least 0.1",
        text,
        bool(holds),
    )


def _ablations(measured: "Measured") -> list[Finding | None]:
    return [
        _gain(measured, "mucs", "mucs_fresh", 0.03, "MUCS needs the same noise before and after."),
        _gain(measured, "mucs", "mucs_forget", 0.05, "MUCS needs the term that retains."),
    ]


def _few_levels(measured: "Measured") -> Finding | None:
    if not {"mucs", "mucs_100"} <= set(measured.scores):
        return None
    few, many = (measured.scores[key][0].double().numpy() for key in ("mucs", "mucs_100"))
    alike = correlations(few.T, many.T)
    return Finding(
        "Ten noise levels of MUCS rank training images as a hundred do.",
        "rank correlation of at least 0.9, mean over queries",
        f"{np.mean(alike):.3f}, at least {np.min(alike):.3f}",
        bool(np.mean(alike) >= 0.9),
    )


def _better_together(measured: "Measured") -> Finding | None:
    if "mucs+das:z" not in measured.judged:
        return None
    common = measured.rows["mucs+das:z"]
    both, *members = (
        _overall(measured, key)[torch.searchsorted(measured.rows[key], common).numpy()]
        for key in ("mucs+das:z", "mucs", "das")
    )
    best = max(members, key=lambda each: float(np.nanmean(each)))
    gain, error = paired_difference(both, best)
    mucs, das = (float(np.nanmean(each)) for each in members)
    return Finding(
        "MUCS and DAS together, by z-scores, beat the better of them.",
        "a higher LDS, mean over all queries; not judged within the interval",
        f"{np.nanmean(both):.3f}, MUCS {mucs:.3f}, DAS, squared {das:.3f}: {gain:+.3f} "
        f"± {1.96 * error:.3f} over queries",
        None if abs(gain) < 1.96 * error else bool(gain > 0),
    )


def _gain(measured: "Measured", one: str, other: str, least: float, claim: str) -> Finding | None:
    if not {one, other} <= set(measured.judged):
        return None
    group = "validation" if measured.trained.subject.name == "digits-eps" else None
    if group is None:
        a, b = _overall(measured, one), _overall(measured, other)
    else:
        a, b = measured.fixed(one, group).values, measured.fixed(other, group).values
    gain, error = paired_difference(a, b)
    return Finding(
        claim,
        f"LDS higher by at least {least:.2f}",
        f"{label(one)} {np.nanmean(a):.3f}, {label(other)} {np.nanmean(b):.3f}: {gain:+.3f} "
        f"± {1.96 * error:.3f} over queries",
        bool(gain >= least),
    )


def _single(measured: "Measured") -> list[Finding]:
    removals = next(iter(measured.removals.values()))
    if not removals.single:
        return []
    found = []
    for key, least in (("mucs", 1.4), ("nda", 1.1)):
        if key in removals.single:
            shift = removals.single_shift(key)
            found.append(
                Finding(
                    f"Without the strongest examples of {label(key)} an image changes more than "
                    "without random ones.",
                    f"at least {least:g} times as much",
                    f"{shift.ratio:.2f} times (p = {shift.p:.2g})",
                    bool(shift.ratio >= least),
                )
            )
    if "mucs" in removals.single:
        changes = removals.single["mucs"]
        ratio = float(changes.targets.mean() / changes.bystanders.mean())
        found.append(
            Finding(
                "Removal by MUCS changes its target more than bystanders.",
                "at least 1.25 times as much",
                f"{ratio:.2f} times",
                ratio >= 1.25,
            )
        )
    return found


def _strongest(measured: "Measured") -> tuple[str, Removals]:
    """Of those removed, the one with the highest LDS on generated images; by pixel distance."""
    removals = next(iter(measured.removals.values()))
    key = max(removals.pooled, key=lambda key: measured.fixed(key, "generated").mean)
    return key, removals


def _pooled(measured: "Measured") -> Finding:
    key, removals = _strongest(measured)
    shift, size = removals.pooled_shift(key), int(removals.pooled[key].removed)
    return Finding(
        "Removing the strongest images of the best method changes the targets more than removing "
        "as many random ones.",
        "p below 0.01, one-sided Mann-Whitney test over images",
        f"{label(key)}, {size} removed: {shift.mean:.3f} and {shift.random:.3f}, "
        f"{shift.ratio:.2f} times (p = {shift.p:.2g})",
        bool(shift.p < 0.01),
    )


def _controls(measured: "Measured") -> Finding:
    key, removals = _strongest(measured)
    shift, aside, aim = removals.pooled_shift(key), removals.bystander_shift(key), removals.aim(key)
    return Finding(
        "The same removal changes controls less than targets.",
        "a smaller change beyond that of random removal, p below 0.05, one-sided Mann-Whitney test "
        "over images",
        f"{label(key)}: controls {aside.mean:.3f}, {aside.ratio:.2f} times random; targets "
        f"{shift.mean:.3f}, {shift.ratio:.2f} times; beyond random {aim.random:.3f} and "
        f"{aim.mean:.3f} (p = {aim.p:.2g})",
        bool(aim.p < 0.05),
    )


def _ensembles(measured: "Measured") -> Finding | None:
    names = [key.removesuffix(":z") for key in measured.judged if key.endswith(":z")]
    if not names:
        return None
    group = "generated"
    texts, holds = [], True
    for name in names:
        z, rank = (measured.fixed(f"{name}:{how}", group).mean for how in ("z", "rank"))
        texts.append(f"{' + '.join(label(one) for one in name.split('+'))}: {z:.3f} and {rank:.3f}")
        holds &= z > rank
    return Finding(
        "Ensembles combine better by z-scores than by ranks, which lose magnitudes.",
        "a higher LDS on generated images for every ensemble",
        "; ".join(texts),
        bool(holds),
    )
