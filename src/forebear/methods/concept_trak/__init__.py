"""Concept-TRAK: which training images taught a diffusion model one concept."""

from forebear.methods.concept_trak.method import (
    ConceptInfluence,
    ConceptTRAK,
    FittedConceptInfluence,
    concepts,
)

__all__ = ["ConceptInfluence", "ConceptTRAK", "FittedConceptInfluence", "concepts"]
