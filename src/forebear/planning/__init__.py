"""What work will cost, before it is done: timed samples, a fitted cost, a choice of settings."""

from forebear.planning.amounts import duration, parse_duration, parse_size, size
from forebear.planning.choose import plan_file
from forebear.planning.offers import Limits, Offer, Plan

__all__ = [
    "Limits",
    "Offer",
    "Plan",
    "duration",
    "parse_duration",
    "parse_size",
    "plan_file",
    "size",
]
