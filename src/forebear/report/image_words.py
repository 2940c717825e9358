"""The sentences of the page of generated images, for people who never heard of attribution."""

from forebear.gallery import Asked, Effect, Gallery, Regenerated
from forebear.report.words import NBSP, count, number, plural
from forebear.run import Run

BASELINES = ("pixels", "similarity", "random")
"""Methods that only compare: whatever claims to know more has to find something else."""

LOOKS_AT = {
    "pixels": "looks alike, pixel by pixel",
    "similarity": "looks alike to the model",
    "random": "drawn by chance",
    "das": "moves what the model says the most",
    "dtrak": "trained what the model says here",
    "trak": "lowered the model’s error here",
    "graddot": "lowered the model’s error here",
    "gradcos": "lowered the model’s error here",
    "tracin": "lowered the model’s error here",
    "ekfac": "lowered the model’s error here",
    "kfac": "lowered the model’s error here",
    "journey_trak": "trained the steps from noise to this",
    "abu": "is forgotten along with this image",
    "mucs": "is forgotten along with this image",
    "nda": "has the parts that an ideal model takes",
    "concept_trak": "taught the model this part",
}
"""What a high score of a method means, in the fewest words."""

CONVINCING = 0.05


def hint(name: str) -> str:
    """What a high score of a method means."""
    return LOOKS_AT.get(name, "helped the model to make this")


def title(run: Run, gallery: Gallery) -> str:
    """The finding in one line."""
    effect = gallery.effect
    if effect is not None and matters(effect) and effect.ratio is not None:
        return (
            f"Without the training images behind it, a picture changes {times(effect.ratio)} as "
            "much as without random ones."
        )
    train = run.dataset.train if run.dataset is not None else len(gallery.train)
    asked = run.dataset.queries if run.dataset is not None else len(gallery.asked)
    return f"{_pictures(asked)}, and where they come from in {plural(train, 'training image')}."


def headline(run: Run, gallery: Gallery) -> str:
    """What was done, and what came out."""
    train = run.dataset.train if run.dataset is not None else len(gallery.train)
    asked = run.dataset.queries if run.dataset is not None else len(gallery.asked)
    first = (
        f"A model that learned from {plural(train, 'image')} made {plural(asked, 'picture')}. "
        f"Below: the training images behind {'it' if asked == 1 else 'each'}, as several methods "
        "see it"
    )
    if gallery.effect is None:
        return first + ". Nothing here was checked by training again without them yet."
    return f"{first}, and what the model makes when they are missing."


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


def agreement(asked: Asked, labels: int) -> str:
    """On how many training images the rows agree."""
    named = named_by(asked)
    shared = sum(times > 1 for times in named.values())
    if labels < 2:
        return ""
    if not shared:
        return f"The {labels} rows name {len(named)} training images, no two of them the same."
    return (
        f"The {labels} rows name {len(named)} training images; {shared} of them "
        f"{'is' if shared == 1 else 'are'} named more than once."
    )


def named_by(asked: Asked) -> dict[int, int]:
    """In how many rows each training image stands."""
    found: dict[int, int] = {}
    for row in asked.lists:
        for image in row.images:
            found[image] = found.get(image, 0) + 1
    return found


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
        "Pairs: orange on the left is where the training image matters, orange on the right what "
        "of it does. "
    )
    if round(fewest) == round(most):
        return f"{text}Last: behind every place stand about as many training images."
    return (
        f"{text}Last: orange parts are shared by few training images, down to about "
        f"{_about(fewest)}; behind clear ones, such as plain background, stand up to "
        f"{_about(most)}."
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


def _pictures(asked: int) -> str:
    return plural(asked, "generated image")


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
