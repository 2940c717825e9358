"""The sentences of the page of generated images, for people who never heard of attribution."""

from forebear.gallery import Asked, Effect, Gallery, Regenerated
from forebear.report.meanings import ALIKE
from forebear.report.words import NBSP, count, number, percent, plural
from forebear.run import Run

CONVINCING = 0.05

STRANGE = 1.5
"""Times the median loss of training images from which the model does not know an image."""

COMMON = 10.0
"""Training images that fit a part which is likely to be background."""

NOTHING = 0.8
"""Share of the loss of knowing nothing from which a model has hardly learned."""


def title(run: Run, gallery: Gallery) -> str:
    """The finding in one line."""
    effect = gallery.effect
    if effect is not None and matters(effect) and effect.ratio is not None:
        return (
            f"Without the training images that {method_label(run, effect.method)} names first, a "
            f"picture changes {times(effect.ratio)} as much as without random ones."
        )
    train, asked = _counts(run, gallery)
    if hardly_learned(gallery):
        return f"{plural(asked, 'generated image')}, by a model that has hardly learned yet."
    shown = len(gallery.asked)
    if shown and all(strange(gallery, place) for place in range(shown)):
        return f"{plural(asked, 'generated image')}, strange to the very model that made them."
    behind = "it" if asked == 1 else "them"
    return (
        f"{plural(asked, 'generated image')}, and which of {plural(train, 'training image')} are "
        f"most likely behind {behind}."
    )


def headline(run: Run, gallery: Gallery) -> str:
    """What was done, what was checked, and what was not."""
    train, asked = _counts(run, gallery)
    first = (
        f"A model that learned from {plural(train, 'image')} made {plural(asked, 'picture')}. "
        f"Below: the training images most likely behind {'it' if asked == 1 else 'each'}, as "
        "several methods estimate it. "
    )
    effect = gallery.effect
    if effect is None:
        return first + (
            "None of it was checked: that takes training the model again without those images."
        )
    label = method_label(run, effect.method)
    return first + (
        f"The list of {label} was checked by training again without its first {effect.count} "
        "images; the other lists were not."
    )


def warning(gallery: Gallery) -> str:
    """Why the whole page deserves no trust; nothing where it does."""
    known = gallery.familiar
    if known is None:
        return ""
    if known.share is not None and hardly_learned(gallery):
        better = "little better than" if known.share < 1 else "no better than"
        return (
            "This model has hardly learned anything: on its own training images it does "
            f"{better} one that knows their average alone (its error is {percent(known.share)} "
            "of that). Train it for longer: what such a model owes to its images says nothing yet."
        )
    asked, odd = len(known.losses), sum(strange(gallery, i) for i in range(len(known.losses)))
    if not odd:
        return ""
    which = "this picture" if asked == 1 else "all" if odd == asked else f"{odd} of"
    which += "" if asked == 1 else f" {asked} pictures"
    return (
        f"The model itself finds {which} stranger than any of the {count(known.among)} training "
        "images it was tried on. Such a picture is most likely noise or half finished, and then "
        "its rows mean little, however sure they look. Train for longer, or draw with more steps."
    )


def hardly_learned(gallery: Gallery) -> bool:
    """Whether the model knows little more of its training images than their average."""
    known = gallery.familiar
    return known is not None and known.share is not None and known.share > NOTHING


def strange(gallery: Gallery, place: int) -> bool:
    """Whether the model has more trouble with a generated image than with training images."""
    known = gallery.familiar
    if known is None or place >= len(known.losses):
        return False
    return known.losses[place] > max(known.largest, STRANGE * known.median)


def strangeness(gallery: Gallery, place: int) -> str:
    """The same of one picture in words; nothing where it is as it should be."""
    known = gallery.familiar
    if known is None or not strange(gallery, place):
        return ""
    ratio = known.losses[place] / known.median if known.median > 0 else 0.0
    error = f"error {times(ratio)} that of a typical training image" if ratio else "larger error"
    return f"Strange to the model itself ({error}): take its rows with care."


def effect_finding(run: Run, effect: Effect) -> str:
    """What removal did, over all images, and how far that can be trusted."""
    label = method_label(run, effect.method)
    if effect.ratio is None:
        return f"Without {effect.count} random images, nothing changed to compare with."
    how = (
        f"Without the {effect.count} training images that {label} names first, the picture moves "
        f"{times(effect.ratio)} as far, on average over {plural(effect.images, 'image')}, as "
        f"without {effect.count} drawn at random"
    )
    if effect.p is None:
        return how + ". One image says little: ask about several to tell this from chance."
    if matters(effect):
        return f"{how}. If it made no difference which ones are missing, {_chance(effect.p)}."
    return (
        f"{how}. That is no more than chance may do (p{NBSP}={NBSP}{number(effect.p)}): take this "
        "ranking with care."
    )


def again_finding(one: Regenerated, count_removed: int, label: str) -> str:
    """What removal did to one image."""
    base = sum(one.moved_random) / len(one.moved_random)
    if base <= 0:
        return f"Random removal leaves it as it is; without {label}’s it moves by {one.moved:.2f}."
    ratio = one.moved / base
    if ratio > 1.1:
        compared = f"{times(ratio)} as much as"
    elif ratio < 0.9:
        compared = f"less ({times(ratio)}) than"
    else:
        compared = "about as much as"
    return (
        f"Without the {count_removed} that {label} names first, it changes {compared} without "
        f"{count_removed} random ones."
    )


def agreement(run: Run, asked: Asked) -> str:
    """On how many training images the methods agree, and how many of those just look alike."""
    rows = [row for row in asked.lists if row.method not in ALIKE]
    named, alike = named_by(asked), looking_alike(asked)
    said = []
    if len(rows) > 1:
        labels = [method_label(run, row.method) for row in rows]
        who = f"{', '.join(labels[:-1])} and {labels[-1]}"
        shared = sum(times > 1 for times in named.values())
        more = "both" if len(rows) == 2 else "more than one"
        said.append(
            f"{who} name {plural(len(named), 'training image')}, "
            f"{shared or 'none'} of them by {more}."
        )
    also = len(alike & set(named))
    if named and len(rows) < len(asked.lists):
        said.append(
            f"{also or 'None'} of the {len(named)} also "
            f"{'stands' if also == 1 else 'stand'} in a row to compare with."
        )
    return " ".join(said)


def named_by(asked: Asked) -> dict[int, int]:
    """How many methods name each training image; those that only compare do not count."""
    found: dict[int, int] = {}
    for row in asked.lists:
        for image in row.images if row.method not in ALIKE else []:
            found[image] = found.get(image, 0) + 1
    return found


def looking_alike(asked: Asked) -> set[int]:
    """Training images in the rows to compare with."""
    return {image for row in asked.lists if row.method in ALIKE for image in row.images}


def overlap(gallery: Gallery, method: str, other: str) -> float | None:
    """Mean share of a method's rows that stands in another's too."""
    shares = []
    for asked in gallery.asked:
        rows = {row.method: row.images for row in asked.lists}
        if method not in rows or other not in rows:
            return None
        shares.append(len(set(rows[method]) & set(rows[other])) / max(len(rows[method]), 1))
    return sum(shares) / len(shares) if shares else None


def map_caption(fewest: float, most: float) -> str:
    """What the maps say; numbers of training images behind a place, at the fewest and the most."""
    text = (
        "By NDA, which fits pieces of training images to pieces of the picture and asks no model. "
        "In each pair, orange on the left is where in the picture that training image fits best; "
        "orange on the right is the piece of it that fits. "
    )
    if _about(fewest) == _about(most):
        return (
            f"{text}Every part of this picture is about as common: about {_images(fewest)} "
            f"{'fits' if _about(fewest) == 'one' else 'fit'} it."
        )
    return (
        f"{text}The rarest part of this picture fits about {_images(fewest)}, the most common "
        f"part{', such as plain background,' if most > COMMON else ''} {_images(most)}."
    )


def matters(effect: Effect) -> bool:
    """Whether the removal changed more than chance explains."""
    return effect.p is not None and effect.p < CONVINCING and (effect.ratio or 0) > 1


def times(ratio: float) -> str:
    """`2.31` as `2.3 times`."""
    return f"{ratio:.1f}{NBSP}times"


def method_label(run: Run, name: str) -> str:
    """The name of a method for people."""
    return next((m.label for m in run.methods if m.name == name), name)


def _counts(run: Run, gallery: Gallery) -> tuple[int, int]:
    """Training images and generated ones."""
    if run.dataset is not None:
        return run.dataset.train, run.dataset.queries
    return len(gallery.train), len(gallery.asked)


def _chance(p: float) -> str:
    """A p-value in words."""
    if p < 1e-4:
        return "so large a difference would come about in fewer than 1 of 10,000 such trials"
    return (
        f"so large a difference would come about in about 1 of {count(round(1 / p))} such trials "
        f"(p{NBSP}={NBSP}{p:.2g})"
    )


def _about(value: float) -> str:
    return count(round(value)) if value >= 1.5 else "one"


def _images(value: float) -> str:
    return f"{_about(value)} training image{'' if _about(value) == 'one' else 's'}"
