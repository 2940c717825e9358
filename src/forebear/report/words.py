"""The sentences of the page, each made from the numbers of the run."""

from forebear.run import Interval, MethodResult, Run

NBSP = "\u00a0"


def percent(share: float) -> str:
    """`0.923` as `92 %`; what is not quite all or nothing keeps a decimal."""
    points = share * 100
    whole = round(points)
    exact = abs(points - whole) < 1e-9
    return f"{whole if exact or 1 <= points <= 99 else round(points, 1)}{NBSP}%"


def number(value: float) -> str:
    """Two decimals, with a real minus sign."""
    return f"{value:.2f}".replace("-", "−") if round(value, 2) else "0.00"


def count(value: int) -> str:
    """Thousands apart: `12,000`."""
    return f"{value:,}"


def plural(value: int, noun: str) -> str:
    """`1 example`, `3 examples`."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def multiple(value: float) -> str:
    """`3.24` as `3.2×`; two figures that count."""
    return f"{value:.2f}×" if value < 1 else f"{value:.1f}×" if value < 10 else f"{value:,.0f}×"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 0.1:
        return f"{seconds * 1000:.2g}{NBSP}ms"
    if seconds < 10:
        return f"{seconds:.2f}{NBSP}s"
    if seconds < 100:
        return f"{seconds:.0f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}{NBSP}min {rest}{NBSP}s"


def span(interval: Interval) -> str:
    """`0.40 to 0.46`."""
    return f"{number(interval.low)} to {number(interval.high)}"


def best_at_labels(run: Run) -> MethodResult | None:
    """The method that found most planted label errors in the first tenth of its list.

    Among equals it is the run's best method, so that the page does not name two without need.
    """
    able = [m for m in run.methods if m.found_in_first_10_percent is not None]

    def merit(method: MethodResult) -> tuple[float, bool, float]:
        found = method.found_in_first_10_percent or 0.0
        return found, method is run.best_method, method.label_error_auc or 0.0

    return max(able, key=merit, default=None)


def title(run: Run) -> str:
    """The finding in one line."""
    finder = best_at_labels(run)
    if finder is not None and finder.found_in_first_10_percent is not None:
        found = _part(finder.found_in_first_10_percent)
        return f"Checking a tenth of the labels finds {found} the planted errors."
    best = run.best_method
    if best is not None and best.lds is not None:
        return f"{best.label} predicts retraining with rank correlation {number(best.lds.mean)}."
    if run.dataset is not None:
        predictions = plural(run.dataset.queries, "prediction")
        examples = plural(run.dataset.train, "training example")
        return f"{predictions}, traced back to {examples}."
    return run.title or "Training data attribution"


def headline(run: Run) -> str:
    """What was found, in one sentence a person can act on."""
    parts = []
    best, finder = run.best_method, best_at_labels(run)
    if best is not None and best.lds is not None:
        limit = ""
        if run.truth is not None and run.truth.ceiling is not None:
            allowed = number(run.truth.ceiling.mean)
            limit = f"; the retraining noise allows at most {allowed}"
        parts.append(
            f"{best.label} predicts what retraining would do with rank correlation "
            f"{number(best.lds.mean)} (95{NBSP}% interval {span(best.lds)}{limit})"
        )
    if finder is not None and finder.found_in_first_10_percent is not None:
        by = "" if finder is best else f" in the order of {finder.label}"
        parts.append(
            f"looking at the 10{NBSP}% most suspicious labels{by} finds "
            f"{_part(finder.found_in_first_10_percent)} the planted errors"
        )
    if not parts and best is not None:
        saw = (
            "" if best.coverage is None else f", seeing {percent(best.coverage)} of the parameters"
        )
        parts.append(
            f"{best.label} says for every query which training examples pushed it up or down{saw}; "
            "nothing here was checked against retrained models yet"
        )
    sentence = "; ".join(parts)
    return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


def lds_finding(run: Run) -> str:
    """Who leads, and whether the lead is larger than the uncertainty."""
    ranked = sorted(
        ((m, m.lds) for m in run.methods if m.lds is not None), key=lambda pair: -pair[1].mean
    )
    if not ranked:
        return ""
    (first, lead), rest = ranked[0], ranked[1:]
    parts = [f"{first.label} comes first with {number(lead.mean)}"]
    if run.truth is not None and run.truth.ceiling is not None and run.truth.ceiling.mean > 0:
        share = lead.mean / run.truth.ceiling.mean
        parts[0] += f", {percent(share)} of what the noise of retraining allows"
    if rest:
        second, behind = rest[0]
        if lead.overlaps(behind):
            parts.append(
                f"its interval overlaps that of {second.label} ({number(behind.mean)}), "
                "so these queries do not tell the two apart"
            )
        else:
            parts.append(
                f"its interval does not touch that of {second.label} ({number(behind.mean)}), "
                "the next best"
            )
    return "; ".join(parts) + "."


def removal_finding(run: Run) -> str:
    """What removing the most examples did, against removing as many at random."""
    removal = run.removal
    if removal is None or not removal.curves or not removal.fractions:
        return ""
    name = run.best if run.best in removal.curves else next(iter(removal.curves))
    curve, share = removal.curves[name], percent(removal.fractions[-1])
    label = _label(run, name)
    text = (
        f"Without the {share} of the training set that {label} calls strongest, the measurement "
        f"goes from {number(curve[0])} to {number(curve[-1])}"
    )
    random = removal.curves.get("random")
    if random is not None and name != "random":
        text += f"; without as many drawn at random, it is {number(random[-1])}"
    return text + "."


def suspects_finding(run: Run, name: str, found: int, looked: int, flipped: int) -> str:
    """How many planted errors stand at the head of a method's list."""
    size = run.dataset.train if run.dataset is not None else looked
    chance = flipped * looked / size if size else 0.0
    return (
        f"The {count(looked)} examples shown, in the order of {_label(run, name)}, hold "
        f"{count(found)} of the {count(flipped)} planted errors; as many drawn at random would "
        f"hold about {chance:.0f}."
    )


def _part(share: float) -> str:
    return "all" if share == 1 else f"{percent(share)} of"


def _label(run: Run, name: str) -> str:
    return next((m.label for m in run.methods if m.name == name), name)
