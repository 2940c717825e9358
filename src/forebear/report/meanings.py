"""What a score of each method means, for people who never heard of attribution."""

from collections.abc import Mapping
from typing import Any, NamedTuple

ALIKE = ("pixels", "similarity", "random")
"""Methods that only compare: whatever claims to know more has to find something else."""


class Meaning(NamedTuple):
    """Of a high score.

    Attributes:
        hint: the end of a sentence that begins with "the training image", in the fewest words.
        at_length: a sentence or two.
    """

    hint: str
    at_length: str


_LEARNED = Meaning(
    "helped the model to get this right",
    "Had the model not learned from it, it would probably be worse at this very picture.",
)

MEANINGS = {
    "pixels": Meaning(
        "looks alike, pixel by pixel",
        "It has nearly the same colours at the same places. No model is asked.",
    ),
    "similarity": Meaning(
        "looks alike to the model",
        "The model sees nearly the same in both. Whether it learned this from it, nobody asked.",
    ),
    "random": Meaning("is drawn by chance", "Nothing."),
    "das": Meaning(
        "made a difference to this picture",
        "Had the model not learned from it, the picture would probably be different: better or "
        "worse, this method cannot say.",
    ),
    "dtrak": Meaning(
        "shaped how the model draws this",
        "What the model does on this picture and on that image hangs on the same numbers inside "
        "it. Right or wrong plays no part.",
    ),
    "trak": _LEARNED,
    "graddot": _LEARNED,
    "gradcos": _LEARNED,
    "tracin": _LEARNED,
    "ekfac": _LEARNED,
    "kfac": _LEARNED,
    "journey_trak": Meaning(
        "helped on the way from noise to this",
        "Had the model not learned from it, it would probably do worse on the steps that led to "
        "this picture.",
    ),
    "abu": Meaning(
        "fades when the model forgets this",
        "A model that is made to forget this picture gets worse at that image too.",
    ),
    "mucs": Meaning(
        "fades when the model forgets this",
        "A model that is made to forget this picture gets worse at that image too.",
    ),
    "nda": Meaning(
        "has pieces that fit this picture",
        "Pieces of it look like pieces of this picture. A perfect copier would take them; what "
        "this model did is not asked.",
    ),
    "concept_trak": Meaning(
        "taught the model this idea", "It probably taught the model this one idea in the picture."
    ),
}

_OTHER = Meaning("counted for this picture", "By this method’s estimate it counted here.")


_ENCODED = Meaning(
    "looks alike to an encoder",
    "A network that compares pictures sees nearly the same in both. This model is not asked.",
)

_SHIFTED = Meaning(
    "shifted how the model draws this",
    "Had the model not learned from it, what it says here would probably be shifted: to better or "
    "worse, this method cannot say.",
)


def meaning(name: str, settings: Mapping[str, Any] | None = None) -> Meaning:
    """What a high score of a method means, with the settings of a run."""
    chosen = settings or {}
    if name == "similarity" and chosen.get("features", "hidden") != "hidden":
        return _ENCODED
    if name == "das" and chosen.get("form", "squared") != "squared":
        return _SHIFTED
    return MEANINGS.get(name, _OTHER)
